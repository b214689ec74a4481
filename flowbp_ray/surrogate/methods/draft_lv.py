"""DRaFT-LV: the last step's estimate and re-noised copies of it, one velocity each; the loss is their mean."""

from dataclasses import dataclass

import numpy as np

from flowbp_ray.surrogate.checks import count
from flowbp_ray.surrogate.plan import Active, Plan, RewardInput
from flowbp_ray.surrogate.quadrature import Grid, checked_grid


@dataclass(frozen=True)
class Settings:
    """Defaults are the published ones."""

    #: n, how many noised copies; 0 is DRaFT-1.
    copies: int = 2

    def __post_init__(self) -> None:
        count("copies", self.copies, least=0)


def plan(settings: Settings, sigmas: Grid, generator: np.random.Generator) -> Plan:
    """1 + n posterior means at ``T − 1``, each by its own velocity with coefficient ``−σ_{T−1}``; nothing is drawn.

    The copies' model inputs are `inputs.noised_copies`, their noise is the caller's.
    """
    grid = checked_grid(sigmas)
    last = len(grid) - 2
    copies = (RewardInput("copy", last, m) for m in range(settings.copies))
    active = tuple(Active(last, -float(grid[last]), m) for m in range(1 + settings.copies))
    return Plan("draft_lv", last + 1, (RewardInput("posterior_mean", last), *copies), active)
