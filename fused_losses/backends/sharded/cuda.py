"""A rank's rows with the CUDA kernels, and Triton's where there are no others."""

from .. import cuda
from .gpu import ShardedGpu

backend = ShardedGpu(cuda.backend)
