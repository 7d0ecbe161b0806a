"""Checks of the arguments that a session and the walks share."""

from __future__ import annotations

import math
from typing import Any


def check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer ≥ {least}, got {value!r}")


def check_number(name: str, value: Any, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ValueError(f"{name}: expected a number in [0, {most:g}], got {value!r}")


def check_goal(confidence: Any, target_probability: Any) -> tuple[float | None, float | None]:
    """Exactly one of the two, confidence 1 where neither is given."""
    if target_probability is None:
        confidence = 1.0 if confidence is None else confidence
    elif confidence is not None:
        raise ValueError("confidence, target_probability: expected one of them, got both; leave one out")
    for name, value, good, expected, remedy in (
        ("confidence", confidence, lambda v: 0 < v <= 1, "a number in (0, 1]", "leave it out for 1"),
        (
            "target_probability",
            target_probability,
            lambda v: 0 < v < 1,
            "a number in (0, 1), or None",
            "leave it out for a confidence",
        ),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not good(value)):
            raise ValueError(f"{name}: expected {expected}, got {value!r}; {remedy}")
    return confidence, target_probability


def check_sampling(temperature: Any, top_p: Any, seed: Any) -> None:
    for name, value, good, expected in (
        ("temperature", temperature, lambda v: 0 <= v < math.inf, "a finite number ≥ 0"),
        ("top_p", top_p, lambda v: 0 < v <= 1, "a number in (0, 1]"),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not good(value):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: expected an integer, got {seed!r}")
