"""DRTune: the posterior mean at an early stop, reached by evenly spaced velocities whose model inputs are detached."""

from dataclasses import dataclass

import numpy as np

from flowbp_ray.surrogate.checks import count, share
from flowbp_ray.surrogate.draws import evenly_spaced, one_of_the_last
from flowbp_ray.surrogate.plan import Active, Plan, RewardInput
from flowbp_ray.surrogate.quadrature import Grid, checked_grid, stopped_grid


@dataclass(frozen=True)
class Settings:
    """Defaults are the published ones."""

    #: K, how many indices carry gradient; all of them where the stop leaves fewer.
    active_steps: int = 3
    #: The trajectory stops at a step drawn evenly from this last share of the steps (0.4 of 25: the last 10), one at least.
    #: Above 0 and at most 1.
    stop_ratio: float = 0.4

    def __post_init__(self) -> None:
        count("active_steps", self.active_steps)
        share("stop_ratio", self.stop_ratio)


def plan(settings: Settings, sigmas: Grid, generator: np.random.Generator) -> Plan:
    """``x_0 + Σ_{i<s} Δ_i v_i − σ_s v_s``: the coefficient is ``Δ_i`` before the stop and ``−σ_s`` at it."""
    grid = checked_grid(sigmas)
    steps = len(grid) - 1
    stop = one_of_the_last(max(1, round(settings.stop_ratio * steps)), steps, generator)
    deltas = np.diff(stopped_grid(grid, stop))
    active = tuple(Active(i, float(deltas[i])) for i in evenly_spaced(stop + 1, settings.active_steps, generator))
    return Plan("drtune", steps, (RewardInput("posterior_mean", stop),), active)
