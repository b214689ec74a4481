"""ReFL: the posterior mean at one late index, and the velocity there."""

from dataclasses import dataclass

import numpy as np

from flowbp_ray.surrogate.checks import count, require
from flowbp_ray.surrogate.draws import one_of_the_last
from flowbp_ray.surrogate.plan import Active, Plan, RewardInput
from flowbp_ray.surrogate.quadrature import Grid, checked_grid


@dataclass(frozen=True)
class Settings:
    """Defaults are the published ones."""

    #: How many of the last steps the one that carries gradient is drawn from, with equal odds.
    last_n_steps: int = 11

    def __post_init__(self) -> None:
        count("last_n_steps", self.last_n_steps)


def plan(settings: Settings, sigmas: Grid, generator: np.random.Generator) -> Plan:
    """``x_τ − σ_τ v_τ``: the coefficient is ``−σ_τ``."""
    grid = checked_grid(sigmas)
    steps, last = len(grid) - 1, settings.last_n_steps
    require(last <= steps, "last_n_steps", last, f"at most {steps}, the number of steps")
    tau = one_of_the_last(last, steps, generator)
    return Plan("refl", steps, (RewardInput("posterior_mean", tau),), (Active(tau, -float(grid[tau])),))
