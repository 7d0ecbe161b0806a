"""As `sharded.torch`, the products of entries by the CUDA kernels."""

from .. import cuda
from .torch import Sharded

backend = Sharded(cuda.backend)
