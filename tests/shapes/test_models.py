"""The committed models: small, loadable, as good as their card says, and the card says what was measured."""

import json
from functools import partial

import pytest
import torch

from flowbp_ray.backbones.sd3 import SD3Backbone
from flowbp_ray.rewards.clip import CLIPScore
from flowbp_ray.shapes import BASE, JUDGE, MODELS, REWARD
from flowbp_ray.shapes.build import card
from flowbp_ray.shapes.build.measure import PAIRS, STEPS, measure_checker, measure_preferences
from flowbp_ray.shapes.captions import TASKS, evaluation_prompts
from flowbp_ray.shapes.evaluation import judge, six_tasks
from flowbp_ray.shapes.preferences import ATTRIBUTES

FIGURES = json.loads((MODELS / "measured.json").read_text())


@pytest.fixture(scope="module")
def base():
    return SD3Backbone.from_pretrained(BASE)


def test_twenty_megabytes_together_and_nothing_that_is_pickled():
    files = [f for f in MODELS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 20e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".md"}


def test_the_card_is_the_one_that_the_figures_give():
    history = json.loads((MODELS / "training.json").read_text())
    assert (MODELS / "README.md").read_text() == card.card(FIGURES, history)


def test_the_checker_reads_what_the_autoencoder_gives_back(base):
    assert measure_checker(base, number=300)["round_trip"] >= 0.98


@pytest.mark.parametrize("folder", [REWARD, JUDGE], ids=lambda f: f.name)
def test_comparisons_are_decided_as_the_card_says(folder):
    shares = measure_preferences(CLIPScore(folder), number=100, seed=12)  # other pairs than the card's
    stated = FIGURES[f"comparisons_{folder.name}"]
    assert stated["overall"] >= 0.9
    assert min(stated[kind] for kind in ATTRIBUTES) >= 0.85
    for kind, share in shares.items():  # four standard errors of the difference, and a little for shares near 1
        number = 200 if kind == "overall" else 100
        error = (stated[kind] * (1 - stated[kind]) * (1 / number + 1 / PAIRS)) ** 0.5
        assert share == pytest.approx(stated[kind], abs=4 * error + 0.02), kind


def test_the_base_is_as_good_as_its_card_says(base):
    sample = partial(base.sample, steps=STEPS, guidance_scale=FIGURES["best_guidance"], height=64, width=64)
    scores = six_tasks(judge(sample, evaluation_prompts(30, seed=1)))  # other prompts and pictures than the card's
    stated = FIGURES["six_tasks"]["mean"]
    spread = (scores["mean"].error ** 2 + stated["error"] ** 2) ** 0.5
    assert scores["mean"].value == pytest.approx(stated["value"], abs=4 * spread)


def test_plain_diffusers_makes_the_same_pictures(base, plain_diffusers):
    prompts, seeds = ["a red ring above a cross", "three circles"], [1, 2]
    sampling = {"steps": STEPS, "guidance_scale": FIGURES["best_guidance"]}
    ours = base.sample(prompts, seeds, **sampling, height=64, width=64)
    assert (ours - plain_diffusers(BASE, prompts, seeds, **sampling)).abs().max() <= 1e-4


def test_guidance_and_prompt_matter(base):
    prompts = [evaluation_prompts(1)[task][0] for task in TASKS]
    sample = partial(base.sample, seeds=[0] * len(prompts), steps=STEPS, height=64, width=64)
    guided, unguided = sample(prompts, guidance_scale=4.0), sample(prompts, guidance_scale=1.0)
    assert (guided - unguided).abs().mean() > 0.01
    assert (guided[0] - guided[1]).abs().mean() > 0.01
    assert torch.equal(guided, sample(prompts, guidance_scale=4.0))
