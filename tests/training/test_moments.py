"""What few draws show of an expectation, where it is known."""

import math

import pytest
import torch

from flowbp_ray.training.moments import Drawn, Moments, compare


def known(noise, draws, seed):
    """Draws of ``E g = (3, 4, 0, …)`` with normal noise, as K = draws plans of one sample."""
    expected = torch.zeros(50, dtype=torch.float64)
    expected[:2] = torch.tensor([3.0, 4.0])
    generator = torch.Generator().manual_seed(seed)
    rows = expected + noise * torch.randn(draws, 50, generator=generator, dtype=torch.float64)
    moments = Moments(rows.mean(0).expand(2, -1), rows.square().sum(1).mean().expand(2), draws)
    return Drawn(moments, rows, [1] * draws)


def test_the_noise_of_few_draws_biases_neither_norm_nor_variance_nor_angle():
    exact = torch.zeros(2, 50, dtype=torch.float64)
    exact[:, 0] = 2.0
    several = [compare(known(0.8, 8, seed), exact) for seed in range(100)]
    assert sum(c.norm for c in several) / 100 == pytest.approx(2.5, rel=0.02)
    assert sum(c.angle for c in several) / 100 == pytest.approx(53.13, abs=1.0)  # of (3, 4) to the first axis
    assert sum(c.variance for c in several) / 100 == pytest.approx(50 * 0.8**2 / 25, rel=0.05)
    spread = torch.tensor([c.angle for c in several]).std().item()
    assert sum(c.angle_error for c in several) / 100 == pytest.approx(spread, rel=0.3)


def test_errors_of_few_samples_are_the_spread_over_many_sets_of_them():
    """Nothing is drawn here: all that differs between the sets is which samples they have."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.zeros(2, 6, dtype=torch.float64)
    ours[:2], theirs[:1] = torch.tensor([3.0, 4.0]), 2.0
    compared = []
    for _ in range(200):
        one, two = (mean + 0.5 * torch.randn(12, 6, generator=generator, dtype=torch.float64) for mean in (ours, theirs))
        one, exact = (torch.cat([rows, rows.mean(0, keepdim=True)]) for rows in (one, two))
        compared.append(compare(Drawn(Moments(one, one.square().sum(1), 4), one[-1:], [4]), exact))
    for kind in ("angle", "norm"):
        values, errors = (torch.tensor([vars(c)[k] for c in compared]) for k in (kind, f"{kind}_error"))
        assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.15)
    assert {c.samples_seen for c in compared} == {12}


def test_what_noise_hides_is_not_given_a_number():
    exact = torch.zeros(2, 50, dtype=torch.float64)
    exact[:, 0] = 2.0
    angles = [compare(known(100.0, 2, seed), exact).angle for seed in range(20)]
    assert any(math.isnan(a) for a in angles)
