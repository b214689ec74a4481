"""FlowBP-Lagrange: two legs, k → j → T, each the integral of an interpolant of a few velocities, bridged at j."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from flowbp_ray.surrogate.checks import count, not_negative, one_of, positive, share
from flowbp_ray.surrogate.draws import PairDraw
from flowbp_ray.surrogate.plan import Active, Bridge, Connector, Plan, RewardInput, SampleWeight
from flowbp_ray.surrogate.quadrature import Grid, checked_grid, lagrange_weights, rescale_factor, supports

PUBLISHED_PAIR = PairDraw("dirichlet", concentration=(2.5, 6.0, 2.0), cap=10)


@dataclass(frozen=True)
class Settings:
    """Defaults are the published ones for SD3.5-M."""

    #: Supports of each leg, at most; all of its indices where it has fewer.
    order: int = 3
    #: Which of a leg's supports carry gradient: the first, the first two, or all.
    active_supports: Literal["start", "midpoint", "all"] = "midpoint"
    #: Factor on the gradient of active supports other than a leg's start.
    support_scale: float = 0.25
    #: How far a leg's gradient is scaled up for its supports that carry none: 0 not at all, 1 until the absolute weights of
    #: those that do, before ``support_scale``, add up to those of all.
    rescale: float = 0.0
    #: How much of the gradient crosses the bridge at step j to the first leg: 0 is nothing, 1 all.
    alpha: float = 0.1
    #: A sample weighs 1 / (sum of how far its legs miss the sampled latents, mean absolute). A smaller miss than this
    #: counts as this.
    weight_floor: float = 0.2
    #: How (k, j) is drawn.
    pair: PairDraw = PUBLISHED_PAIR
    #: Share of the steps, counted from the end, that (k, j) is drawn from (at least 3 steps); null is all.
    tail: float | None = None

    def __post_init__(self) -> None:
        count("order", self.order)
        one_of("active_supports", self.active_supports, ("start", "midpoint", "all"))
        not_negative("support_scale", self.support_scale)
        not_negative("rescale", self.rescale)
        not_negative("alpha", self.alpha)
        positive("weight_floor", self.weight_floor)
        share("tail", self.tail)


def leg(grid: np.ndarray, connector: Connector, number: int, support_scale: float = 1.0, rescale: float = 0.0) -> list[Active]:
    """The first ``number`` supports of a leg (or all) as active velocities: weight × rescale × support scale."""
    weights = lagrange_weights(grid, connector.start, connector.target, connector.supports)
    factor = rescale_factor(rescale, weights, weights[:number])
    scales = [factor] + [factor * support_scale] * (number - 1)
    return [Active(i, w * s) for i, w, s in zip(connector.supports, weights, scales, strict=False)]


def plan(settings: Settings, sigmas: Grid, generator: np.random.Generator) -> Plan:
    """``x̂_j`` and ``x̂_0`` by quadrature over ``[k, j)`` and ``[j, T)``, pinned to ``x_j`` and ``x_T``."""
    grid = checked_grid(sigmas)
    steps = len(grid) - 1
    k, j = settings.pair.draw(steps, settings.tail, generator)
    connectors = tuple(Connector(a, b, supports(a, b, settings.order)) for a, b in ((k, j), (j, steps)))
    number = {"start": 1, "midpoint": 2, "all": settings.order}[settings.active_supports]
    active: list[Active] = []
    for connector in connectors:
        active += leg(grid, connector, number, settings.support_scale, settings.rescale)
    weight = SampleWeight(connectors, settings.weight_floor)
    return Plan("lagrange", steps, (RewardInput("sampled", steps),), tuple(active), (Bridge(j, settings.alpha),), weight)
