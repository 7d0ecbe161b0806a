"""A rank's rows with Triton's kernels."""

from .. import triton
from .gpu import ShardedGpu

backend = ShardedGpu(triton.backend)
