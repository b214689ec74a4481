"""The learner in this process, on a tiny random pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flowbp_ray.backbones.sd3 import SD3Backbone
from flowbp_ray.config import load
from flowbp_ray.rollouts.sampler import Sampler
from flowbp_ray.surrogate.methods import METHODS
from flowbp_ray.training import adapter
from flowbp_ray.training.learner import Learner

encode = SD3Backbone.encode_texts
CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
PROMPTS = ["a red ring", "two circles", "a cross above a square", "a blue square"]


def configured(tiny_pipeline, *overrides):
    settings = (
        "train.batch=4",
        "train.micro_batch=4",
        "train.workers=1",
        "train.policy_lag=0",
        "train.velocity_penalty=0",
        "train.max_sample_grad_norm=null",
        "sampling.steps=5",
        "surrogate.active_steps=2",
        "adapter.rank=4",
    )
    return load(CONFIG, [*settings, f"model.path={tiny_pipeline}", *overrides])


def block_of(config, learner, part=0):
    """One micro-batch of the step that the learner is at, with made-up reward gradients."""
    sampler = Sampler(config, PROMPTS, lambda _: learner.policy())
    parts = config.train.batch // config.train.micro_batch
    block = sampler({"number": np.array([learner.version * parts + part])})
    rng = np.random.default_rng([learner.version, part])
    return block | {"gradients": rng.standard_normal(block["inputs"].shape).astype(np.float32)}


def test_samplers_and_learners_encode_a_prompt_once(tiny_pipeline, monkeypatch):
    config = configured(tiny_pipeline, "train.batch=8")
    learner = Learner(config)
    sampler, encoded = Sampler(config, PROMPTS, lambda _: learner.policy()), []
    monkeypatch.setattr(SD3Backbone, "encode_texts", lambda *given: encoded.append(given[1]) or encode(*given))
    for part in range(2):
        block = sampler({"number": np.array([part])})
        learner.accumulate(block | {"gradients": np.ones_like(block["inputs"])})
    assert [sorted(set(prompts)) for prompts in encoded] == [sorted(PROMPTS)] * 2  # the sampler's and the learner's


def test_an_update_climbs_the_objective(tiny_pipeline):
    config = configured(tiny_pipeline, "train.learning_rate=1e-3")
    learner = Learner(config)
    block = block_of(config, learner)
    learner.accumulate(block)
    assert learner.update() > 0
    assert learner.version == 1
    after = Sampler(config, PROMPTS, lambda _: learner.policy())
    after.config = config.model_copy(update={"train": config.train.model_copy(update={"policy_lag": 1})})
    after.version = -1
    moved = after({"number": np.array([0])})["inputs"] - block["inputs"]
    assert (moved * block["gradients"]).sum() > 0


NEEDED = {
    "refl": {"last_n_steps": 3},
    "truncated": {"active_steps": 2},
    "composed": {"reward_input": "posterior_mean", "active": "all", "weights": "euler", "bridge": "none", "stop_within": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_from_the_sampler_to_the_learner(tiny_pipeline, method):
    config = configured(tiny_pipeline, f"surrogate={ {'method': method, **NEEDED.get(method, {})} }")
    learner = Learner(config)
    block, plan = block_of(config, learner), learner.plan
    assert block["inputs"].shape == (4, len(plan.reward_inputs), 4, 16, 16)
    assert block["latents"].shape == (4, len(plan.active), 4, 16, 16)
    learner.accumulate(block)
    assert 0 < learner.weights.gradient.norm() < np.inf


def test_noised_copies_are_what_autograd_takes_them_for(tiny_pipeline):
    """DRaFT-LV written out: the mean over the last estimate and its re-noised copies, each by its own velocity."""
    config = configured(tiny_pipeline, "surrogate={method: draft_lv}")
    learner = Learner(config)
    for parameter in learner.weights.parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    block = block_of(config, learner)
    learner.accumulate(block)
    backbone, sigma, scale = learner.backbone, learner.sigmas[-2], config.sampling.guidance_scale
    text, loss = backbone.encode(block["prompt"].tolist()), 0.0
    for m in range(3):
        x, gradient = torch.from_numpy(block["latents"][:, m]), torch.from_numpy(block["gradients"][:, m])
        with torch.no_grad():
            unconditional = backbone.velocity(x, sigma, learner.negative.expand(4))
        estimate = x - sigma * (unconditional + scale * (backbone.velocity(x, sigma, text) - unconditional))
        np.testing.assert_allclose(block["inputs"][:, m], estimate.detach(), atol=1e-5)
        loss = loss - (estimate * gradient).sum() / (3 * 4)
        if m:
            noise = (x - (1 - sigma) * torch.from_numpy(block["inputs"][:, 0])) / sigma
            assert noise.std() == pytest.approx(1, abs=0.1)
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in learner.weights.parameters.values()])
    assert (learner.weights.gradient - wanted).norm() <= 1e-5 * wanted.norm()


def test_micro_batches_add_up_to_the_batch(tiny_pipeline):
    gradients = []
    for size in (4, 2):
        config = configured(tiny_pipeline, f"train.micro_batch={size}")
        learner = Learner(config)
        whole = block_of(configured(tiny_pipeline), learner)
        for start in range(0, 4, size):
            learner.accumulate({k: v[start : start + size] for k, v in whole.items()})
        gradients.append(learner.weights.gradient)
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


def test_the_gradient_does_not_depend_on_the_order_of_the_micro_batches(tiny_pipeline):
    config = configured(tiny_pipeline, "train.micro_batch=1")
    learners = [Learner(config), Learner(config)]
    whole = block_of(configured(tiny_pipeline), learners[0])
    for learner, order in zip(learners, [(0, 1, 2, 3), (3, 1, 0, 2)], strict=True):
        for start in order:
            learner.accumulate({k: v[start : start + 1] for k, v in whole.items()})
        learner.update()
    one, other = (adapter.checksum(adapter.read(learner.backbone.transformer)) for learner in learners)
    assert one == other


def test_the_gradients_of_all_workers_are_added_before_the_cut(tiny_pipeline):
    config = configured(tiny_pipeline, "train.max_grad_norm=1e-6")
    learner, alone = Learner(config), Learner(config)
    block = block_of(config, learner)
    for one in (learner, alone):
        one.accumulate(block)
    assert learner.update(lambda flat: flat.mul_(3)) == pytest.approx(3 * alone.update(), rel=1e-5)


def test_the_average_follows_and_the_preview_uses_it(tiny_pipeline):
    config = configured(tiny_pipeline, "train.ema=0.5", "train.learning_rate=0.05")
    learner = Learner(config)
    start = learner.weights.read()
    learner.accumulate(block_of(config, learner))
    learner.update()
    raw = learner.weights.read()
    for name, averaged in learner.averaged.items():
        torch.testing.assert_close(averaged, (start[name] + raw[name]) / 2)
    shown = learner.preview(["a red ring"], [1])
    assert adapter.checksum(learner.weights.read()) == adapter.checksum(raw)
    learner.weights.write(learner.averaged)
    settings = {"steps": 5, "guidance_scale": config.sampling.guidance_scale, "height": 64, "width": 64}
    assert torch.equal(shown, learner.backbone.sample_latents(["a red ring"], [1], **settings))


def test_samples_of_another_step_are_refused(tiny_pipeline):
    config = configured(tiny_pipeline)
    learner = Learner(config)
    block = block_of(config, learner)
    learner.progress.version = 1
    with pytest.raises(RuntimeError, match=r"step 1 was given samples of step \[0\] and policy version \[0\], not 1"):
        learner.accumulate(block)


def test_a_gradient_that_is_not_finite_makes_no_update_and_can_be_looked_at(tiny_pipeline, tmp_path):
    config = configured(tiny_pipeline, "train.learning_rate=0.05")
    learner = Learner(config)
    learner.accumulate(block_of(config, learner))
    learner.update()
    block = block_of(config, learner)
    block["gradients"][0, 0, 0, 0, 0] = np.inf
    before, averaged = adapter.checksum(learner.weights.read()), adapter.checksum(learner.averaged)
    learner.accumulate(block)
    assert not np.isfinite(learner.update())
    assert (adapter.checksum(learner.weights.read()), adapter.checksum(learner.averaged)) == (before, averaged)
    assert (learner.version, learner.progress.skipped, learner.progress.skipped_in_a_row) == (2, 1, 1)
    learner.dump(tmp_path, [block])

    again = Learner(config)
    again.restore(tmp_path)
    with np.load(tmp_path / "blocks_0_0.npz", allow_pickle=False) as kept:
        again.accumulate(dict(kept))
    assert not np.isfinite(again.update())
    assert again.progress == learner.progress
    for one in (learner, again):
        one.accumulate(block_of(config, one))
        assert np.isfinite(one.update())
        assert one.progress.skipped_in_a_row == 0
    assert adapter.checksum(again.weights.read()) == adapter.checksum(learner.weights.read()) != before


def test_a_checkpoint_is_an_adapter_that_can_be_started_from(tiny_pipeline, tmp_path):
    config = configured(tiny_pipeline, "train.learning_rate=0.05", "evaluation.weights=raw")
    learner = Learner(config)
    learner.accumulate(block_of(config, learner))
    learner.update()
    learner.save(tmp_path, {})
    again = Learner(configured(tiny_pipeline, f"adapter.init_from={tmp_path}"))
    raw = adapter.checksum(learner.weights.read())
    assert adapter.checksum(again.weights.read()) == adapter.checksum(again.averaged) == raw


def test_the_preview_is_what_the_exported_adapter_makes(tiny_pipeline, tmp_path):
    config = configured(tiny_pipeline, "adapter.export_strength=0.5")
    learner = Learner(config)
    for parameter in learner.weights.parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    learner.averaged = learner.weights.read()
    settings = {"steps": 5, "guidance_scale": config.sampling.guidance_scale, "height": 64, "width": 64}
    full = learner.backbone.sample_latents(["a red ring"], [1], **settings)
    learner.save(tmp_path, {})
    exported = SD3Backbone.from_pretrained(tiny_pipeline)
    adapter.load_export(exported, tmp_path)
    shown = learner.preview(["a red ring"], [1])
    torch.testing.assert_close(shown, exported.sample_latents(["a red ring"], [1], **settings), rtol=0, atol=1e-5)
    assert (shown - full).abs().max() > 1e-2
    assert torch.equal(learner.backbone.sample_latents(["a red ring"], [1], **settings), full)


def test_no_sample_decides_a_step_alone(tiny_pipeline):
    config = configured(tiny_pipeline, "surrogate={method: draft_lv}", "train.max_sample_grad_norm=2.0")
    learner = Learner(config)
    block = block_of(config, learner)
    norms = np.linalg.norm(block["gradients"].reshape(4, 3, -1), axis=2)
    block["gradients"] *= (np.array([[1.0, 2.0, 8.0]] * 3 + [[0.0, 0.0, 0.0]]) / norms)[..., None, None, None].astype(np.float32)
    learner.accumulate(block)
    cut, learner.weights.gradient = learner.weights.gradient.clone(), torch.zeros_like(learner.weights.gradient)
    block["gradients"][:, 2] /= 4
    learner.config = config.model_copy(update={"train": config.train.model_copy(update={"max_sample_grad_norm": None})})
    learner.accumulate(block)
    assert (cut - learner.weights.gradient).norm() <= 1e-6 * learner.weights.gradient.norm()
