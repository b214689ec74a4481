"""A GPU gives what the CPU does: every method on the embedded default, every family on tiny models."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import attention_backend

from flowbp_ray.config import load
from flowbp_ray.rollouts.prompts import read_prompts
from flowbp_ray.rollouts.sampler import Sampler
from flowbp_ray.training.learner import Learner
from serve.rewards import here

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"
ON_GPU = ("cluster.sampler_gpus=1", "cluster.trainer_gpus=1", "cluster.reward_gpus=1")
SMALL = ("train.batch=4", "train.micro_batch=2", "train.policy_lag=0")
ALL_WEIGHTS = ("adapter=null", "train.sharded=true", "train.velocity_penalty=0")
FAMILIES = (tiny.sd3, tiny.flux1, tiny.flux2, tiny.z_image)


@pytest.fixture(scope="module", autouse=True)
def _group():
    """Of one process, for what is sharded."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch):
    """Convolutions round to TensorFloat-32 unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def step(file, *changes):
    """A step's latents, objectives and gradient, and the latents of the step after it."""
    config = load(file, [*SMALL, *changes])
    learner, rewards = Learner(config), here(config)
    policies = {0: list(learner.policy())}
    sampler, blocks, scores = Sampler(config, read_prompts(config.prompts), policies.__getitem__), [], []
    for number in (0, 1):
        block = sampler({"number": np.array([number])})
        answers = [rewards.score(block["inputs"][:, m], block["prompt"].tolist()) for m in range(block["inputs"].shape[1])]
        learner.accumulate(block | {"gradients": np.stack([answer["gradient"] for answer in answers], 1)})
        blocks.append(block["latents"])
        scores += [answer["objective"] for answer in answers]
    if config.train.sharded:
        gradient = torch.cat([p.grad.full_tensor().flatten() for p in learner.weights.parameters.values()]).cpu()
    else:
        gradient = learner.weights.gradient.clone().cpu()
    learner.update()
    policies[1] = list(learner.policy())
    after = sampler({"number": np.array([2])})["latents"]
    on = "cuda" if ON_GPU[0] in changes else "cpu"
    assert {learner.backbone.device.type, sampler.backbone.device.type} == {on}
    return {"latents": np.concatenate(blocks), "scores": np.concatenate(scores), "gradient": gradient, "after": after}


def alike(one, other, within):
    """Relative differences of all that a step gives."""
    far = {k: np.linalg.norm(np.asarray(one[k] - other[k])) / np.linalg.norm(np.asarray(one[k])) for k in one}
    assert all(np.linalg.norm(np.asarray(one[k])) > 0 for k in one)
    assert all(distance <= within for distance in far.values()), far  # which no NaN is


@pytest.mark.parametrize("file", sorted(SHAPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_methods_step(file):
    alike(step(file), step(file, *ON_GPU), 1e-3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny pipelines of all families, by name."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "prompts.txt").write_text("a red ring\ntwo circles\n", encoding="utf-8")
    return {made.__name__: (tiny.saved(made, folder / made.__name__), folder / "prompts.txt") for made in FAMILIES}


def of_family(models, name):
    """What a tiny model changes in the recipe."""
    folder, prompts = models[name]
    paths = [f"model.path={folder}", f"prompts.path={prompts}", f"evaluation.prompts={prompts}", "adapter.rank=2"]
    return [*paths, "sampling.steps=4", "sampling.height=32", "sampling.width=48", "surrogate={method: leapalign}"]


@pytest.mark.parametrize("made", FAMILIES)
@pytest.mark.parametrize("more", [(), ("train.gradient_checkpointing=true",), ("cluster.compile=true",)])
def test_a_familys_step(models, made, more):
    given = of_family(models, made.__name__)
    alike(step(SHAPES / "sparse.yaml", *given), step(SHAPES / "sparse.yaml", *given, *ON_GPU, *more), 1e-3)


@pytest.mark.parametrize("made", FAMILIES)
def test_all_weights(models, made):
    given = [*of_family(models, made.__name__), *ALL_WEIGHTS]
    alike(step(SHAPES / "sparse.yaml", *given), step(SHAPES / "sparse.yaml", *given, *ON_GPU), 1e-3)


def test_bfloat16():
    """Roundings of 2⁻⁸ all the way."""
    alike(step(SHAPES / "sparse.yaml"), step(SHAPES / "sparse.yaml", *ON_GPU, "model.dtype=bfloat16"), 0.3)


@pytest.mark.parametrize("backend", ["_native_flash", "_native_efficient"])
def test_attention(models, backend):
    given = [*of_family(models, "flux1"), "model.dtype=bfloat16"]
    with attention_backend("native"):  # diffusers keeps the last one for the whole process
        plain = step(SHAPES / "sparse.yaml", *given)
        alike(plain, step(SHAPES / "sparse.yaml", *given, *ON_GPU, f"cluster.attention={backend}"), 0.3)
