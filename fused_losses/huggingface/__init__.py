"""Fused losses with Hugging Face models."""
