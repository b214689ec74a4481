"""The objective ``J = Σ_m weight_m · min(r_m, clip_m)`` and its gradient at the latents.

Decode once, score by every component, pull the weighted sum back through the decoder once. A component of
weight 0 is scored and reported, and costs no gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Score = Callable[[Tensor, list[str]], Tensor]


@dataclass(frozen=True)
class Component:
    """One reward: ``score`` takes pictures ``(B, 3, H, W)`` in 0…1 and prompts, and gives ``(B,)``."""

    name: str
    score: Score
    weight: float
    clip: float | None = None


@dataclass(frozen=True)
class Scored:
    """Scores by component and objective, ``(B,)`` each, and the objective's gradient at the latents."""

    components: dict[str, Tensor]
    objective: Tensor
    gradient: Tensor


class DeadRewardError(RuntimeError):
    """A reward gave a value or a gradient that is not finite; it is never taken for 0."""


def objective(latents: Tensor, prompts: list[str], decode: Callable[[Tensor], Tensor], components: Sequence[Component]) -> Scored:
    """Score ``latents (B, C, h, w)`` and differentiate; samples are independent, so one pull-back serves all.

    Raises DeadRewardError naming the component and the prompts where something is not finite.
    """
    inputs = latents.detach().requires_grad_()
    with torch.enable_grad():
        pictures = decode(inputs)
        scores = {c.name: scored(c, pictures, prompts) for c in components}
        weighted = [c.weight * (scores[c.name] if c.clip is None else scores[c.name].clamp(max=c.clip)) for c in components]
        total = torch.stack(weighted).sum(0)
        (gradient,) = torch.autograd.grad(total.sum(), inputs)
    if not torch.isfinite(gradient).all():
        odd = [p for p, g in zip(prompts, gradient, strict=True) if not torch.isfinite(g).all()]
        names = ", ".join(c.name for c in components if c.weight)
        raise DeadRewardError(f"the gradient of the objective ({names}) is not finite for the prompts {odd}")
    return Scored({k: v.detach() for k, v in scores.items()}, total.detach(), gradient)


def scored(component: Component, pictures: Tensor, prompts: list[str]) -> Tensor:
    """One component's scores ``(B,)``; ValueError for another shape or where nothing can be differentiated, DeadRewardError
    where one is not finite."""
    differentiated = torch.is_grad_enabled() and component.weight != 0
    with torch.set_grad_enabled(differentiated):
        scores = component.score(pictures if component.weight else pictures.detach(), prompts)
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"the reward {component.name!r} gave {tuple(scores.shape)} for {len(prompts)} pictures, not one value each"
        )
    if differentiated and not scores.requires_grad:  # autograd would take its gradient for 0
        raise ValueError(f"the reward {component.name!r} has no gradient at the pictures: only with weight 0 can it be watched")
    if not torch.isfinite(scores).all():
        odd = [p for p, s in zip(prompts, scores, strict=True) if not torch.isfinite(s)]
        raise DeadRewardError(f"the reward {component.name!r} is not finite for the prompts {odd}")
    return scores
