"""Randomised truncation (AlignProp): truncated backpropagation through a random number of last steps."""

from dataclasses import dataclass, replace

import numpy as np

from flowbp_ray.surrogate.checks import count, require
from flowbp_ray.surrogate.methods import truncated
from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.surrogate.quadrature import Grid


@dataclass(frozen=True)
class Settings:
    """AlignProp draws K over the whole trajectory; here from 1, as no step at all gives no gradient."""

    #: Smallest K.
    least: int = 1
    #: Largest K, or null for all steps.
    most: int | None = None

    def __post_init__(self) -> None:
        count("least", self.least)
        if self.most is not None:
            count("most", self.most, self.least)


def plan(settings: Settings, sigmas: Grid, generator: np.random.Generator) -> Plan:
    """K is uniform in ``least … most``; the rest is `truncated`."""
    steps = len(sigmas) - 1
    most = steps if settings.most is None else settings.most
    for name, value in (("least", settings.least), ("most", most)):
        require(value <= steps, name, value, f"at most {steps}, the number of steps")
    number = int(generator.integers(settings.least, most + 1))
    return replace(truncated.plan(truncated.Settings(number), sigmas, generator), method="randomised_truncation")
