"""FSDP2 over one process: the same gradients, weights and files as without; over two of them see tests/e2e."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from flowbp_ray import backbones
from flowbp_ray.config import load
from flowbp_ray.rollouts.sampler import Sampler
from flowbp_ray.training import adapter, full, learner
from flowbp_ray.training.learner import Learner
from flowbp_ray.training.weights import ShardedWeights, Weights

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
PROMPTS = ["a red ring", "two circles"]
SMALL = (
    "train.batch=4",
    "train.micro_batch=2",
    "train.max_sample_grad_norm=null",
    "train.policy_lag=0",
    "adapter.rank=2",
    "sampling.steps=4",
    "sampling.height=32",
    "sampling.width=48",
    "surrogate={method: bridge, active_steps: 3, pair: {rule: uniform}}",
)
FULL = ("adapter=null", "train.sharded=true", "train.velocity_penalty=0")


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/one", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[tiny.sd3, tiny.flux1, tiny.flux2, tiny.z_image], ids=lambda made: made.__name__)
def folder(request, tmp_path_factory):
    return tiny.saved(request.param, tmp_path_factory.mktemp("model"))


def configured(folder, tmp_path, *overrides):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return load(SPARSE, [*SMALL, f"model.path={folder}", f"evaluation.prompts={tmp_path / 'prompts.txt'}", *overrides])


def learned(config):
    """A learner that has both micro-batches of its first step, and the step's gradient by parameter."""
    one = Learner(config)
    sampler, rng = Sampler(config, PROMPTS, lambda _: one.policy()), np.random.default_rng(0)
    for number in (0, 1):
        block = sampler({"number": np.array([number])})
        one.accumulate(block | {"gradients": rng.standard_normal(block["inputs"].shape).astype(np.float32)})
    if isinstance(one.weights, ShardedWeights):
        gradient = torch.cat([p.grad.full_tensor().flatten() for p in one.weights.parameters.values()]).double()
    else:
        gradient = one.weights.gradient.clone()
    return one, gradient


def apart(gradient, wanted):
    return (gradient - wanted).norm() / wanted.norm()


@pytest.mark.parametrize(
    "settings",
    [(), ("train.unsharded_gradients=true",), ("train.gradient_checkpointing=true",)],
    ids=["", "unsharded", "checkpoints"],
)
def test_a_sharded_adapters_gradient(folder, tmp_path, settings):
    penalty = "train.velocity_penalty=0.3"
    _, wanted = learned(configured(folder, tmp_path, penalty))
    _, gradient = learned(configured(folder, tmp_path, penalty, "train.sharded=true", *settings))
    assert wanted.norm() > 0
    assert apart(gradient, wanted) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("train.gradient_checkpointing=true",)], ids=["", "checkpoints"])
def test_a_compiled_sharded_adapters_gradient(folder, tmp_path, settings):
    penalty = "train.velocity_penalty=0.3"
    _, wanted = learned(configured(folder, tmp_path, penalty))
    _, gradient = learned(configured(folder, tmp_path, penalty, "train.sharded=true", "cluster.compile=true", *settings))
    assert apart(gradient, wanted) <= 1e-4


@pytest.mark.parametrize(
    "settings", [(), ("train.unsharded_gradients=true", "train.gradient_checkpointing=true")], ids=["", "both"]
)
def test_all_weights_gradient(folder, tmp_path, settings, monkeypatch):
    config = configured(folder, tmp_path, *FULL)
    with monkeypatch.context() as unsharded:
        unsharded.setattr(learner, "shard", lambda *_: None)
        unsharded.setattr(learner, "ShardedWeights", Weights)
        _, wanted = learned(config)
    _, gradient = learned(configured(folder, tmp_path, *FULL, *settings))
    assert apart(gradient, wanted) <= 1e-5


@pytest.mark.parametrize("what", [("train.sharded=true",), FULL], ids=["adapter", "all weights"])
def test_unsharded_gradients_are_summed_up_once_an_update(folder, tmp_path, what, monkeypatch):
    """And not once for each active step of each micro-batch."""
    sums, reduce = [], _fsdp_param_group.foreach_reduce
    monkeypatch.setattr(_fsdp_param_group, "foreach_reduce", lambda *given, **named: sums.append(0) or reduce(*given, **named))
    counted = []
    for settings in ((), ("train.unsharded_gradients=true",)):
        sums.clear()
        learned(configured(folder, tmp_path, *what, *settings))
        counted.append(len(sums))
    often, once = counted
    assert once > 0
    assert often == 2 * 3 * once


def test_all_weights_are_trained_published_and_saved(folder, tmp_path):
    config = configured(folder, tmp_path, *FULL, "train.learning_rate=0.01", "evaluation.weights=raw")
    one, _ = learned(config)
    start = one.weights.read()
    assert one.update() > 0
    moved = {name for name, value in one.weights.read().items() if not torch.equal(value, start[name])}
    assert moved == set(start) == {name for name, _ in one.backbone.transformer.named_parameters()}
    settings = {"steps": 4, "guidance_scale": config.sampling.guidance_scale, "height": 32, "width": 48}
    pictured = one.preview(PROMPTS, [1, 2])
    sampler = Sampler(config, PROMPTS, lambda _: one.policy())
    sampler.hold(0)
    torch.testing.assert_close(sampler.backbone.sample_latents(PROMPTS, [1, 2], **settings), pictured, rtol=0, atol=1e-5)
    one.save(tmp_path / "checkpoint", {})
    full.complete(config.model.source, None, tmp_path / "checkpoint" / "transformer", tmp_path / "model")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "model")) is type(one.backbone.pipeline)
    saved = backbones.load(tmp_path / "model")
    torch.testing.assert_close(saved.sample_latents(PROMPTS, [1, 2], **settings), pictured, rtol=0, atol=1e-5)
    base = backbones.load(folder).sample_latents(PROMPTS, [1, 2], **settings)
    assert (pictured - base).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [("train.sharded=false",), ("train.sharded=true",)], ids=["whole", "sharded"])
