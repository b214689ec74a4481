"""Checks of settings: each failure is one sentence that names the field, its value and what is allowed."""

import math
from collections.abc import Sequence


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} is {value!r}: it must be {allowed}")


def count(name: str, value: int, least: int = 1) -> None:
    """A whole number of at least ``least``."""
    require(isinstance(value, int) and value >= least, name, value, f"a whole number of at least {least}")


def not_negative(name: str, value: float) -> None:
    """A finite number of at least 0."""
    require(0 <= value < math.inf, name, value, "a finite number of at least 0")


def positive(name: str, value: float) -> None:
    """A finite number above 0."""
    require(0 < value < math.inf, name, value, "a finite number above 0")


def share(name: str, value: float | None) -> None:
    """A number above 0 and at most 1, or None, which a configuration calls null."""
    require(value is None or 0 < value <= 1, name, value, "above 0 and at most 1, or null")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """One of a few words."""
    require(value in allowed, name, value, f"one of {', '.join(allowed)}")
