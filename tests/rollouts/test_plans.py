from pathlib import Path

import torch

from flowbp_ray.config import load
from flowbp_ray.rollouts.plans import plan_of

RECIPE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
SIGMAS = torch.linspace(1, 0, 13)


def test_the_plan_is_a_function_of_configuration_seed_and_step():
    config = load(RECIPE, ["surrogate.active_steps=3"])
    plans = [plan_of(config, SIGMAS, step) for step in range(20)]
    assert plans == [plan_of(config, SIGMAS, step) for step in range(20)]
    assert all(len(p.active) == 3 and p.steps == 12 and p.method == "sparse" for p in plans)
    assert len({tuple(a.index for a in p.active) for p in plans}) > 10
    assert plans != [plan_of(load(RECIPE, ["surrogate.active_steps=3", "train.seed=1"]), SIGMAS, step) for step in range(20)]


def test_late_indices_come_more_often():
    config = load(RECIPE, ["surrogate.late_bias=4"])
    indices = [a.index for step in range(100) for a in plan_of(config, SIGMAS, step).active]
    assert sum(i >= 6 for i in indices) > 3 * sum(i < 6 for i in indices)
