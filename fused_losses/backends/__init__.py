"""Which implementations there are, which can run here, and which one "auto" takes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

# torch is not imported here: the name is that of a submodule.
if TYPE_CHECKING:
    from torch import Tensor

    from ..problem import Entries, Gradients, Needs, Problem, Rows, Segments, Selection, Statistics, Upstream

NAMES = ("cuda", "triton", "cpu", "torch", "reference")
# Before the name of the backend that a rank takes for its rows of a head that is spread over several.
SHARDED = "sharded."

PURPOSE = {
    "cuda": "CUDA kernels for the entries and the row statistics, the scan in Triton",
    "triton": "Triton kernels for everything, the products of exact gradients from torch; NVIDIA, AMD, Intel",
    "cpu": "compiled kernels for the row passes and sparse products on a CPU",
    "torch": "chunked, in plain PyTorch operations, any device",
    "reference": "full logits in plain PyTorch, the specification; for checks on small inputs",
}
NO_TRITON = (
    "triton is not installed; it comes with builds of torch for CUDA, and with: pip install 'fused_losses[gpu]' (Linux)"
)
# Architectures on which the CUDA kernels were measured to be faster than Triton's (90: an H200, docs/benchmarks.md):
# "auto" takes them there.
CUDA_MEASURED_FASTER = frozenset({90})


class Backend(Protocol):
    """What every implementation has, as a module or an object; backends/torch.py says what each function does."""

    SAMPLED_TOKENS: int
    HAS_DIRECTIONS: bool
    HAS_SKETCH: bool

    def statistics(self, problem: Problem, keep_rows: bool = False) -> tuple[Statistics, Rows]: ...
    def gradients(self, problem: Problem, upstream: Any, needs: Needs) -> tuple[Statistics, Gradients]: ...
    def empty_statistics(self, problem: Problem) -> Statistics: ...
    def empty_gradients(self, problem: Problem, needs: Needs) -> Gradients: ...
    def scan(self, problem: Problem, out: Statistics, selection: Selection) -> Iterator[tuple[Any, Entries]]: ...
    def dense_rows(self, problem: Problem, chunk: Any) -> Rows: ...
    def add_dense(
        self, problem: Problem, chunk: Any, out: Statistics, upstream: Upstream, total: Gradients
    ) -> None: ...
    def rows_product(self, segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, dtype: Any) -> Tensor: ...
    def columns_product(
        self, segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, base: Tensor | None,
        base_scale: float, dtype: Any,
    ) -> Tensor: ...  # fmt: skip
    def weighted_sum(self, matrix: Tensor, scale: Tensor) -> Tensor: ...


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here; None where it can."""
    if name == "cpu":
        from ..kernels import schemas

        return schemas.load()
    if name == "triton":
        return _no_triton(interpreted())
    if name == "cuda":
        from ..kernels import schemas

        return schemas.load_cuda() or _no_triton(interpreted())
    return None


@functools.cache
def _no_triton(interpreted: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return NO_TRITON
    if interpreted:
        import triton.language
        from triton.runtime.jit import JITFunction

        if isinstance(triton.language.sum, JITFunction):
            return "TRITON_INTERPRET was set after triton had been imported; set it before Python starts"
        return None
    import torch

    if torch.version.cuda is None and torch.version.hip is None and not torch.xpu._is_compiled():
        return (
            "torch is a build without GPUs; to run the kernels on a CPU, slowly, set TRITON_INTERPRET=1 before Python "
            "starts"
        )
    if not torch.cuda.is_available() and not torch.xpu.is_available():
        return "no GPU visible"
    try:
        import triton.language
    except Exception as error:  # whatever a broken installation raises is the reason
        return f"triton does not import ({type(error).__name__}: {error}); pip install 'fused_losses[gpu]'"
    return None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def chain(device_type: str) -> list[tuple[str, str | None]]:
    """What "auto" goes through on a device of this type: names, each with why it is passed over, None for the one
    taken."""
    if device_type == "cpu":
        candidates = {"cpu": unavailable("cpu")}
    elif device_type == "cuda":
        reason = unavailable("cuda")
        candidates = {"cuda": reason or _not_faster(), "triton": unavailable("triton") or _unproven(device_type)}
    elif device_type == "xpu":
        candidates = {"triton": unavailable("triton") or _unproven(device_type)}
    else:
        candidates = {}
    steps: list[tuple[str, str | None]] = []
    for name, reason in {**candidates, "torch": None}.items():
        steps.append((name, reason))
        if reason is None:
            break
    return steps


def choose(name: str, device_type: str) -> str:
    """The backend for a call on a device of this type."""
    if name == "auto":
        return chain(device_type)[-1][0]
    fits = {"cpu": ("cpu",), "triton": ("cuda", "xpu", *(["cpu"] if interpreted() else [])), "cuda": ("cuda",)}
    if device_type not in fits.get(name, (device_type,)):
        move = "the CPU" if name == "cpu" else "a GPU"
        here = unavailable(name)
        why = f" (which cannot run here: {here})" if here is not None else ""
        raise ValueError(
            f"backend={name!r} with tensors on {device_type}{why}; give backend='auto', or move them to {move}"
        )
    reason = unavailable(name)
    if reason is not None and name == "cuda":
        from ..kernels import schemas

        reason = schemas.build_and_load_cuda() or unavailable(name)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run here: {reason}; give backend='auto'")
    return name


def _unproven(device_type: str) -> str | None:
    """Why the kernels are passed over on GPUs other than NVIDIA's, where only the first call can tell."""
    from .. import devices, selfcheck

    if device_type == "cuda" and not devices.is_rocm():
        return None
    return selfcheck.reason(device_type)


def _not_faster() -> str | None:
    """Why the CUDA kernels are passed over where they can run: Triton's were not measured to be slower."""
    import torch

    from ..kernels.triton.tiles import architecture

    here = architecture(torch.cuda.get_device_capability())
    return None if here in CUDA_MEASURED_FASTER else f"not measured to be faster than triton on sm_{here}"


def load(name: str) -> Backend:
    module: Any = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, "backend", module)
