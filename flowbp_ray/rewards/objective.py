"""The objective ``J = Σ_m weight_m · min(r_m, clip_m)`` and its gradient at the latents.

Decode once, have every component score the pictures and differentiate its own part at them, add these gradients up, and pull the
sum back through the decoder once. A component of weight 0 is scored and reported, and costs no gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowbp_ray.errors import DeadRewardError

Score = Callable[[Tensor, list[str]], Tensor]


@dataclass(frozen=True)
class Graded:
    """A component's ``scores (B,)``, and the gradient of ``weight · min(score, clip)`` at the pictures ``(B, 3, H, W)``; None for
    weight 0."""

    scores: Tensor
    gradient: Tensor | None


class Part(Protocol):
    """A component of an objective, wherever it is scored."""

    name: str
    weight: float
    clip: float | None

    def start(self, pictures: Tensor, prompts: list[str]) -> Callable[[], Graded]:
        """Begin to score pictures ``(B, 3, H, W)`` in 0…1; what is called for the answer waits for it."""


@dataclass
class Component:
    """One reward, in this process: ``score`` takes pictures ``(B, 3, H, W)`` in 0…1 and prompts, and gives ``(B,)``."""

    name: str
    score: Score
    weight: float
    clip: float | None = None

    def start(self, pictures: Tensor, prompts: list[str]) -> Callable[[], Graded]:
        """As of all parts; here the work is done when the answer is asked for, while others are at theirs elsewhere."""
        return lambda: self.grade(pictures, prompts)

    def grade(self, pictures: Tensor, prompts: list[str]) -> Graded:
        """Score and differentiate.

        ValueError for scores of another shape than ``(B,)``, or where nothing can be differentiated; DeadRewardError, with the
        prompts, where something is not finite.
        """
        inputs = pictures.detach().requires_grad_(self.weight != 0)
        with torch.set_grad_enabled(self.weight != 0):
            scores = self.score(inputs, prompts)
        if scores.shape != (len(prompts),):
            raise ValueError(
                f"the reward {self.name!r} gave {tuple(scores.shape)} for {len(prompts)} pictures, not one value each"
            )
        finite(scores, prompts, f"the reward {self.name!r}")
        if self.weight == 0:
            return Graded(scores, None)
        if not scores.requires_grad:  # autograd would take its gradient for 0
            raise ValueError(f"the reward {self.name!r} has no gradient at the pictures: only with weight 0 can it be watched")
        total = (self.weight * bounded(scores, self.clip)).sum()
        (gradient,) = torch.autograd.grad(total, inputs)
        finite(gradient, prompts, f"the gradient of the reward {self.name!r}")
        return Graded(scores.detach(), gradient)


@dataclass(frozen=True)
class Scored:
    """Scores by component and objective, ``(B,)`` each, and the objective's gradient at the latents."""

    components: dict[str, Tensor]
    objective: Tensor
    gradient: Tensor


def objective(latents: Tensor, prompts: list[str], decode: Callable[[Tensor], Tensor], components: Sequence[Part]) -> Scored:
    """Score ``latents (B, C, h, w)`` and differentiate; samples are independent, so one pull-back serves all.

    Raises DeadRewardError naming the component and the prompts where something is not finite.
    """
    inputs = latents.detach().requires_grad_()
    with torch.enable_grad():
        pictures = decode(inputs)
    graded = graded_by(components, pictures.detach(), prompts)
    at_pictures = [g.gradient for g in graded.values() if g.gradient is not None]
    total = torch.stack([c.weight * bounded(g.scores, c.clip) for c, g in zip(components, graded.values(), strict=True)]).sum(0)
    if not at_pictures:  # a schedule may leave a step without objective
        return Scored({name: g.scores for name, g in graded.items()}, total, torch.zeros_like(latents))
    (gradient,) = torch.autograd.grad(pictures, inputs, sum(at_pictures[1:], at_pictures[0]))
    finite(gradient, prompts, f"the gradient of the objective ({', '.join(c.name for c in components if c.weight)})")
    return Scored({name: g.scores for name, g in graded.items()}, total, gradient)


def graded_by(components: Sequence[Part], pictures: Tensor, prompts: list[str]) -> dict[str, Graded]:
    """All components' answers by name: each is begun before any is waited for."""
    begun = {c.name: c.start(pictures, prompts) for c in components}
    return {name: answer() for name, answer in begun.items()}


def bounded(scores: Tensor, clip: float | None) -> Tensor:
    """``min(score, clip)``."""
    return scores if clip is None else scores.clamp(max=clip)


def finite(values: Tensor, prompts: list[str], what: str) -> None:
    """DeadRewardError, naming ``what`` and the prompts, unless the values ``(B, …)`` are finite."""
    if not torch.isfinite(values).all():
        odd = [p for p, v in zip(prompts, values, strict=True) if not torch.isfinite(v).all()]
        raise DeadRewardError(f"{what} is not finite for the prompts {odd}")
