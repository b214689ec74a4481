"""Truncated backpropagation (DRaFT-K): exact through the last K steps, nothing before them."""

from dataclasses import dataclass

import numpy as np

from flowbp_ray.surrogate.checks import count, require
from flowbp_ray.surrogate.plan import Active, Bridge, Plan, RewardInput
from flowbp_ray.surrogate.quadrature import Grid, checked_grid


@dataclass(frozen=True)
class Settings:
    """DRaFT-K has no published setting for flow models, so K is to be given."""

    #: K, how many last steps carry gradient.
    active_steps: int

    def __post_init__(self) -> None:
        count("active_steps", self.active_steps)


def plan(settings: Settings, sigmas: Grid, generator: np.random.Generator) -> Plan:
    """Coefficients ``Δ_i`` and a bridge of alpha 1 at every active index after the first; nothing is drawn."""
    grid = checked_grid(sigmas)
    steps, deltas = len(grid) - 1, np.diff(grid)
    require(settings.active_steps <= steps, "active_steps", settings.active_steps, f"at most {steps}, the number of steps")
    indices = range(steps - settings.active_steps, steps)
    active = tuple(Active(i, float(deltas[i])) for i in indices)
    return Plan("truncated", steps, (RewardInput("sampled", steps),), active, tuple(Bridge(i, 1.0) for i in indices[1:]))
