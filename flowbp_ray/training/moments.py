"""What can be seen of a method's expected gradient through the noise of few draws, beside the exact one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Of gradients with P parameters over a method's draws, one row each."""

    #: ``(rows, P)`` in float64.
    mean: Tensor
    #: ``(rows,)``: mean of the squared norm.
    squares: Tensor
    draws: int

    @property
    def variance(self) -> Tensor:
        """``E|g − E g|²`` ``(rows,)``, without the bias of few draws; exactly 0 where nothing is drawn."""
        if self.draws == 1:
            return torch.zeros_like(self.squares)
        return (self.squares - self.mean.square().sum(1)).clamp(min=0) * self.draws / (self.draws - 1)

    @property
    def expected(self) -> Tensor:
        """``|E g|`` ``(rows,)``: the mean of few draws is longer by its noise, which is taken away. NaN if nothing is left."""
        return (self.mean.square().sum(1) - self.variance / self.draws).sqrt()

    def angles(self, exact: Tensor) -> Tensor:
        """Degrees between ``E g`` and ``exact (rows, P)``; NaN where noise is all there is to see, or more than there is."""
        cosines = (self.mean * exact).sum(1) / (self.expected * exact.norm(dim=1))
        return torch.where(cosines.abs() < 1 + 1e-6, torch.rad2deg(torch.acos(cosines.clamp(-1, 1))), math.nan)


@dataclass(frozen=True)
class Drawn:
    """A method's gradients over its draws."""

    #: A row for each of N samples, and a last one for their mean.
    moments: Moments
    #: The gradient of the samples' mean for each of K plans that are not the same, ``(K, P)``, and how often each was drawn.
    means: Tensor
    times: list[int]

    def without(self, plan: int) -> Moments:
        """Of the samples' mean, with one draw of a plan left out."""
        all_of, left = self.moments, self.moments.draws - 1
        mean = ((left + 1) * all_of.mean[-1:] - self.means[plan : plan + 1]) / left
        return Moments(mean, ((left + 1) * all_of.squares[-1:] - self.means[plan].square().sum()) / left, left)


@dataclass(frozen=True)
class Comparison:
    """A method's expected gradient beside the exact one; NaN where the draws are too few to see it through their noise."""

    #: Degrees between the means over all samples.
    angle: float
    #: Its standard error, of samples and draws together.
    angle_error: float
    #: Degrees, median over samples: what holds for most, where a few that explode decide about the mean.
    sample_angle: float
    #: How many samples the median is of; noise hides the others' angle.
    samples_seen: int
    #: Of the means, in units of the exact one's, with its standard error; then the median of the samples' own.
    norm: float
    norm_error: float
    sample_norm: float
    #: ``E|g − E g|² / |E g|²`` of the mean over samples.
    variance: float
    #: How many different plans were drawn.
    plans: int


def compare(drawn: Drawn, exact: Tensor) -> Comparison:
    """A method's gradients beside the exact ones ``(N + 1, P)``."""
    moments, number, draws = drawn.moments, len(exact) - 1, drawn.moments.draws
    angles, ratios = moments.angles(exact), moments.expected / exact.norm(dim=1)
    # Jackknife: what leaving out each sample, and each draw, does to angle and norm of the mean.
    samples = [
        _seen(moments.mean[-1] - one / number, exact[-1] - two / number)
        for one, two in zip(moments.mean[:-1], exact[:-1], strict=True)
    ]
    plans = []
    for k, times in enumerate(drawn.times):
        left = drawn.without(k)
        plans += [torch.stack([left.angles(exact[-1:])[0], left.expected[0] / exact[-1].norm()])] * times
    jackknifed = [(n - 1) * torch.stack(rows).var(0, correction=0) for rows, n in ((samples, number), (plans, draws))]
    angle_error, norm_error = (jackknifed[0] + jackknifed[1]).sqrt().tolist()
    return Comparison(
        angle=angles[-1].item(),
        angle_error=angle_error,
        sample_angle=angles[:-1].nanquantile(0.5).item(),
        samples_seen=int(angles[:-1].isfinite().sum()),
        norm=ratios[-1].item(),
        norm_error=norm_error,
        sample_norm=ratios[:-1].nanquantile(0.5).item(),
        variance=(moments.variance[-1] / moments.expected[-1] ** 2).item(),
        plans=len(drawn.times),
    )


def _seen(one: Tensor, two: Tensor) -> Tensor:
    """Degrees between two vectors, and the first one's norm in units of the second one's: ``(2,)``."""
    angle = torch.rad2deg(torch.acos(torch.cosine_similarity(one, two, dim=0).clamp(-1, 1)))
    return torch.stack([angle, one.norm() / two.norm()])
