"""`fused-losses bench`: this package beside others on one's own machine."""
