"""Every published recipe resolves, wherever it is placed and whatever the size, and plans; tests/backbones builds the models."""

from pathlib import Path

import numpy as np
import pytest

from flowbp_ray.backbones.published import PUBLISHED
from flowbp_ray.config import load
from flowbp_ray.rollouts.plans import plan_of
from flowbp_ray.surrogate.methods import METHODS

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(p for name in PUBLISHED for p in (CONFIGS / name).glob("*.yaml"))
PLACEMENTS = sorted((CONFIGS / "placement").glob("*.yaml"))
SIZES = [(512, 512), (1024, 1024), (1344, 768)]
SEVEN = ("refl", "draft_lv", "drtune", "leapalign", "sparse", "bridge", "lagrange")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red ring\n", encoding="utf-8")
    return [f"prompts.path={file}", f"evaluation.prompts={file}"]


def test_all_methods_and_the_adapter_variants_are_there():
    assert set(SEVEN) <= set(METHODS)
    for name in PUBLISHED:
        found = {p.stem for p in RECIPES if p.parent.name == name}
        assert found == {*SEVEN, "sparse_adapter", "bridge_adapter", "lagrange_adapter"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_recipe_resolves_and_plans(recipe, prompts):
    for placement in [None, *PLACEMENTS]:
        config = load(recipe, prompts, [] if placement is None else [placement])
        assert config.model.source == PUBLISHED[recipe.parent.name].id
        assert config.surrogate.method == recipe.stem.removesuffix("_adapter")
        assert (config.adapter is not None) == recipe.stem.endswith("_adapter")
        gpus = {None: 8, "cluster": 16}.get(placement and placement.stem, 1)
        assert config.reserved()["GPU"] == pytest.approx(gpus)
        cluster = config.cluster
        if gpus > 1:  # Ray puts parts of GPUs onto as few as it can, so only whole ones are where they are meant to be
            assert all(part == round(part) for part in (cluster.sampler_gpus, cluster.trainer_gpus, cluster.reward_gpus))
        for height, width in SIZES:
            assert load(recipe, [*prompts, f"sampling.height={height}", f"sampling.width={width}"]).sampling.height == height
    for step in range(20):
        plan = plan_of(config, np.linspace(1, 0, 26), step)
        assert plan.steps == 25
        assert np.isfinite([a.coefficient for a in plan.active]).all()
