"""The methods by name: each is settings, and a function from (settings, sigma grid, generator) to a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowbp_ray.surrogate.methods import (
    bridge,
    composed,
    draft_lv,
    drtune,
    full,
    lagrange,
    leapalign,
    randomised_truncation,
    refl,
    sparse,
    truncated,
)
from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.surrogate.quadrature import Grid


@dataclass(frozen=True)
class Method:
    """``plan(settings, sigmas (T + 1,), generator)`` with an instance of ``settings``."""

    settings: type
    plan: Callable[[Any, Grid, np.random.Generator], Plan]


METHODS: dict[str, Method] = {
    "refl": Method(refl.Settings, refl.plan),
    "draft_lv": Method(draft_lv.Settings, draft_lv.plan),
    "drtune": Method(drtune.Settings, drtune.plan),
    "leapalign": Method(leapalign.Settings, leapalign.plan),
    "sparse": Method(sparse.Settings, sparse.plan),
    "bridge": Method(bridge.Settings, bridge.plan),
    "lagrange": Method(lagrange.Settings, lagrange.plan),
    "full": Method(full.Settings, full.plan),
    "truncated": Method(truncated.Settings, truncated.plan),
    "randomised_truncation": Method(randomised_truncation.Settings, randomised_truncation.plan),
    "composed": Method(composed.Settings, composed.plan),
}
