"""Weights of velocities on a sigma grid: Euler steps, leaps and Lagrange interpolants, all in float64."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Grid(Protocol):
    """A torch tensor or numpy array of sigmas ``(T + 1,)``; methods need no more of it, and so no torch."""

    def tolist(self) -> Any:
        """The values."""

    def __len__(self) -> int:
        """T + 1."""


def checked_grid(sigmas: Grid) -> np.ndarray:
    """The grid ``(T + 1,)`` in float64. ValueError unless it falls strictly and ends at 0."""
    grid = np.array(sigmas.tolist(), np.float64)
    if grid.ndim != 1 or len(grid) < 2 or not np.all(np.diff(grid) < 0) or grid[-1] != 0:
        raise ValueError(f"sigmas {grid.tolist()} are no grid: at least two values that fall strictly and end at 0 are needed")
    return grid


def supports(start: int, target: int, order: int) -> tuple[int, ...]:
    """At most ``order`` indices spread evenly over ``[start, target)``, the start first (FlowBP-Lagrange)."""
    length = target - start
    if length <= order:
        return tuple(range(start, target))
    positions = np.rint(np.linspace(0, length - 1, order)).astype(int)
    return tuple(start + int(p) for p in np.unique(positions))


def lagrange_weights(grid: np.ndarray, start: int, target: int, points: Sequence[int]) -> tuple[float, ...]:
    """``∫ ℓ_m(σ) dσ`` from σ_start to σ_target for each of ``points``; one point gives the leap σ_target − σ_start.

    By a Gauss-Legendre rule of just the degree that is exact for the interpolant, which stays accurate where
    expanding the polynomials would cancel.
    """
    nodes, node_weights = np.polynomial.legendre.leggauss((len(points) + 1) // 2)
    half = (grid[target] - grid[start]) / 2
    at = grid[start] + half * (nodes + 1)
    sigmas = grid[list(points)]
    weights = []
    for m, sigma in enumerate(sigmas):
        others = np.delete(sigmas, m)
        basis = np.prod((at[:, None] - others) / (sigma - others), axis=1)
        weights.append(float(half * node_weights @ basis))
    return tuple(weights)


def rescale_factor(strength: float, weights: Sequence[float] | np.ndarray, active: Sequence[float] | np.ndarray) -> float:
    """``1 + ρ·(Σ|weights| / Σ|active| − 1)``: how much active velocities stand in for the inactive ones.

    Active weights that sum to less than 1e-8 can stand in for nothing; they are left as they are.
    """
    total = float(np.abs(active).sum())
    return 1.0 if total < 1e-8 else 1 + strength * (float(np.abs(weights).sum()) / total - 1)


def stopped_grid(grid: np.ndarray, stop: int) -> np.ndarray:
    """The grid of a posterior mean at ``stop``: its ``x − σ v`` is an Euler step from σ_stop straight to 0."""
    return np.append(grid[: stop + 1], 0.0)
