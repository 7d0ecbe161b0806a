"""The options of an objective's constructor: their names, their bounds, and what is said of wrong ones."""

from __future__ import annotations

import difflib
import inspect
import math
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..head import LMHead, Reference

ARGUMENTS = ("hidden", "head", "weight", "labels", "reference", "num_items", "sequence_ids")  # of a call
# What papers and other libraries call an option of ours.
OTHER_NAMES = {
    "tau": "temperature", "t": "temperature", "temp": "temperature", "min_weight": "floor", "group": "process_group",
    "eps": "epsilon", "clip": "epsilon", "clip_eps": "epsilon", "k": "top_k", "topk": "top_k",
    "beta": "kl_weight", "kl_coef": "kl_weight", "kl_coeff": "kl_weight", "lam": "kl_weight", "lambda_": "kl_weight",
    "ignored": "ignore_index", "pad_token_id": "ignore_index", "tol": "tolerance", "device": "backend",
    "reduce": "reduction", "weight": "class_weights", "ce_weight": "class_weights", "smoothing": "label_smoothing",
    "label_smoothing_factor": "label_smoothing", "lse_square_scale": "z_loss", "z_loss_weight": "z_loss",
    "kd_temperature": "temperature", "kd_beta": "beta", "jsd_beta": "beta",
    "kd_ce_alpha": "nll_weight", "weight_hard_loss": "nll_weight",
    "normalize": "normalise", "kd_normalize_topk": "normalise", "add_tail": "rest", "loss_add_tail": "rest",
    "p": "max_probability", "tau_ppl": "threshold", "clip_ratio_high": "epsilon_high", "eps_high": "epsilon_high",
    "clip_ratio_low": "epsilon", "clip_ratio": "epsilon", "lambda_kl": "kl_weight", "eaft_alpha": "alpha",
}  # fmt: skip


def belongs_to_a_call(value: Any) -> bool:
    return isinstance(value, (nn.Module, LMHead, Reference)) or (isinstance(value, Tensor) and value.dim() > 0)


def takes_tensors(cls: type, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the constructor may take tensors: one that is not of this package, and whose signature fits."""
    constructor: Any = cls.__init__  # type: ignore[misc]
    if constructor.__module__.startswith(f"{__package__}."):
        return False
    try:
        inspect.signature(constructor).bind(None, *args, **kwargs)
    except TypeError:
        return False
    return True


def option_names(cls: type) -> list[str]:
    """The names that the constructor takes, its own first."""
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
            variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            names += [p.name for p in parameters if p.kind not in variable and p.name not in names]
            if base.__name__ == "Objective" or not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return names


def unknown_option(cls: type, name: str) -> str:
    names = option_names(cls)
    known = OTHER_NAMES.get(name.lower(), "")
    close = [known] if known in names else difflib.get_close_matches(name, names, 1)
    meant = f"; did you mean {close[0]}?" if close else ""
    if known not in names and name in (*ARGUMENTS, *getattr(cls, "fields", ())):
        meant = f"; {name} is an argument of the call, {cls.__name__}()(hidden, head, labels, ...)"
    return f"{cls.__name__}: has no option {name}{meant}; there are {', '.join(names)}"


def not_made(cls: type) -> str:
    return (
        f"{cls.__name__}: Objective.__init__ has not run; call super().__init__() first in {cls.__name__}.__init__ (of "
        f"a dataclass in "
        "__post_init__)"
    )


def check_number(
    value: Any, name: str, above: float = -math.inf, least: float = -math.inf, most: float = math.inf,
    below: float = math.inf, instead: str = "",
) -> int | float:  # fmt: skip
    """The Python number that it is."""
    number = checks.number(value)
    if number is None or not (above < number < below and least <= number <= most):
        bounds = (
            [f"> {above}"] * (above > -math.inf)
            + [f"≥ {least}"] * (least > -math.inf)
            + [f"≤ {most}"] * (most < math.inf)
            + [f"< {below}"] * (below < math.inf)
        )
        trained = ", which requires a gradient that would be lost" if getattr(value, "requires_grad", False) else ""
        raise ValueError(
            f"{name}: expected {instead or 'a finite number ' + ' and '.join(bounds)}, got {value!r}{trained}"
        )
    return number
