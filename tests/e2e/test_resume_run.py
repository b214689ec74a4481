"""Alignments that are interrupted and go on, on a real local Ray cluster with a real MLflow store."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer
from pyarrow import fs
from ray import serve
from safetensors.torch import load_file

from flowbp_ray.config import load
from flowbp_ray.training.learner import Learner
from pipelines import alignment, attempts, runs
from pipelines.alignment import align
from pipelines.causes import lost, reason

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


def final(folder, steps=STEPS):
    return load_file(folder / f"checkpoint_{steps:06d}" / "state_0.safetensors")


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
    look = attempts.look

    def watched(bar, tracker, said):
        if runs.Kept(config, folder).steps > step:
            raise KeyboardInterrupt
        return look(bar, tracker, said)

    with monkeypatch.context() as patched:
        patched.setattr(attempts, "look", watched)
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
    judge = alignment.judged

    def judged(*arguments):
        judge(*arguments)
        raise KeyboardInterrupt  # as soon as its figures are logged

    with monkeypatch.context() as patched:
        patched.setattr(alignment, "judged", judged)
        with pytest.raises(KeyboardInterrupt):
            align(config, folder)
    assert runs.unfinished(config, tmp_path.glob("*")) == folder
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


def test_two_workers_go_on_to_the_weights_that_they_would_have_had(cluster, tmp_path, monkeypatch):
    weights = []
    for name in ("undisturbed", "interrupted"):
        config, folder = configured(tmp_path / name, "train.workers=2"), tmp_path / name / "run"
        if name == "interrupted":
            interrupted(config, folder, 0, monkeypatch)
        align(config, folder)
        weights.append(final(folder))
    one, two = weights
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def bucket():
    """A folder on a server that speaks S3, as a URI."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    fs.S3FileSystem(
        access_key="key", secret_key="secret", endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True
    ).create_dir("bucket")
    yield f"s3://key:secret@bucket/runs?endpoint_override={host}:{port}&scheme=http"
    server.stop()


def test_other_numbers_of_workers_and_samplers_go_on_to_the_same_weights_from_checkpoints_in_the_cloud(
    undisturbed, tmp_path, bucket, monkeypatch
):
    outcome, _ = undisturbed
    folder, storage = tmp_path / "run", f"train.storage={bucket}"
    interrupted(configured(tmp_path, storage), folder, 1, monkeypatch)
    assert not list(folder.glob("checkpoint*"))
    config = configured(tmp_path, storage, "train.workers=2", "cluster.samplers=2")
    assert runs.unfinished(config, tmp_path.glob("*")) == folder
    # The machine with the run's folder is lost, and what its last checkpoint says of it is all there is.
    shutil.rmtree(folder)
    folder.mkdir()
    there, place = fs.FileSystem.from_uri(bucket)
    last = Path(runs.Kept(config, folder).newest.path).name
    for name in attempts.IDENTITY:
        fs.copy_files(f"{place}/run/{last}/{name}", str(folder / name), source_filesystem=there)
    assert runs.unfinished(config, tmp_path.glob("*")) == folder
    align(config, folder)
    fs.copy_files(f"{place}/run", str(tmp_path / "fetched"), source_filesystem=there)
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and b"secret@" in f.read_bytes()]
    one, two = final(outcome.folder), final(tmp_path / "fetched")
    start = load_file(outcome.folder / "checkpoint_000001" / "state_0.safetensors")
    moved = torch.cat([(one[k] - start[k]).flatten() for k in one if k.startswith("raw.")]).norm()
    apart = torch.cat([(one[k] - two[k]).flatten() for k in one if k.startswith("raw.")]).norm()
    assert moved > 0
    assert apart <= 1e-4 * moved
    assert points(config)["images"] == ["0", "2", "3"]


