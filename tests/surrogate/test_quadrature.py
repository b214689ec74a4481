"""Supports and weights: exact for polynomials of the interpolant's order, and in sum a leap."""

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbp_ray.surrogate.quadrature import checked_grid, lagrange_weights, rescale_factor, stopped_grid, supports


@st.composite
def legs(draw):
    levels = np.cumsum([0.0, *draw(st.lists(st.floats(0.2, 1), min_size=2, max_size=25))])
    grid = levels[::-1] / levels[-1]
    start = draw(st.integers(0, len(grid) - 2))
    return grid, start, draw(st.integers(start + 1, len(grid) - 1)), draw(st.integers(1, 5))


@settings(max_examples=100, deadline=None)
@given(legs(), st.lists(st.floats(-1, 1), min_size=5, max_size=5))
def test_weights_integrate_polynomials_and_sum_to_the_leap(leg, coefficients):
    grid, start, target, order = leg
    points = supports(start, target, order)
    weights = np.array(lagrange_weights(grid, start, target, points))
    polynomial = np.polynomial.Polynomial(coefficients[: len(points)])
    whole = polynomial.integ()
    exact = whole(grid[target]) - whole(grid[start])
    scale = np.abs(weights).sum()
    assert abs(weights @ polynomial(grid[list(points)]) - exact) <= 1e-12 * scale * 5
    assert abs(weights.sum() - (grid[target] - grid[start])) <= 1e-12 * scale
    np.testing.assert_allclose(weights, literal.integrals(grid, points, start, target), atol=1e-9 * scale)


@settings(max_examples=100, deadline=None)
@given(legs())
def test_supports(leg):
    _, start, target, order = leg
    points = supports(start, target, order)
    assert list(points) == literal.spread(start, target, order)
    assert points[0] == start
    assert points[-1] < target


def test_known_weights():
    grid = np.array([1.0, 0.5, 0.0])
    assert lagrange_weights(grid, 0, 2, (0,)) == pytest.approx((-1.0,))
    assert lagrange_weights(grid, 0, 2, (0, 1)) == pytest.approx((0.0, -1.0))  # the midpoint rule
    assert supports(0, 25, 3) == (0, 12, 24)
    assert supports(3, 9, 3) == (3, 5, 8)  # 2.5 rounds to 2
    assert supports(4, 6, 3) == (4, 5)


def test_rescale():
    assert rescale_factor(0.0, (1.0, -1.0), (1.0,)) == 1
    assert rescale_factor(1.0, (1.0, -1.0), (1.0,)) == 2
    assert rescale_factor(0.5, (1.0, -1.0), (1.0,)) == 1.5
    assert rescale_factor(1.0, (0.0, -1.0), (0.0,)) == 1  # nothing that could stand in


def test_grids():
    assert checked_grid(torch.tensor([1.0, 0.25, 0.0])).tolist() == [1.0, 0.25, 0.0]
    assert stopped_grid(np.array([1.0, 0.5, 0.25, 0.0]), 1).tolist() == [1.0, 0.5, 0.0]
    for wrong in ([1.0], [0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.5], [1.0, float("nan"), 0.0]):
        with pytest.raises(ValueError, match="are no grid"):
            checked_grid(torch.tensor(wrong))
