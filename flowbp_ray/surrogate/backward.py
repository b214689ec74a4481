"""The gradient of any plan's surrogate, one velocity evaluation alive at a time.

A surrogate is linear in its active velocities except at bridges, and a pin makes each reward input equal to
a cached value. So the walk goes from the last active index to the first: evaluate one velocity with gradient,
pull back its coefficient times the gradient at the reward input, free the graph. A bridge adds alpha times
the gradient at its latent to what all earlier velocities receive. The sum is exactly the gradient of the whole graph.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowbp_ray.surrogate.checks import not_negative, require
from flowbp_ray.surrogate.plan import Active, Plan

Branch = Literal["conditional", "negative"]
#: ``velocity(latents (B, …), index, branch)``: the velocity (noise minus data) of one branch at sigma = grid[index].
VelocityField = Callable[[Tensor, int, Branch], Tensor]
#: ``local(velocity, latents, index)``: an extra cotangent at a conditional velocity; all are ``(B, …)`` without gradient.
LocalCotangent = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance ``v = v_neg + scale·(v_cond − v_neg)``; one branch alone where ``scale`` is at most 1."""

    scale: float = 1.0
    #: No gradient from the negative branch, neither to weights nor to latents; it is not even evaluated.
    detach_negative: bool = True
    #: Divide the gradient of the loss by ``scale``.
    compensate: bool = False

    def __post_init__(self) -> None:
        not_negative("guidance scale", self.scale)
        require(
            self.scale > 1 or not self.compensate, "compensate", True, f"false where guidance scale is {self.scale:g}, not > 1"
        )


UNGUIDED = Guidance()


def backward(
    plan: Plan,
    velocity: VelocityField,
    latents: Mapping[int, Tensor],
    cotangents: Sequence[Tensor],
    *,
    guidance: Guidance = UNGUIDED,
    copies: Sequence[Tensor] = (),
    local: LocalCotangent | None = None,
) -> None:
    """Add the gradient of the plan's surrogate loss to the ``.grad`` of the parameters that ``velocity`` uses.

    ``latents[i]`` and ``copies[m]`` are the cached ``(B, …)``; ``cotangents[m]``, of the same shape, is the
    gradient of the loss at reward input ``m``, sample weights and sign in it. ``local`` adds a cotangent (a penalty
    towards a reference velocity) at each conditional velocity; the penalty takes its latents as given, so it does
    not cross bridges, and ``compensate`` leaves it alone. ValueError where something the plan needs is missing.
    """
    _check(plan, latents, cotangents, copies)
    gradients = [c / guidance.scale if guidance.compensate else c for c in cotangents]
    alphas = {b.index: b.alpha for b in plan.bridges}
    for active in reversed(plan.active):
        m, alpha = active.reward_input, alphas.get(active.index, 0.0)
        inputs = _model_input(plan, active, latents, copies)
        received = gradients[m]
        for branch, factor in branches(plan, guidance).items():
            extra = local if branch == "conditional" else None
            cotangent = active.coefficient * factor * received
            at_latents = _pull_back(velocity, inputs, active.index, branch, cotangent, alpha != 0, extra)
            if at_latents is not None:
                gradients[m] = gradients[m] + alpha * at_latents


def branches(plan: Plan, guidance: Guidance) -> dict[Branch, float]:
    """The branches that carry gradient, and their factors in the guided velocity."""
    if guidance.scale <= 1:
        return {"conditional": 1.0}
    if plan.attach_negative or not guidance.detach_negative:
        return {"conditional": guidance.scale, "negative": 1 - guidance.scale}
    return {"conditional": guidance.scale}


def _pull_back(
    velocity: VelocityField,
    latents: Tensor,
    index: int,
    branch: Branch,
    cotangent: Tensor,
    to_latents: bool,
    local: LocalCotangent | None,
) -> Tensor | None:
    """Evaluate one velocity, pull ``cotangent`` back to the parameters and, if asked, return its gradient at the latents
    (None where the velocity does not depend on them)."""
    inputs = latents.detach().requires_grad_(to_latents)
    with torch.enable_grad():
        output = velocity(inputs, index, branch)
    cotangent = cotangent.to(output.dtype)
    if local is None:
        output.backward(cotangent)
        return inputs.grad
    with torch.no_grad():
        extra = local(output.detach(), latents.detach(), index)
    at_latents = torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True)[0] if to_latents else None
    output.backward(cotangent + extra.to(output.dtype))
    return at_latents


def _model_input(plan: Plan, active: Active, latents: Mapping[int, Tensor], copies: Sequence[Tensor]) -> Tensor:
    copy = plan.reward_inputs[active.reward_input].copy
    return latents[active.index] if copy is None else copies[copy]


def _check(plan: Plan, latents: Mapping[int, Tensor], cotangents: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    if len(cotangents) != len(plan.reward_inputs) or len(copies) != plan.copies:
        raise ValueError(
            f"the {plan.method} plan has {len(plan.reward_inputs)} reward inputs, {plan.copies} of them copies, "
            f"but was given {len(cotangents)} cotangents and {len(copies)} copies"
        )
    for active in plan.active:
        if plan.reward_inputs[active.reward_input].copy is None and active.index not in latents:
            raise ValueError(f"the {plan.method} plan needs the latent of index {active.index}; given are {sorted(latents)}")
        shape, wanted = cotangents[active.reward_input].shape, _model_input(plan, active, latents, copies).shape
        if shape != wanted:
            raise ValueError(f"cotangent {active.reward_input} is {tuple(shape)}, but the latents are {tuple(wanted)}")
