"""An objective from its name and options, as command lines and configuration files write them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from .asft import ASFTLoss
from .base import Objective
from .cross_entropy import CrossEntropyLoss
from .dft import DFTLoss
from .eaft import EAFTLoss
from .eksft import EKSFTLoss
from .flow import FLOWLoss
from .infosft import InfoSFTLoss
from .jsd import JSDLoss, ReverseKLLoss
from .lawf import LAwFLoss
from .mask_the_target import MaskTheTargetLoss
from .psft import PSFTLoss
from .sft_kl import SFTKLLoss
from .stm import STMLoss
from .talr import TALRLoss
from .topk_distillation import TopKDistillationLoss
from .weighted import WeightedLoss

NAMED: dict[str, type[Objective]] = {
    "lawf": LAwFLoss, "sft": CrossEntropyLoss, "sft+kl": SFTKLLoss, "talr": TALRLoss, "dft": DFTLoss, "asft": ASFTLoss,
    "eaft": EAFTLoss, "flow": FLOWLoss, "stm": STMLoss, "infosft": InfoSFTLoss, "mask-the-target": MaskTheTargetLoss,
    "eksft": EKSFTLoss, "psft": PSFTLoss, "weighted": WeightedLoss, "jsd": JSDLoss, "reverse-kl": ReverseKLLoss,
    "topk-distillation": TopKDistillationLoss,
}  # fmt: skip
OTHER_NAMES = {"ce": "sft", "nll": "sft"}


def objective_class(name: Any, said_of: str = "loss") -> type[Objective]:
    """The class of that name: one of NAMED, or a class's own, such as TALRLoss; ValueError with all names.

    Case, signs between words and a last "loss" do not count: cross-entropy, CrossEntropyLoss and cross_entropy_loss are
    sft. `said_of`: what a message calls the name.
    """
    known = {_spelt(cls.__name__): own for own, cls in NAMED.items()}
    known |= {_spelt(own): own for own in NAMED} | OTHER_NAMES
    spelt = _spelt(name) if isinstance(name, str) else ""
    if spelt not in known:
        close = difflib.get_close_matches(spelt, known, 1)
        meant = f"; did you mean {known[close[0]]}?" if close else ""
        raise ValueError(f"{said_of}: expected one of {', '.join(NAMED)}, got {name!r}{meant}")
    return NAMED[known[spelt]]


def _spelt(name: str) -> str:
    letters = "".join(letter for letter in name.lower() if letter.isalnum())
    return letters.removesuffix("loss") or letters


def make_objective(name: Any, options: Mapping[str, Any] | None = None, said_of: str = "loss") -> Objective:
    """The objective of that name, with the options of its constructor as a command line or a YAML file has them.

    Text that is a number counts as one: YAML reads 1e-3 as text.

    Raises: ValueError for an unknown name or a wrong value, TypeError for an unknown option or one that is missing;
    each names it and says what there is. `said_of`: what a message calls the name.
    """
    cls = objective_class(name, said_of)
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"{said_of}_options: expected options by name, got {options!r}; write {{temperature: 2.0}}")
    if wrong := [key for key in options or {} if not isinstance(key, str)]:
        raise TypeError(f"{said_of}_options: expected names, got {wrong[0]!r}")
    if glued := [key for key, value in (options or {}).items() if ":" in key and value is None]:
        spaced = ": ".join(glued[0].split(":", 1))
        raise TypeError(f"{said_of}_options: {glued[0]}: YAML needs a space after its colon: {{{spaced}}}")
    parameters = inspect.signature(cls.__init__).parameters
    given = {key: read_option(value) for key, value in (options or {}).items()}
    for key, parameter in parameters.items():
        if key != "self" and parameter.default is parameter.empty and key not in given and parameter.kind not in _MANY:
            raise TypeError(f"{said_of}_options: {cls.__name__} needs {key}; give {{{key}: ...}}")
    return cls(**given)


_MANY = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def read_option(value: Any) -> Any:
    """YAML reads 1e-3 as text, and so does whoever splits name=value."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