def test_an_adapter_over_a_bfloat16_model_learns_in_float32(folder, tmp_path, settings):
    one, gradient = learned(configured(folder, tmp_path, "model.dtype=bfloat16", *settings))
    assert 0 < gradient.norm() < torch.inf
    assert {p.dtype for p in one.weights.parameters.values()} == {torch.float32}
    assert {p.dtype for p in one.backbone.transformer.parameters() if not p.requires_grad} == {torch.bfloat16}
    sampler = Sampler(one.config, PROMPTS, lambda _: one.policy())
    sampler.hold(0)
    assert {p.dtype for p in sampler.trained.values()} == {torch.float32}
    one.save(tmp_path / "saved", {})
    exported = backbones.load(folder, torch.bfloat16)
    adapter.load_export(exported, tmp_path / "saved")
    assert {p.dtype for p in adapter.parameters(exported.transformer)} == {torch.float32}


def test_bfloat16_computes_and_float32_learns(tmp_path):
    folder = tiny.saved(tiny.sd3, tmp_path / "tiny")
    _, wanted = learned(configured(folder, tmp_path, *FULL))
    one, gradient = learned(configured(folder, tmp_path, *FULL, "model.dtype=bfloat16", "train.learning_rate=1e-6"))
    assert apart(gradient, wanted) <= 0.2
    assert {p.dtype for p in one.weights.parameters.values()} == {torch.float32}
    before = one.weights.read()
    one.update()
    steps = torch.cat([(value - before[name]).abs().flatten() for name, value in one.weights.read().items()])
    assert steps.quantile(0.5).item() == pytest.approx(1e-6, rel=0.5)  # which bfloat16 would round away
    assert sum(chunk.bytes for chunk in one.policy()) == 2 * len(steps)
    sampler = Sampler(one.config, PROMPTS, lambda _: one.policy())
    sampler.hold(0)
    assert {p.dtype for p in sampler.trained.values()} == {torch.bfloat16}
    one.save(tmp_path / "checkpoint", {})
    saved = load_file(tmp_path / "checkpoint" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}


def test_large_weights_are_saved_in_several_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(full, "FILE", "20KB")
    one = Learner(configured(folder, tmp_path, *FULL))
    one.save(tmp_path, {})
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    saved = type(one.backbone.transformer).from_pretrained(tmp_path / "transformer")
    own = {name: p.full_tensor() for name, p in one.backbone.transformer.named_parameters()}
    assert all(torch.equal(p, own[name]) for name, p in saved.named_parameters())


def test_a_sharded_adapter_is_exported_as_any_other(folder, tmp_path):
    one, _ = learned(configured(folder, tmp_path, "train.sharded=true", "train.learning_rate=0.01", "evaluation.weights=raw"))
    one.update()
    one.save(tmp_path, {})
    exported = backbones.load(folder)
    adapter.load_export(exported, tmp_path)
    settings = {"steps": 4, "guidance_scale": one.config.sampling.guidance_scale, "height": 32, "width": 48}
    torch.testing.assert_close(
        exported.sample_latents(PROMPTS, [1, 2], **settings), one.preview(PROMPTS, [1, 2]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("settings", [FULL, ("train.sharded=true",)], ids=["all weights", "adapter"])
def test_a_sharded_training_goes_on_from_its_checkpoint_bit_by_bit(folder, tmp_path, settings):
    config = configured(folder, tmp_path, *settings, "train.learning_rate=0.01", "train.policy_lag=1", "train.ema=0.5")
    one, _ = learned(config)
    first = list(one.policy())
    one.update()
    one.save(tmp_path / "checkpoint", {0: first})
    again = Learner(config)
    policies = again.restore(tmp_path / "checkpoint")
    assert [chunk.checksum for chunk in policies[0]] == [chunk.checksum for chunk in first]
    assert again.progress == one.progress
    sampler = Sampler(config, PROMPTS, {0: policies[0]}.__getitem__)
    blocks = [sampler({"number": np.array([number])}) for number in (2, 3)]  # step 1, by the policy before
    gradients = np.random.default_rng(1).standard_normal((len(blocks), *blocks[0]["inputs"].shape)).astype(np.float32)
    for learner_ in (one, again):
        for block, gradient in zip(blocks, gradients, strict=True):
            learner_.accumulate(block | {"gradients": gradient})
        assert learner_.update() > 0
    wanted, found = one.weights.read(), again.weights.read()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(torch.equal(again.averaged[name], one.averaged[name]) for name in wanted)


def test_of_a_hubs_model_all_but_the_transformer_is_fetched(folder, tmp_path, monkeypatch):
    asked = []

    def download(source, **how):
        asked.append((source, how))
        return str(folder)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    full.complete("owner/model", "abc", folder / "transformer", tmp_path / "model")
    assert asked == [("owner/model", {"revision": "abc", "use_safetensors": True, "transformer": None})]
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "model")) is type(DiffusionPipeline.from_pretrained(folder))
