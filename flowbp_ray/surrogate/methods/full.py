"""Exact full backpropagation through the sampler: the yardstick that every surrogate's gradient is compared with."""

from dataclasses import dataclass, replace

import numpy as np

from flowbp_ray.surrogate.methods import truncated
from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.surrogate.quadrature import Grid


@dataclass(frozen=True)
class Settings:
    """There is nothing to set."""


def plan(settings: Settings, sigmas: Grid, generator: np.random.Generator) -> Plan:
    """Every index active, bridged with alpha 1, and the negative branch attached whatever the guidance says."""
    everything = truncated.Settings(active_steps=len(sigmas) - 1)
    return replace(truncated.plan(everything, sigmas, generator), method="full", attach_negative=True)
