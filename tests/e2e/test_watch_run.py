"""Trainings that their watch stops: what is kept and exported, and that nothing goes on waiting."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from mlflow import MlflowClient

from flowbp_ray.config import load
from flowbp_ray.training import EXPORT_FILE
from pipelines.alignment import align
from pipelines.runs import Kept

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "shapes" / "sparse.yaml"
STOPPED = (  # any gradient is over a millionth of what they were: after the sixth step
    "watch.grad_norm_factor=1e-6",
    "watch.window=3",
    "watch.stop=true",
    "train.steps=40",
    "train.batch=4",
    "train.micro_batch=2",
    "train.checkpoint_every=2",
    "adapter.rank=4",
    "sampling.steps=4",
    "surrogate.active_steps=2",
    "evaluation.per_task=1",
    "evaluation.before=false",
    "evaluation.preview_every=4",
    "evaluation.preview_prompts=2",
    "cluster.sampler_cpus=0.5",
    "cluster.trainer_cpus=0.5",
    "cluster.reward_cpus=0.5",
)
REASON = "after step 5: the gradient's norm was "


def configured(folder, *overrides):
    return load(CONFIG, [*STOPPED, f"output={folder}", f"tracking.uri=sqlite:///{folder}/mlflow.db", *overrides])


def run_of(config):
    client = MlflowClient(config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("flowbp_ray").experiment_id])
    return client, run


def test_all_workers_stop_and_the_best_checkpoint_is_exported(cluster, tmp_path):
    """One policy version is asked for that never comes, and samples of another are on their way."""
    config = configured(
        tmp_path,
        "train.policy_lag=1",
        "train.workers=2",
        "cluster.samplers=2",
        "train.best=reward/judge",
        "train.keep_checkpoints=1",
    )
    free = ray.available_resources()["CPU"]
    outcome = align(config, tmp_path / "run")
    until = time.monotonic() + 60
    while ray.available_resources()["CPU"] < free:
        assert time.monotonic() < until, ray.available_resources()
        time.sleep(0.2)

    client, run = run_of(config)
    assert run.info.status == "FINISHED"
    assert run.data.tags["stopped"] == outcome.notes["stopped"]
    assert run.data.tags["stopped"].startswith(REASON)
    history = [p.value for p in client.get_metric_history(run.info.run_id, "reward/judge")]
    assert len(history) == 6
    assert [p.step for p in client.get_metric_history(run.info.run_id, "diversity")] == [0, 4, 6]
    scores = {2 * n + 2: np.mean(history[2 * n : 2 * n + 2]) for n in range(3)}
    best = max(scores, key=scores.get)
    assert best != 6  # else it would be exported anyway
    assert {f.name for f in outcome.folder.glob("checkpoint_0*")} == {f"checkpoint_{best:06d}", "checkpoint_000006"}
    kept = {n: (outcome.folder / f"checkpoint_{n:06d}" / EXPORT_FILE).read_bytes() for n in (best, 6)}
    assert (outcome.exported / EXPORT_FILE).read_bytes() == kept[best] != kept[6]
    why = f"checkpoint_{best:06d} is exported: reward/judge was {scores[best]:.4g} in the steps up to it, the most; "
    assert outcome.notes["best"] == f"{why}up to the last one, checkpoint_000006, it was {scores[6]:.4g}"
    assert [p.step for p in client.get_metric_history(run.info.run_id, "eval/aligned/mean")] == [best]
    (warning,) = (outcome.folder / "warnings.txt").read_text().splitlines()
    assert warning == outcome.notes["stopped"]
    assert Path(client.download_artifacts(run.info.run_id, "warnings.txt")).read_text() == f"{warning}\n"
    assert (outcome.folder / "table.md").exists()
    assert json.loads((outcome.folder / "adapter" / "adapter.json").read_text())["weights"] == "ema"


def test_the_command_says_why_it_stopped_and_succeeds(tmp_path):
    config = configured(tmp_path, "train.policy_lag=0")
    (tmp_path / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-m", "pipelines.align", str(tmp_path / "config.yaml")]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    assert f"warning {REASON}" in done.stderr
    lines = done.stdout.splitlines()
    said = {line.split()[0]: line[10:] for line in lines if line.startswith(("stopped ", "warnings ", "adapter "))}
    assert said["stopped"].startswith(REASON)
    assert said["warnings"].startswith("1, in ")
    assert "| **mean** |" in done.stdout
    folder = Path(said["adapter"].split()[0]).parent
    assert {f.name for f in folder.glob("checkpoint_0*")} == {f"checkpoint_{n:06d}" for n in (2, 4, 6)}
    assert (folder / "adapter" / EXPORT_FILE).read_bytes() == (folder / "checkpoint_000006" / EXPORT_FILE).read_bytes()
    _, run = run_of(config)
    assert run.info.status == "FINISHED"
    # A false alarm.
    (again,) = (line.partition("python ")[2] for line in lines if line.startswith("go on "))
    done = subprocess.run(
        [sys.executable, *again.split(), "train.steps=12"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "stopped " not in done.stdout
    assert Kept(config, folder).steps == 12
    _, run = run_of(config)
    assert run.info.status == "FINISHED"
