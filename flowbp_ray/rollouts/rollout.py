"""One cached no-grad rollout by Euler's method."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbp_ray.surrogate.plan import Plan

#: ``velocity(latents (B, …), sigma)``: guided velocity, no branch left out.
Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rollout:
    """What a plan needs of a trajectory: latents and guided velocities ``(B, …)`` by grid index."""

    latents: dict[int, Tensor]
    velocities: dict[int, Tensor]


@torch.no_grad()
def roll_out(noise: Tensor, sigmas: Tensor, velocity: Velocity, plan: Plan) -> Rollout:
    """Sample from ``noise (B, …)`` on the grid ``sigmas (T + 1,)`` as far as the plan needs, keeping what it needs."""
    if len(sigmas) != plan.steps + 1:
        raise ValueError(f"the plan has {plan.steps} steps but the grid has {len(sigmas) - 1}: make both from one grid")
    latents, velocities = {}, {}
    current = noise
    for i in range(plan.last_index + 1):
        if i in plan.latents_needed:
            latents[i] = current
        if i == plan.last_index and i not in plan.velocities_needed:
            break
        v = velocity(current, sigmas[i])
        if i in plan.velocities_needed:
            velocities[i] = v
        if i < plan.last_index:
            current = current + (sigmas[i + 1] - sigmas[i]) * v
    return Rollout(latents, velocities)
