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
