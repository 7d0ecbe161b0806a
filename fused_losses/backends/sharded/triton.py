"""As `sharded.torch`, the products of entries by Triton's kernels."""

from .. import triton
from .torch import Sharded

backend = Sharded(triton.backend)
