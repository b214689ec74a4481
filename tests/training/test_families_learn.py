"""Every family from the sampler by the reward to the learner, in one process, on tiny random models of the real classes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers.models.attention_dispatch import attention_backend

from flowbp_ray.config import load
from flowbp_ray.rollouts.sampler import Sampler
from flowbp_ray.training import adapter
from flowbp_ray.training.learner import Learner
from serve.rewards import here

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
SMALL = (
    "train.batch=4",
    "train.micro_batch=2",
    "train.workers=1",
    "train.policy_lag=0",
    "train.velocity_penalty=0.1",
    "adapter.rank=2",
    "sampling.steps=4",
    "sampling.height=32",
    "sampling.width=48",
)


@pytest.mark.parametrize("made", [tiny.flux1, tiny.flux2, tiny.z_image], ids=lambda made: made.__name__)
@pytest.mark.parametrize("method", ["{method: sparse, active_steps: 2}", "{method: leapalign}"])
def test_two_steps(made, method, tmp_path):
    folder = tiny.saved(made, tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red ring\ntwo circles\n", encoding="utf-8")
    paths = [f"model.path={folder}", f"evaluation.prompts={tmp_path / 'prompts.txt'}", f"surrogate={method}"]
    config = load(SPARSE, [*SMALL, *paths])
    learner, rewards = Learner(config), here(config)
    start, policies = adapter.read(learner.backbone.transformer), {0: list(learner.policy())}
    sampler = Sampler(config, ["a red ring", "two circles"], policies.__getitem__)
    for step in range(2):
        for number in (2 * step, 2 * step + 1):
            block = sampler({"number": np.array([number])})
            gradient = rewards.score(block["inputs"][:, 0], block["prompt"].tolist())["gradient"]
            learner.accumulate(block | {"gradients": gradient[:, None]})
        assert learner.update() > 0
        policies[learner.version] = list(learner.policy())
    after = adapter.read(learner.backbone.transformer)
    assert all(not torch.equal(start[name], after[name]) for name in start if "lora_B" in name)


def test_embedded_guidance_cannot_be_compensated(tmp_path):
    folder = tiny.saved(tiny.flux1, tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red ring\n", encoding="utf-8")
    paths = [f"model.path={folder}", f"evaluation.prompts={tmp_path / 'prompts.txt'}", "surrogate.compensate_guidance=true"]
    with pytest.raises(ValueError, match="guidance is an input of FluxTransformer2DModel"):
        Learner(load(SPARSE, [*SMALL, *paths]))


def same(made, folder, *changes):
    """Samples and gradients without and with changes are the same but for roundings; gives what sampled and what learned."""
    model = tiny.saved(made, folder / "model")
    (folder / "prompts.txt").write_text("a red ring\ntwo circles\n", encoding="utf-8")
    paths = [f"model.path={model}", f"evaluation.prompts={folder / 'prompts.txt'}", "surrogate={method: leapalign}"]
    sampled, gradients, backbones = [], [], []
    for more in ((), changes):
        config = load(SPARSE, [*SMALL, *paths, *more])
        learner = Learner(config)
        sampler = Sampler(config, ["a red ring", "two circles"], {0: list(learner.policy())}.__getitem__)
        with ThreadPoolExecutor(1) as other:  # as Ray Data calls it
            block = other.submit(sampler, {"number": np.array([0])}).result()
        sampled.append(block["latents"])
        learner.accumulate(block | {"gradients": np.ones_like(block["inputs"])})
        gradients.append(learner.weights.gradient.clone())
        backbones.append((learner.backbone, sampler.backbone))
    np.testing.assert_allclose(*sampled, rtol=0, atol=1e-4)
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[0].norm()
    assert gradients[0].norm() > 0
    return backbones


@pytest.mark.slow
@pytest.mark.parametrize("made", [tiny.sd3, tiny.flux1, tiny.flux2, tiny.z_image], ids=lambda made: made.__name__)
def test_compiled_it_samples_and_learns_the_same(made, tmp_path):
    for compiled, backbones in enumerate(same(made, tmp_path, "cluster.compile=true")):
        for backbone in backbones:
            blocks = backbone.blocks(backbone.transformer)
            assert all((b._compiled_call_impl is not None) == bool(compiled) for b in blocks)


@pytest.mark.parametrize("made", [tiny.flux1, tiny.flux2], ids=lambda made: made.__name__)
def test_by_another_attention_it_samples_and_learns_the_same(made, tmp_path):
    with attention_backend("native"):  # diffusers keeps the last one for the whole process
        plain, other = same(made, tmp_path, "cluster.attention=_native_flash")
    for backbones, name in ((plain, None), (other, "_native_flash")):
        for backbone in backbones:
            processors = [m.processor for m in backbone.transformer.modules() if hasattr(m, "processor")]
            assert {p._attention_backend for p in processors} == {name}
