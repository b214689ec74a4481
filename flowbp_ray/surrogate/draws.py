"""The random draws that methods share: late-biased and evenly spaced indices, the tail window, the (k, j) pair.

Forward indices count from pure noise; *reverse* indices ``T − i`` count from the finished latent, as in the paper.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flowbp_ray.surrogate.checks import count, one_of, positive, require


def window_start(steps: int, tail: float | None, least: int = 1) -> int:
    """First index of the tail window, the last ``⌈tail·T⌉`` indices and no fewer than ``least`` (of those there are).

    None is no window: index 0.
    """
    if tail is None:
        return 0
    length = math.ceil(round(tail * steps, 9))  # 0.07 · 100 is a little above 7 in floating point
    return steps - min(max(length, least), steps)


def late_biased(start: int, stop: int, number: int, bias: float, origin: int, generator: np.random.Generator) -> list[int]:
    """``number`` distinct indices of ``[start, stop)``, in order, without replacement, odds ∝ ``(i − origin + 1)^bias``.

    Drawn as the top keys log(odds) + Gumbel, which is the same distribution and does not underflow for a large
    bias. ValueError where there are fewer than ``number``.
    """
    require(number <= stop - start, "active_steps", number, f"at most {stop - start}, the number of indices to draw from")
    indices = np.arange(start, stop)
    keys = bias * np.log(indices - origin + 1) + generator.gumbel(size=len(indices))
    chosen = np.argsort(-keys)[:number]
    return sorted(int(i) for i in indices[chosen])


def one_of_the_last(number: int, steps: int, generator: np.random.Generator) -> int:
    """An index drawn uniformly from the last ``number`` of ``steps``: where a posterior mean is taken."""
    return steps - int(generator.integers(1, number + 1))


def evenly_spaced(length: int, number: int, generator: np.random.Generator) -> list[int]:
    """``min(number, length)`` indices of ``[0, length)`` at the same distance, from a uniform offset (DRTune)."""
    number = min(number, length)
    stride = length // number
    offset = int(generator.integers(length - (number - 1) * stride))
    return [offset + m * stride for m in range(number)]


@dataclass(frozen=True)
class PairDraw:
    """How two steps k and j, k before j, are drawn. Bounds count steps to the end: the last step has 1."""

    #: ``uniform``: any two; ``dirichlet``: three parts of random lengths, after j, between k and j, and before k;
    #: ``midpoint``: k is uniform, j halfway from k to the end; ``midpoint_j``: j is uniform, k halfway from the start to j.
    rule: Literal["uniform", "dirichlet", "midpoint", "midpoint_j"] = "uniform"
    #: For ``dirichlet``, its parameters of these three parts: larger is longer on average.
    concentration: tuple[float, float, float] | None = None
    #: Most steps from j to the end, or null; for ``uniform`` and ``dirichlet``.
    cap: int | None = None
    #: Fewest steps from j to the end; for ``midpoint`` from the step after k instead.
    min_idx: int = 1
    #: k has fewer steps than this to the end, or null: any; for ``midpoint_j`` the step before j has instead.
    max_idx: int | None = None

    def __post_init__(self) -> None:
        one_of("pair rule", self.rule, ("uniform", "dirichlet", "midpoint", "midpoint_j"))
        count("min_idx", self.min_idx)
        if self.max_idx is not None:
            count("max_idx", self.max_idx, self.min_idx + self._needed)
        if self.cap is not None:
            allowed = f"null under the rule {self.rule}, which has no cap" if "midpoint" in self.rule else ""
            require("midpoint" not in self.rule, "cap", self.cap, allowed)
            count("cap", self.cap, self.min_idx + (1 if self.rule == "dirichlet" else 0))  # the least that j_rev can be
        if self.rule == "dirichlet":
            require(
                self.concentration is not None and len(self.concentration) == 3,
                "concentration",
                self.concentration,
                "three numbers for the rule dirichlet",
            )
            for value in self.concentration or ():
                positive("concentration", value)
        else:
            require(self.concentration is None, "concentration", self.concentration, f"null under the rule {self.rule}")

    @property
    def _needed(self) -> int:
        return 3 if self.rule == "dirichlet" else 2

    def bounds(self, steps: int, tail: float | None) -> tuple[int, int]:
        """Reverse indices ``[min_idx, max_idx)`` on a grid of ``steps``. ValueError where they are too few to draw from."""
        end = steps - window_start(steps, tail, least=3) + 1
        end = end if self.max_idx is None else min(self.max_idx, end)
        if end - self.min_idx < self._needed:
            raise ValueError(
                f"no (k, j) to draw: {steps} steps, tail {tail}, min_idx {self.min_idx} and max_idx {self.max_idx} leave "
                f"{max(end - self.min_idx, 0)} reverse indices, but the rule {self.rule} needs {self._needed}"
            )
        return self.min_idx, end

    def draw(self, steps: int, tail: float | None, generator: np.random.Generator) -> tuple[int, int]:
        """Forward indices ``0 ≤ k < j < steps``."""
        low, end = self.bounds(steps, tail)
        match self.rule:
            case "uniform":
                if self.cap is None:
                    j_rev, k_rev = sorted(generator.choice(np.arange(low, end), 2, replace=False))
                else:
                    j_rev = generator.integers(low, min(self.cap, end - 2) + 1)
                    k_rev = generator.integers(j_rev + 1, end)
            case "dirichlet":
                first, second = self._lengths(low, end, generator)
                j_rev, k_rev = low + first, low + first + second
            case "midpoint":
                k_rev = generator.integers(low + 1, end)
                j_rev = min(k_rev - 1, steps - (2 * steps - k_rev) // 2)
            case "midpoint_j":
                j_rev = generator.integers(low, end - 1)
                k_rev = steps - (steps - j_rev) // 2
        return steps - int(k_rev), steps - int(j_rev)

    def _lengths(self, low: int, end: int, generator: np.random.Generator) -> tuple[int, int]:
        """Lengths of the parts after j and between k and j, of ``end − low`` reverse indices."""
        shares = generator.dirichlet(np.array(self.concentration, np.float64))
        lengths = np.rint(shares * (end - low)).astype(int)
        lengths[shares.argmax()] += end - low - lengths.sum()
        lengths = np.maximum(lengths, 1)
        lengths[lengths.argmax()] += end - low - lengths.sum()
        first = int(lengths[0])
        if self.cap is not None:
            first = min(first, self.cap - low)
        return first, int(lengths[1])


UNIFORM = PairDraw()
