"""Forgetting-resistant baselines in parameter space: L2 to the initial weights, and Wise-FT interpolation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


def l2_to_initial(model: nn.Module, initial: nn.Module | State) -> Tensor:
    """‖θ − θ₀‖² over the trainable parameters of `model`; add λ times it to the loss (L2-Reg, also known as L2-SP).

    Args:
        model: the model in training.
        initial: its state at the start: a state dict (cloned: `{k: v.clone() for k, v in model.state_dict().items()}`)
            or another module with the same parameter names.

    Returns:
        A scalar in float32 (float64 for float64 parameters), differentiable with respect to the trainable parameters.

    Raises:
        ValueError: a trainable parameter is missing in `initial`, has another shape there, or is the same tensor.
    """
    if not isinstance(model, nn.Module):
        swapped = "; model and initial may be swapped" if isinstance(initial, nn.Module) else ""
        raise TypeError(f"model: expected a module, got {type(model).__name__}{swapped}")
    start = _state(initial)
    total: Tensor | None = None
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in start:
            raise ValueError(f"initial: lacks the trainable parameter {name!r}; give the state dict of the same model")
        origin = start[name].detach()
        if origin.shape != parameter.shape:
            raise ValueError(f"initial[{name!r}]: expected shape {list(parameter.shape)}, got {list(origin.shape)}")
        if origin.data_ptr() == parameter.data_ptr() and origin.device == parameter.device and origin.numel():
            raise ValueError(
                f"initial[{name!r}] shares memory with the model, so it moves along; clone the state first"
            )
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        part = (parameter.to(dtype) - origin.to(parameter.device, dtype)).square().sum()
        total = part if total is None else total + part.to(total.device)
    if total is None:
        raise ValueError("model: has no trainable parameter")
    return total


def wise_ft(initial: nn.Module | State, tuned: nn.Module | State, alpha: float) -> dict[str, Tensor]:
    """(1 − alpha)·θ₀ + alpha·θ, a new state dict for `load_state_dict`.

    Floating tensors are mixed in float32 (float64 stays) and returned in the dtype and on the device of `tuned`;
    integer buffers are taken from `tuned`. alpha = 0 is the initial model, 1 the tuned one. Source: arXiv 2109.01903.

    Raises:
        ValueError: alpha outside [0, 1], or keys or shapes that differ.
    """
    if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha!r}")
    start, end = _state(initial), _state(tuned)
    if start.keys() != end.keys():
        only = sorted(start.keys() ^ end.keys())
        raise ValueError(f"initial and tuned: expected the same keys, but {len(only)} differ, e.g. {only[0]!r}")
    mixed = {}
    for name, value in end.items():
        origin = start[name]
        if origin.shape != value.shape:
            raise ValueError(f"{name!r}: expected equal shapes, got {list(origin.shape)} and {list(value.shape)}")
        if value.is_floating_point():
            dtype = torch.promote_types(value.dtype, torch.float32)
            mix = torch.lerp(origin.detach().to(value.device, dtype), value.detach().to(dtype), float(alpha))
            mixed[name] = mix.to(value.dtype)
        else:
            mixed[name] = value.detach().clone()
    return mixed


def _state(source: nn.Module | State) -> State:
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    raise TypeError(f"expected an nn.Module or a state dict, got {type(source).__name__}")
