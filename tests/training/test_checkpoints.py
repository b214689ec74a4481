"""Checkpoints of the learner in this process; tests/e2e interrupts real runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flowbp_ray.config import load
from flowbp_ray.rollouts.batches import policy_version
from flowbp_ray.rollouts.sampler import Sampler
from flowbp_ray.training import checkpoints
from flowbp_ray.training.checkpoints import CheckpointError, Part, Progress
from flowbp_ray.training.learner import Learner
from flowbp_ray.training.weights import checksum

CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
PROMPTS = ["a red ring", "two circles", "a cross above a square", "a blue square"]
STEPS = 4


def configured(tiny_pipeline, lag):
    settings = (
        "train.batch=2",
        "train.micro_batch=2",
        "train.learning_rate=0.02",
        "train.ema=0.5",
        "sampling.steps=4",
        "surrogate.active_steps=2",
        "adapter.rank=2",
    )
    return load(CONFIG, [*settings, f"train.steps={STEPS}", f"train.policy_lag={lag}", f"model.path={tiny_pipeline}"])


def learn(config, learner, versions, steps):
    """Go on for some steps with made-up reward gradients; ``versions`` are the policies that may be asked for."""
    sampler = Sampler(config, PROMPTS, versions.__getitem__)
    for _ in range(steps):
        versions[learner.version] = list(learner.policy())
        block = sampler({"number": np.array([learner.version])})
        gradients = np.random.default_rng(learner.version).standard_normal(block["inputs"].shape)
        learner.accumulate(block | {"gradients": gradients.astype(np.float32)})
        learner.update()


def weights(learner):
    return {k: v.tensor.clone() for k, v in learner._state().items()}


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_that_is_interrupted_at_any_step_ends_with_the_same_weights_bit_by_bit(tiny_pipeline, tmp_path, lag):
    config = configured(tiny_pipeline, lag)
    undisturbed = Learner(config)
    start = weights(undisturbed)
    learn(config, undisturbed, {}, STEPS)
    wanted = weights(undisturbed)
    assert any(not torch.equal(wanted[name], start[name]) for name in start if name.startswith("raw."))
    for done in range(STEPS + 1):
        folder = tmp_path / str(done)
        first, versions = Learner(config), {}
        learn(config, first, versions, done)
        in_use = range(policy_version(config, done), done)
        first.save(folder, {version: versions[version] for version in in_use})

        again = Learner(config)
        restored = again.restore(folder)
        assert again.version == done
        assert list(restored) == list(in_use)
        learn(config, again, restored, STEPS - done)
        found = weights(again)
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), done
        assert again.progress == undisturbed.progress


def test_progress_is_kept(tiny_pipeline, tmp_path):
    config = configured(tiny_pipeline, 0)
    learner = Learner(config)
    learn(config, learner, {}, 1)
    learner.progress.watch, learner.progress.stopped = {"rows": [{"step": 0, "objective": 1.5}]}, "enough"
    learner.save(tmp_path, {})
    again = Learner(config)
    again.restore(tmp_path)
    assert again.progress == Progress(1, 0, 0, {"rows": [{"step": 0, "objective": 1.5}]}, "enough")


def shared_out(state, workers):
    """A state of whole tensors as FSDP2 shares it out: rows in turn, the last workers may have none."""
    parts = []
    for rank in range(workers):
        part = {}
        for name, tensor in state.items():
            share = -(-len(tensor) // workers)
            begin = min(rank * share, len(tensor))
            part[name] = Part(tensor[begin : begin + share].clone(), begin, len(tensor))
        parts.append(part)
    return parts


@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("after", [1, 2, 4, 5])
def test_any_number_of_workers_goes_on_from_the_checkpoint_of_any_other(tmp_path, before, after):
    whole = {"raw.a": torch.randn(7, 3), "ema.a": torch.randn(7, 3), "raw.b": torch.randn(4), "raw.c": torch.randn(2, 2, 2)}
    for rank, part in enumerate(shared_out(whole, before)):
        checkpoints.write(tmp_path, rank, before, part, {}, Progress(version=3))
    progress, parts = checkpoints.check(tmp_path)
    assert (progress.version, parts) == (3, before)
    for wanted in shared_out(whole, after):
        empty = {name: Part(torch.full_like(own, torch.nan), begin, rows) for name, (own, begin, rows) in wanted.items()}
        checkpoints.read(tmp_path, parts, empty)
        assert all(torch.equal(empty[name].tensor, wanted[name].tensor) for name in wanted)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 2), (2, 1)])
def test_the_policy_versions_in_use_are_published_again_by_whoever_there_is(tiny_pipeline, tmp_path, before, after):
    (chunk,) = Learner(configured(tiny_pipeline, 1)).policy()
    for rank in range(before):
        checkpoints.write(tmp_path, rank, before, {}, {6: [chunk] * (rank + 1), 7: []}, Progress())
    published = [checkpoints.read_policies(tmp_path, before, rank, after) for rank in range(after)]
    chunks = [c for policies in published for c in policies.get(6, [])]
    assert len(chunks) == before * (before + 1) / 2
    pieces = {p.parameter: p.values for p in chunk.pieces}
    for again in chunks:
        assert {p.parameter: p.values.tobytes() for p in again.pieces} == {k: v.tobytes() for k, v in pieces.items()}
        assert again.checksum == checksum(again.pieces)


def with_two_parts(folder):
    note = json.loads((folder / "checkpoint_0.json").read_text())
    (folder / "checkpoint_0.json").write_text(json.dumps(note | {"parts": 2}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "state_0.safetensors").write_bytes(b"x" * 10), r"state_0.safetensors has 10 bytes of \d+"),
        (lambda f: (f / "policies_0.safetensors").unlink(), "No such file"),
        (lambda f: (f / "pytorch_lora_weights.safetensors").write_bytes(b""), "has 0 bytes of"),
        (lambda f: (f / "checkpoint_0.json").write_text('{"parts": 1'), "Expecting"),
        (lambda f: (f / "checkpoint_0.json").unlink(), "No such file"),
        (with_two_parts, r"No such file .*checkpoint_1\.json"),
    ],
    ids=["short", "missing", "empty", "torn note", "no note", "no second part"],
)
def test_a_torn_checkpoint_is_none(tiny_pipeline, tmp_path, damage, said):
    learner = Learner(configured(tiny_pipeline, 0))
    learner.save(tmp_path, {})
    checkpoints.check(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=f"the checkpoint {tmp_path} is not whole: .*{said}"):
        learner.restore(tmp_path)


def test_another_models_checkpoint_is_refused(tmp_path):
    checkpoints.write(tmp_path, 0, 1, {"raw.a": Part(torch.zeros(4, 2), 0, 4)}, {}, Progress())
    with pytest.raises(CheckpointError, match=r"raw\.b is in one of the two alone"):
        checkpoints.read(tmp_path, 1, {"raw.a": Part(torch.zeros(4, 2), 0, 4), "raw.b": Part(torch.zeros(1), 0, 1)})
    for shape in ((5, 2), (4, 3), (3, 2)):
        with pytest.raises(CheckpointError, match=r"another model's: raw\.a has another shape"):
            checkpoints.read(tmp_path, 1, {"raw.a": Part(torch.zeros(shape), 0, shape[0])})
