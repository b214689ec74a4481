"""A sampler in this process, on a tiny random pipeline."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from flowbp_ray.config import load
from flowbp_ray.randomness import seed_of
from flowbp_ray.rollouts.sampler import Sampler
from flowbp_ray.training import adapter
from flowbp_ray.training.learner import Learner
from flowbp_ray.training.weights import checksum, load_chunk

CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
PROMPTS = ["a red ring", "two circles", "a cross above a square", "a blue square"]


@pytest.fixture(scope="module")
def config(tiny_pipeline):
    settings = (
        "train.batch=6",
        "train.micro_batch=3",
        "train.workers=1",
        "train.policy_lag=0",
        "sampling.steps=5",
        "surrogate.active_steps=2",
        "adapter.rank=4",
    )
    return load(CONFIG, [*settings, f"model.path={tiny_pipeline}"])


@pytest.fixture(scope="module")
def policies(config):
    """Version 0 as it starts, version 1 elsewhere."""
    learner = Learner(config)
    first = list(learner.policy())
    for parameter in learner.weights.parameters.values():
        torch.nn.init.normal_(parameter, std=0.3)
    return [first, list(learner.policy())]


def number(n):
    return {"number": np.array([n])}


def test_a_block_has_what_the_step_needs(config, policies):
    sampler = Sampler(config, PROMPTS, policies.__getitem__)
    block = sampler(number(3))
    assert (set(block["step"]), set(block["part"]), set(block["version"])) == ({1}, {1}, {1})
    assert block["sample"].tolist() == [3, 4, 5]
    assert block["latents"].shape == (3, 2, 4, 16, 16)
    assert block["inputs"].shape == (3, 1, 4, 16, 16)
    assert block["weight"].tolist() == [1, 1, 1]
    assert set(block["prompt"]) <= set(PROMPTS)


def test_the_reward_sees_what_the_backbone_samples(config, policies):
    sampler = Sampler(config, PROMPTS, policies.__getitem__)
    block = sampler(number(0))
    seeds = [seed_of(config.train.seed, 0, s, "noise") for s in block["sample"].tolist()]
    sampled = sampler.backbone.sample_latents(
        block["prompt"].tolist(), seeds, steps=5, guidance_scale=config.sampling.guidance_scale, height=64, width=64
    )
    np.testing.assert_allclose(block["inputs"][:, 0], sampled, atol=1e-5)


def test_who_samples_and_what_was_sampled_before_make_no_difference(config, policies):
    one, other = (Sampler(config, PROMPTS, policies.__getitem__) for _ in range(2))
    one(number(0))
    one(number(2))
    for column, values in one(number(3)).items():
        if not column.endswith("_seconds"):
            np.testing.assert_array_equal(values, other(number(3))[column])


def test_an_adapter_added_to_the_weights_samples_what_one_beside_them_does(config, policies):
    sampler = Sampler(config, PROMPTS, policies.__getitem__)
    sampler(number(0))
    block = sampler(number(2))
    beside = adapter.adapted(config, "cpu")
    for chunk in policies[1]:
        load_chunk(dict(beside.transformer.named_parameters()), chunk)
    seeds = [seed_of(config.train.seed, 1, s, "noise") for s in block["sample"].tolist()]
    size = {"height": config.sampling.height, "width": config.sampling.width}
    sampled = beside.sample_latents(
        block["prompt"].tolist(), seeds, steps=5, guidance_scale=config.sampling.guidance_scale, **size
    )
    np.testing.assert_allclose(block["inputs"][:, 0], sampled, atol=1e-4)
    plain = beside.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    held = sampler.backbone.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    assert (held - plain).abs().max() > 1e-3


def test_a_bfloat16_model_keeps_its_adapter_beside_the_weights(config):
    transformer = adapter.adapted(config, "cpu").transformer.to(torch.bfloat16)
    assert adapter.plain_weights(transformer) is None
    weight = transformer.transformer_blocks[0].attn.to_q.base_layer.weight.clone()
    torch.nn.init.normal_(transformer.transformer_blocks[0].attn.to_q.lora_B["default"].weight)
    adapter.merge(transformer, None)
    assert torch.equal(transformer.transformer_blocks[0].attn.to_q.base_layer.weight, weight)


def test_the_policy_makes_a_difference(config, policies):
    before = Sampler(config, PROMPTS, lambda _: policies[0])
    after = Sampler(config, PROMPTS, policies.__getitem__)
    assert np.abs(before(number(2))["inputs"] - after(number(2))["inputs"]).max() > 1e-3


def test_a_push_that_did_not_arrive_is_an_error(config, policies):
    (chunk,) = policies[1]
    wrong = dataclasses.replace(chunk, checksum="0" * 64)
    with pytest.raises(RuntimeError, match="not 000000000000, after loading a part of a policy"):
        Sampler(config, PROMPTS, lambda _: [wrong])(number(2))
    half = dataclasses.replace(chunk, pieces=chunk.pieces[::2])
    half = dataclasses.replace(half, checksum=checksum(half.pieces))
    with pytest.raises(RuntimeError, match=r"policy version 1 has \d+ values, but \d+ are trained"):
        Sampler(config, PROMPTS, lambda _: [half])(number(2))
