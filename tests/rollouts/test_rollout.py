from itertools import pairwise

import numpy as np
import pytest
import torch

from flowbp_ray.rollouts.rollout import roll_out
from flowbp_ray.surrogate.methods import METHODS

SIGMAS = torch.linspace(1, 0, 9, dtype=torch.float64)
NOISE = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def velocity(x, sigma):
    return torch.tanh(x) * (1 + sigma)


def trajectory():
    latents, velocities = [NOISE], []
    for sigma, following in pairwise(SIGMAS):
        velocities.append(velocity(latents[-1], sigma))
        latents.append(latents[-1] + (following - sigma) * velocities[-1])
    return latents, velocities


@pytest.mark.parametrize(
    ("method", "settings"), [("sparse", {}), ("refl", {"last_n_steps": 8}), ("leapalign", {}), ("lagrange", {})]
)
def test_it_keeps_what_the_plan_needs_and_no_more(method, settings):
    latents, velocities = trajectory()
    for seed in range(5):
        plan = METHODS[method].plan(METHODS[method].settings(**settings), SIGMAS, np.random.default_rng(seed))
        rollout = roll_out(NOISE, SIGMAS, velocity, plan)
        assert tuple(rollout.latents) == plan.latents_needed
        assert tuple(rollout.velocities) == plan.velocities_needed
        for i, x in rollout.latents.items():
            torch.testing.assert_close(x, latents[i], rtol=0, atol=1e-12)
        for i, v in rollout.velocities.items():
            torch.testing.assert_close(v, velocities[i], rtol=0, atol=1e-12)


def test_it_stops_where_the_plan_needs_no_more():
    calls = []

    def counted(x, sigma):
        calls.append(float(sigma))
        return velocity(x, sigma)

    plan = METHODS["refl"].plan(METHODS["refl"].settings(last_n_steps=8), SIGMAS, np.random.default_rng(1))
    roll_out(NOISE, SIGMAS, counted, plan)
    assert len(calls) == plan.last_index + 1 < 8


def test_a_grid_of_another_length_is_refused():
    plan = METHODS["sparse"].plan(METHODS["sparse"].settings(), SIGMAS, np.random.default_rng(0))
    with pytest.raises(ValueError, match="8 steps but the grid has 7"):
        roll_out(NOISE, SIGMAS[:-1], velocity, plan)
