"""LeapAlign: two leaps, k → j → T, the second one's model input bridged to the first."""

from dataclasses import dataclass

import numpy as np

from flowbp_ray.surrogate.checks import not_negative, positive, share
from flowbp_ray.surrogate.draws import UNIFORM, PairDraw
from flowbp_ray.surrogate.plan import Active, Bridge, Connector, Plan, RewardInput, SampleWeight
from flowbp_ray.surrogate.quadrature import Grid, checked_grid


@dataclass(frozen=True)
class Settings:
    """Defaults are the published ones."""

    #: How much of the gradient crosses the bridge at step j to the step k before it: 0 is nothing, 1 all.
    alpha: float = 0.3
    #: A sample weighs 1 / (sum of how far its leaps miss the sampled latents, mean absolute). A smaller miss than this
    #: counts as this.
    weight_floor: float = 0.1
    #: How (k, j) is drawn.
    pair: PairDraw = UNIFORM
    #: Share of the steps, counted from the end, that (k, j) is drawn from; null is all.
    tail: float | None = None

    def __post_init__(self) -> None:
        not_negative("alpha", self.alpha)
        positive("weight_floor", self.weight_floor)
        share("tail", self.tail)


def plan(settings: Settings, sigmas: Grid, generator: np.random.Generator) -> Plan:
    """``x̂_j = x_k + (σ_j − σ_k) v_k`` pinned to ``x_j``, ``x̂_0 = x_j − σ_j v_j`` pinned to ``x_T``."""
    grid = checked_grid(sigmas)
    steps = len(grid) - 1
    k, j = settings.pair.draw(steps, settings.tail, generator)
    active = (Active(k, float(grid[j] - grid[k])), Active(j, -float(grid[j])))
    weight = SampleWeight((Connector(k, j, (k,)), Connector(j, steps, (j,))), settings.weight_floor)
    return Plan("leapalign", steps, (RewardInput("sampled", steps),), active, (Bridge(j, settings.alpha),), weight)
