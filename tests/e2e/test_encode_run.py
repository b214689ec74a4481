"""Prompts encoded on a real local Ray cluster, then an alignment that reads them."""

import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
import torch
from reference import align_here
from safetensors.torch import load_file

from flowbp_ray.config import load
from flowbp_ray.rollouts import embeds
from flowbp_ray.training.learner import Learner
from pipelines import alignment, encode_prompts, session

pytestmark = pytest.mark.slow
SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
SMALL = (
    "train.steps=2",
    "train.batch=8",
    "train.micro_batch=4",
    "train.workers=1",
    "train.policy_lag=0",
    "train.learning_rate=3e-3",
    "adapter.rank=2",
    "sampling.steps=4",
    "sampling.height=32",
    "sampling.width=32",
    "surrogate={method: sparse, active_steps: 2}",
    "evaluation.before=false",
    "evaluation.per_task=4",
    "evaluation.preview_prompts=4",
    "cluster.samplers=1",
    "cluster.sampler_cpus=0.5",
    "cluster.trainer_cpus=0.5",
    "cluster.reward_cpus=0.5",
)
THINGS = [f"{number} {shape}" for number in ("a red", "two", "a") for shape in ("ring", "cross", "circles", "above a cross")]


def test_an_alignment_with_embeddings_learns_what_it_learns_without(cluster, tmp_path, monkeypatch, capsys):
    prompts = [f"{one} above {other}" for one in THINGS for other in THINGS[:5]]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    (tmp_path / "evaluation.txt").write_text("\n".join([*prompts, *prompts[:9]]), encoding="utf-8")
    settings = [
        *SMALL,
        f"model.path={tiny.saved(tiny.sd3, tmp_path / 'model')}",
        f"prompts.path={tmp_path}/prompts.txt",
        f"evaluation.prompts={tmp_path}/evaluation.txt",
        f"output={tmp_path}",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    ]
    folder = tmp_path / "embeds"

    def command(*more):
        """As a person runs it, on the cluster that is there, and what it says."""
        monkeypatch.setattr(sys, "argv", ["encode_prompts", str(SPARSE), *settings, *more, "--output", str(folder)])
        monkeypatch.setattr(session, "cluster", lambda _: nullcontext())
        before = signal.getsignal(signal.SIGTERM)
        try:
            encode_prompts.main()
        finally:
            signal.signal(signal.SIGTERM, before)
        return capsys.readouterr().out

    printed = command("cluster.samplers=2")
    number = len(dict.fromkeys(prompts)) + 1
    assert f"encoded {number} prompts, 0 were there; {folder} has" in printed
    assert f"cluster.samplers=2 prompts.embeds={folder}\n" in printed
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(whole) == 1 + -(-(number - 1) // 16) + 1

    gone, torn, *_ = sorted(folder.glob("*.parquet"), key=lambda file: -file.stat().st_size)
    gone.unlink()
    torn.write_bytes(torn.read_bytes()[:-8])
    assert f"encoded 32 prompts, {number - 32} were there" in command()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    assert f"encoded 0 prompts, {number} were there" in command()

    config = load(SPARSE, [*settings, f"prompts.embeds={folder}"])
    embeds.check(config)
    outcome = alignment.align(config, tmp_path / "run")
    learner, _ = align_here(load(SPARSE, settings))
    trained = load_file(outcome.folder / "checkpoint_000002" / "state_0.safetensors")
    start, wanted = Learner(config).weights.read(), learner.weights.read()
    assert all(torch.equal(trained[f"raw.{name}"], weights) for name, weights in wanted.items())
    assert any(not torch.equal(start[name], weights) for name, weights in wanted.items())
