"""The Triton kernels: `scan` (the product that writes no logits), `rows` (over a chunk's logits), `entries` (over kept ones)."""
