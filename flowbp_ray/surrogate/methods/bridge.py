"""FlowBP-Bridge: FlowBP-Sparse on both sides of a split j, whose model input keeps the path to what precedes it."""

from dataclasses import dataclass

import numpy as np

from flowbp_ray.surrogate.checks import count, not_negative, share
from flowbp_ray.surrogate.draws import UNIFORM, PairDraw, late_biased, window_start
from flowbp_ray.surrogate.plan import Active, Bridge, Plan, RewardInput
from flowbp_ray.surrogate.quadrature import Grid, checked_grid, rescale_factor


@dataclass(frozen=True)
class Settings:
    """Defaults are the published ones for SD3.5-M."""

    #: K, how many indices carry gradient, j among them; all of the window where it has fewer.
    active_steps: int = 5
    #: Odds of an index are (places from its segment's start + 1)^late_bias; 0 is uniform.
    late_bias: float = 4.0
    #: How far the gradient is scaled up for the steps that carry none: 0 not at all, 1 until the weights of those that do
    #: add up to the weights of all (with ``tail``, of all in it).
    rescale: float = 0.0
    #: How much of the gradient crosses the bridge at step j to the active steps before it: 0 is nothing, 1 all.
    alpha: float = 0.5
    #: How j is drawn, as the later index of (k, j).
    pair: PairDraw = UNIFORM
    #: Share of the steps, counted from the end, that may be active (at least 3 steps); null is all.
    tail: float | None = None

    def __post_init__(self) -> None:
        count("active_steps", self.active_steps, least=2)
        not_negative("late_bias", self.late_bias)
        not_negative("rescale", self.rescale)
        not_negative("alpha", self.alpha)
        share("tail", self.tail)


def split_count(number: int, before: int, after: int) -> tuple[int, int]:
    """``number`` (at least 2) shared out over segments of these lengths in proportion, at least 1 and at most all of each."""
    number = min(number, before + after)
    first = min(max(round(number * before / (before + after)), 1), before)
    second = min(max(number - first, 1), after)
    return number - second, second


def split_indices(start: int, j: int, steps: int, number: int, bias: float, generator: np.random.Generator) -> list[int]:
    """Active indices of ``[start, steps)``: j itself, and late-biased ones before and after it, each side by its own bias."""
    before, after = split_count(number, j - start, steps - j)
    return [
        *late_biased(start, j, before, bias, start, generator),
        j,
        *late_biased(j + 1, steps, after - 1, bias, j + 1, generator),
    ]


def plan(settings: Settings, sigmas: Grid, generator: np.random.Generator) -> Plan:
    """``x̂_j`` composes ``[0, j)`` by Euler steps and is pinned to ``x_j``; ``[j, T)`` starts from it."""
    grid = checked_grid(sigmas)
    steps, deltas = len(grid) - 1, np.diff(grid)
    start = window_start(steps, settings.tail, least=3)
    _, j = settings.pair.draw(steps, settings.tail, generator)
    indices = split_indices(start, j, steps, settings.active_steps, settings.late_bias, generator)
    factor = rescale_factor(settings.rescale, deltas[start:], deltas[indices])
    active = tuple(Active(i, float(factor * deltas[i])) for i in indices)
    return Plan("bridge", steps, (RewardInput("sampled", steps),), active, (Bridge(j, settings.alpha),))
