"""The surrogates' sections against the engine's own settings."""

import pickle

import numpy as np
import pytest

from flowbp_ray.config import dump, load
from flowbp_ray.config.surrogates import SECTIONS
from flowbp_ray.surrogate.methods import METHODS

CHOICES = {
    "truncated": {"active_steps": 3},
    "composed": {"reward_input": "sampled", "active": "last", "weights": "euler", "bridge": "none", "active_steps": 2},
    "bridge": {"pair": {"rule": "dirichlet", "concentration": [1, 2, 3], "cap": 4}},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_section_that_survives_a_dump_and_a_pickle(method, tmp_path):
    file = tmp_path / "a.yaml"
    settings = {"method": method, **CHOICES.get(method, {})}
    file.write_text(
        f"model: {{path: shapes}}\nprompts: {{path: shapes}}\nsurrogate: {settings}\n"
        "reward: {components: [{name: a, path: shapes/reward, weight: 1}]}\n"
    )
    config = load(file, [])
    file.write_text(dump(config))
    assert load(file, []) == config == pickle.loads(pickle.dumps(config))
    grid = np.linspace(1, 0, 13)
    plan = config.surrogate.plan(grid, np.random.default_rng(3))
    assert plan == METHODS[method].plan(config.surrogate.settings(), grid, np.random.default_rng(3))
    if method not in CHOICES:
        assert config.surrogate.settings() == METHODS[method].settings()


def test_the_sections_are_the_methods():
    assert list(SECTIONS) == list(METHODS)


def test_the_four_choices_make_a_plan_without_naming_a_method(tmp_path):
    """An endpoint, 6 late-biased active steps, Lagrange weights on the last leg, a bridge at alpha 0.2."""
    file = tmp_path / "own.yaml"
    file.write_text(
        "model: {path: shapes}\nprompts: {path: shapes}\nreward: {components: [{name: a, path: shapes/reward, weight: 1}]}\n"
        "surrogate:\n  method: composed\n  reward_input: sampled\n  active: late_biased\n  active_steps: 6\n  late_bias: 1\n"
        "  weights: lagrange_last_leg\n  bridge: drawn\n  alpha: 0.2\n  pair: {rule: uniform}\n"
    )
    plan = load(file, []).surrogate.plan(np.linspace(1, 0, 13), np.random.default_rng(0))
    (bridge,) = plan.bridges
    assert (len(plan.active), bridge.alpha, plan.last_index) == (6, 0.2, 12)
    last = [a.coefficient for a in plan.active if a.index >= bridge.index]
    assert sum(last) == pytest.approx(bridge.index / 12 - 1)