def test_samplers_come_and_go_and_the_weights_are_the_same(cluster, tmp_path, monkeypatch, capsys):
    # As long as each has work more come, and then they wait for a reward that takes seconds.
    def rewarded(by):
        components = f'reward.components=[{{name: own, kind: function, path: "odd_rewards:{by}", weight: 1}}]'
        return components, "train.micro_batch=1", "train.steps=5"

    config, seen, look = configured(tmp_path, "cluster.max_samplers=3", *rewarded("slow")), [], attempts.look

    def watched(bar, tracker, said):
        if runs.Kept(config, tmp_path / "run").steps < 3:  # then the last step is sampled, and nobody is needed any more
            seen.append(len(processes("MapWorker(MapBatches(SamplerStage)")))
        return look(bar, tracker, said)

    with monkeypatch.context() as patched:
        patched.setattr(attempts, "look", watched)
        patched.setattr(attempts, "PATIENCE", 0)
        align(config, tmp_path / "run")
    most = seen.index(max(seen))
    assert 1 < seen[most] > min(seen[most:]) >= 1, seen
    assert re.search(r"no step for \d seconds: \{'CPU': .*\} are needed, free are", capsys.readouterr().err)
    fixed = align(configured(tmp_path / "fixed", *rewarded("brightness")), tmp_path / "fixed" / "run")
    one, two = final(fixed.folder, 5), final(tmp_path / "run", 5)
    assert all(torch.equal(one[name], two[name]) for name in one)


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
    plans = (folder / "plans.txt").read_text("utf-8")
    assert all(f"step {step}: " in plans for step in range(STEPS))  # those that it has got now too


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
    look, free = attempts.look, ray.available_resources()["CPU"]

    def watched(bar, tracker, said):
        if runs.Kept(config, folder).steps == 1:
            for number in processes("RayTrainWorker"):
                os.kill(number, signal.SIGKILL)
        return look(bar, tracker, said)

    with monkeypatch.context() as patched:
        patched.setattr(attempts, "look", watched)
        with pytest.raises(Exception, match=r".") as caught:
            align(config, folder)
    assert lost(caught.value)
    assert len(reason(caught.value).splitlines()) == 1, reason(caught.value)
    client = MlflowClient(config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("flowbp_ray").experiment_id])
    assert run.info.status == "FAILED"
    until = time.monotonic() + 60
    while ray.available_resources()["CPU"] < free or processes("Tracker") or processes("PolicyStore"):
        left = {title: processes(title) for title in ("Tracker", "PolicyStore")}
        assert time.monotonic() < until, (ray.available_resources()["CPU"], free, left)
        time.sleep(0.2)
    assert not serve.status().applications
    assert all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())

    align(configured(tmp_path), folder)
    one, two = final(outcome.folder), final(folder)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert points(config) == wanted


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, with room for two checkpoints and not for three, and what gives it more."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield place, lambda: subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_ends_the_run_with_a_sentence_and_with_more_room_it_goes_on(undisturbed, tmp_path, small_disk):
    outcome, wanted = undisturbed
    place, enlarge = small_disk
    config = configured(tmp_path, f"output={place}")
    folder = place / "run"
    with pytest.raises(Exception, match=r".") as caught:
        align(config, folder)
    assert "No space left on device" in reason(caught.value)
    assert len(reason(caught.value).splitlines()) == 1, reason(caught.value)
    assert 1 <= runs.Kept(config, folder).steps < STEPS
    enlarge()
    assert runs.unfinished(config, place.glob("*")) == folder
    align(config, folder)
    one, two = final(outcome.folder), final(folder)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert points(config) == wanted


def test_gradients_that_stay_not_finite_are_skipped_counted_kept_and_then_end_the_run(cluster, tmp_path):
    settings = ("train.velocity_penalty=1e300", "train.max_skipped=1", "evaluation.preview_prompts=0")  # infinite in float32
    config, folder = configured(tmp_path, *settings), tmp_path / "run"
    with pytest.raises(Exception, match=r".") as caught:
        align(config, folder)
    assert not lost(caught.value)
    said = reason(caught.value)
    assert said.startswith("the gradient of step 1 is not finite, so no update was made (2 in a row; what it was is in ")
    assert said.endswith("allows 1 in a row; lower train.learning_rate, or compute in float32 (model.dtype)")
    kept = folder / "not_finite_000000"
    assert {f.name for f in kept.glob("*.npz")} == {"blocks_0_0.npz", "blocks_0_1.npz"}
    learner = Learner(config)
    learner.restore(kept)
    for block in sorted(kept.glob("*.npz")):
        with np.load(block, allow_pickle=False) as columns:
            learner.accumulate(dict(columns))
    assert not np.isfinite(learner.update())
    client = MlflowClient(config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("flowbp_ray").experiment_id])
    assert [p.value for p in client.get_metric_history(run.info.run_id, "skipped_updates")] == [1.0]
    assert len((folder / "warnings.txt").read_text().splitlines()) == 2
