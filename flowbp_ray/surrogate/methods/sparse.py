"""FlowBP-Sparse: the sampled latent as a full Euler composition in which few, late-biased velocities carry gradient."""

from dataclasses import dataclass

import numpy as np

from flowbp_ray.surrogate.checks import count, not_negative, share
from flowbp_ray.surrogate.draws import late_biased, window_start
from flowbp_ray.surrogate.plan import Active, Plan, RewardInput
from flowbp_ray.surrogate.quadrature import Grid, checked_grid, rescale_factor


@dataclass(frozen=True)
class Settings:
    """Defaults are the published ones for SD3.5-M."""

    #: K, how many indices carry gradient; at most the number in the tail window.
    active_steps: int = 4
    #: Odds of index i are (i + 1)^late_bias; 0 is uniform.
    late_bias: float = 1.0
    #: How far the gradient is scaled up for the steps that carry none: 0 not at all, 1 until the weights of those that do
    #: add up to the weights of all (with ``tail``, of all in it).
    rescale: float = 0.5
    #: Share of the steps, counted from the end, that may be active; null is all.
    tail: float | None = None

    def __post_init__(self) -> None:
        count("active_steps", self.active_steps)
        not_negative("late_bias", self.late_bias)
        not_negative("rescale", self.rescale)
        share("tail", self.tail)


def plan(settings: Settings, sigmas: Grid, generator: np.random.Generator) -> Plan:
    """``x̂ = x_0 + Σ Δ_i v_i`` pinned to ``x_T``; each active coefficient is ``Δ_i`` times the rescale factor."""
    grid = checked_grid(sigmas)
    steps, deltas = len(grid) - 1, np.diff(grid)
    start = window_start(steps, settings.tail)
    indices = late_biased(start, steps, settings.active_steps, settings.late_bias, 0, generator)
    factor = rescale_factor(settings.rescale, deltas[start:], deltas[indices])
    active = tuple(Active(i, float(factor * deltas[i])) for i in indices)
    return Plan("sparse", steps, (RewardInput("sampled", steps),), active)
