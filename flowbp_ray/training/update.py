"""The gradient of one micro-batch: a plan's surrogate over a real backbone, one velocity evaluation at a time."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowbp_ray.backbones.backbone import Backbone, Conditioning
from flowbp_ray.surrogate.backward import Branch, Guidance, backward
from flowbp_ray.surrogate.plan import Plan


def accumulate(
    backbone: Backbone,
    plan: Plan,
    sigmas: Tensor,
    latents: Mapping[int, Tensor],
    gradients: Sequence[Tensor],
    weights: Tensor,
    conditioning: Conditioning,
    negative: Conditioning,
    *,
    guidance: Guidance,
    guidance_scale: float,
    batch: int,
    copies: Sequence[Tensor] = (),
    velocity_penalty: float = 0.0,
) -> None:
    """Add this micro-batch's share of the loss gradient to the adapter's ``.grad``.

    The loss is ``−mean(weight · J)`` over the reward inputs of ``batch`` samples, of which these are some. ``gradients[m]``
    is the objective's gradient at reward input ``m``, ``weights (B,)`` are the samples' weights, ``copies`` the plan's noised
    ones. ``guidance_scale`` is what embedded guidance is given; ``guidance`` has no second branch then.
    The penalty is ``velocity_penalty`` times the mean squared distance of the conditional velocity to the one without
    the adapter, averaged over the plan's active velocities too: it weighs the same whatever their number.
    """

    def velocity(x: Tensor, index: int, branch: Branch) -> Tensor:
        text = conditioning if branch == "conditional" else negative.expand(len(x))
        return backbone.branch(x, sigmas[index], text, guidance_scale)

    def towards_base(current: Tensor, x: Tensor, index: int) -> Tensor:
        backbone.transformer.disable_adapters()
        try:
            reference = velocity(x, index, "conditional")
        finally:
            backbone.transformer.enable_adapters()
        return 2 * velocity_penalty / (batch * len(plan.active) * current[0].numel()) * (current - reference)

    shape = (-1, *[1] * (gradients[0].ndim - 1))
    cotangents = [-(weights / (batch * len(gradients))).view(shape) * g for g in gradients]
    local = towards_base if velocity_penalty else None
    backward(plan, velocity, latents, cotangents, guidance=guidance, copies=copies, local=local)


def clip_by_norm(gradients: Sequence[Tensor], limit: float) -> float:
    """Scale the gradients in place so that their joint norm is at most ``limit``; returns the norm before.

    FloatingPointError where the norm is not finite: such an update must not be made.
    """
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])).item()
    if not torch.isfinite(torch.tensor(norm)):
        raise FloatingPointError("the gradient of the adapter is not finite: no update was made")
    if norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / norm)
    return norm
