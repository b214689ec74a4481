"""Alignments that are interrupted and go on, on a real local Ray cluster with a real MLflow store."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import ray
import torch
from mlflow import MlflowClient
from ray import serve
from safetensors.torch import load_file

from flowbp_ray.config import load
from pipelines import alignment, runs
from pipelines.alignment import align
from pipelines.session import lost, reason

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
STEPS = 3
SMALL = (
    f"train.steps={STEPS}",
    "train.policy_lag=1",
    "train.batch=4",
    "train.micro_batch=2",
    "train.learning_rate=3e-3",
    "train.checkpoint_every=1",
    "adapter.rank=4",
    "sampling.steps=4",
    "surrogate.active_steps=2",
    "evaluation.per_task=1",
    "evaluation.before=false",
    "evaluation.preview_every=2",
    "evaluation.preview_prompts=2",
    "cluster.samplers=1",
    "cluster.sampler_cpus=0.5",
    "cluster.trainer_cpus=0.5",
    "cluster.reward_cpus=0.5",
)


def configured(folder, *overrides):
    return load(CONFIG, [*SMALL, f"output={folder}", f"tracking.uri=sqlite:///{folder}/mlflow.db", *overrides])


def final(folder):
    return load_file(folder / f"checkpoint_{STEPS:06d}" / "state_0.safetensors")


def points(config):
    """Of the one run there is: every metric's values by step, and its images' steps."""
    client = MlflowClient(config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("flowbp_ray").experiment_id])
    assert run.info.status == "FINISHED"
    history = {k: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, k)] for k in run.data.metrics}
    for key, values in history.items():
        assert len({step for step, _ in values}) == len(values), key  # none is doubled
    images = sorted({f.path.split("+")[2] for f in client.list_artifacts(run.info.run_id, "images")})
    return {k: sorted(v) for k, v in history.items() if not k.startswith("seconds/")} | {"images": images}


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """At lag 1, where two policy versions are in use; lag 0 is in tests/training/test_checkpoints.py."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = configured(folder)
    return align(config, folder / "run"), points(config)


def interrupted(config, folder, step, monkeypatch):
    """An alignment with Ctrl-C as soon as a step has its checkpoint."""
    look = alignment.look

    def watched(bar, tracker, said):
        if runs.Kept(config, folder).steps > step:
            raise KeyboardInterrupt
        return look(bar, tracker, said)

    with monkeypatch.context() as patched:
        patched.setattr(alignment, "look", watched)
        with pytest.raises(KeyboardInterrupt):
            align(config, folder)


def test_interrupted_at_every_step_in_turn_it_ends_as_the_undisturbed_run(undisturbed, tmp_path, monkeypatch):
    outcome, wanted = undisturbed
    config = configured(tmp_path)
    folder, reached = tmp_path / "run", []
    for step in range(STEPS - 1):
        interrupted(config, folder, step, monkeypatch)
        assert runs.unfinished(config, tmp_path.glob("*")) == folder
        reached.append(runs.Kept(config, folder).steps)
    again = align(config, folder)
    assert all(steps > step for step, steps in enumerate(reached))
    assert again.info["run_id"] != outcome.info["run_id"]
    one, two = final(outcome.folder), final(folder)
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert points(config) == wanted
    assert (folder / "before_after.png").read_bytes() == (outcome.folder / "before_after.png").read_bytes()
    assert (folder / "table.md").read_text() == (outcome.folder / "table.md").read_text()
    assert {f.name for f in folder.glob("checkpoint_0*")} == {f"checkpoint_{n:06d}" for n in range(1, STEPS + 1)}
    assert runs.unfinished(config, tmp_path.glob("*")) is None
    # No step before the checkpoint that it went on from was done again.
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "objective" in line["values"]]
    began = [i for i, step in enumerate(steps) if i and step <= steps[i - 1]]
    assert [steps[i] for i in began if steps[i] not in reached] == []


def test_other_numbers_of_workers_and_samplers_go_on_to_the_same_weights(undisturbed, tmp_path, monkeypatch):
    outcome, _ = undisturbed
    folder = tmp_path / "run"
    interrupted(configured(tmp_path), folder, 1, monkeypatch)
    config = configured(tmp_path, "train.workers=2", "cluster.samplers=2")
    assert runs.unfinished(config, tmp_path.glob("*")) == folder
    align(config, folder)
    one, two = final(outcome.folder), final(folder)
    start = load_file(outcome.folder / "checkpoint_000001" / "state_0.safetensors")
    moved = torch.cat([(one[k] - start[k]).flatten() for k in one if k.startswith("raw.")]).norm()
    apart = torch.cat([(one[k] - two[k]).flatten() for k in one if k.startswith("raw.")]).norm()
    assert moved > 0
    assert apart <= 1e-4 * moved
    assert points(config)["images"] == ["0", "2", "3"]


def test_a_finished_run_gets_more_steps(undisturbed, tmp_path):
    outcome, wanted = undisturbed
    folder = tmp_path / "run"
    align(configured(tmp_path, "train.steps=2"), folder)
    config = configured(tmp_path)
    runs.check(config, folder)
    align(config, folder)
    one, two = final(outcome.folder), final(folder)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert points(config)["objective"] == wanted["objective"]


def processes(title):
    """Numbers of this machine's processes of a kind of Ray actor."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(f"ray::{title}".encode()):
                found.append(int(folder.name))
        except OSError:
            continue  # it ended meanwhile
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found in /proc")
def test_without_retries_a_lost_train_worker_ends_the_run_with_a_sentence_and_the_same_command_goes_on(
    undisturbed, tmp_path, monkeypatch
):
    outcome, wanted = undisturbed
    config, folder = configured(tmp_path, "train.retries=0"), tmp_path / "run"
    look, free = alignment.look, ray.available_resources()["CPU"]

    def watched(bar, tracker, said):
        if runs.Kept(config, folder).steps == 1:
            for number in processes("RayTrainWorker"):
                os.kill(number, signal.SIGKILL)
        return look(bar, tracker, said)

    with monkeypatch.context() as patched:
        patched.setattr(alignment, "look", watched)
        with pytest.raises(Exception, match=r".") as caught:
            align(config, folder)
    assert lost(caught.value)
    assert len(reason(caught.value).splitlines()) <= 12
    client = MlflowClient(config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("flowbp_ray").experiment_id])
    assert run.info.status == "FAILED"
    until = time.monotonic() + 60
    while ray.available_resources()["CPU"] < free or processes("Tracker") or processes("PolicyStore"):
        assert time.monotonic() < until, ray.available_resources()
        time.sleep(0.2)
    assert not serve.status().applications
    assert all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())

    align(configured(tmp_path), folder)
    one, two = final(outcome.folder), final(folder)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert points(config) == wanted
