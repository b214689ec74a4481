"""The gradient of one micro-batch: a plan's surrogate over a real backbone, one velocity evaluation at a time."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flowbp_ray.backbones.backbone import Backbone, Conditioning
from flowbp_ray.surrogate.backward import Branch, Guidance, backward, branches
from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.training import adapter


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
    before_last: Callable[[], object] | None = None,
) -> None:
    """Add this micro-batch's share of the loss gradient to the ``.grad`` of what is trained.

    The loss is ``−mean(weight · J)`` over the reward inputs of ``batch`` samples, of which these are some. ``gradients[m]``
    is the objective's gradient at reward input ``m``, ``weights (B,)`` are the samples' weights, ``copies`` the plan's noised
    ones. ``guidance_scale`` is what embedded guidance is given; ``guidance`` has no second branch then.
    The penalty is ``velocity_penalty`` times the mean squared distance of the conditional velocity to the one without
    the adapter, averaged over the plan's active velocities too: it weighs the same whatever their number.
    ``before_last`` is called before the last velocity of all is evaluated with gradient.
    """
    adapted = adapter.layers(backbone.transformer) if velocity_penalty else []
    left = len(plan.active) * len(branches(plan, guidance))

    def velocity(x: Tensor, index: int, branch: Branch) -> Tensor:
        nonlocal left
        left -= torch.is_grad_enabled()
        if left == 0 and before_last is not None:
            before_last()
        text = conditioning if branch == "conditional" else negative.expand(len(x))
        return backbone.branch(x, sigmas[index], text, guidance_scale)

    def towards_base(current: Tensor, x: Tensor, index: int) -> Tensor:
        with adapter.off(adapted):
            reference = velocity(x, index, "conditional")
        return 2 * velocity_penalty / (batch * len(plan.active) * current[0].numel()) * (current - reference)

    shape = (-1, *[1] * (gradients[0].ndim - 1))
    cotangents = [-(weights / (batch * len(gradients))).view(shape) * g for g in gradients]
    local = towards_base if velocity_penalty else None
    backward(plan, velocity, latents, cotangents, guidance=guidance, copies=copies, local=local)
