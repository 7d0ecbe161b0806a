"""Imports torch, the first import of the package; without numpy, torch warns of that, and nothing here needs numpy."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    import torch  # noqa: F401
