"""One run on a real SQLite store, read back by MLflow's own client."""

import contextlib
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

from flowbp_ray.config import load
from flowbp_ray.tracking import run as tracked
from flowbp_ray.tracking.run import TrackedRun, code_version, flattened
from flowbp_ray.tracking.store import tracking_uri

CONFIG = {
    "model": {"path": "shapes", "revision": None},
    "surrogate": {"method": "sparse", "active_steps": 4},
    "reward": {"components": [{"name": "preference", "weight": 1.0}, {"name": "judge", "weight": 0.0}]},
    "adapter": {"targets": ["to_q", "to_k"], "empty": {}},
    "train": {"learning_rate": 1e-5, "resume": False},
    "tracking": {"uri": None},
    "long": "ö" * 501,
}
PICTURE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
COMMITTING = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false", "commit", "-q", "-m", "one"]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One store for all: MLflow takes seconds to make a database. Its path has what URIs quote."""
    return tracking_uri(f"sqlite:///{tmp_path_factory.mktemp('a store')}/mlflow.db")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], COMMITTING):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def start(uri, checkout, monkeypatch, tmp_path):
    """Start or continue a run, in another working directory each time."""
    monkeypatch.setattr(tracked, "CHECKOUT", checkout)
    folders = iter(range(9))

    def new(config=CONFIG, experiment="tests", after=None):
        folder = tmp_path / f"cwd{next(folders)}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        if after is None:
            return TrackedRun(uri, experiment, "a run", config=config)
        run = TrackedRun.known(uri, after.experiment_id, after.run_id)
        run.go_on(config)
        return run

    yield new
    assert not list(tmp_path.glob("cwd*/*"))  # nothing was written where the process happened to be


@pytest.fixture(scope="module")
def client(uri):
    return MlflowClient(uri)


def points(client, run, key):
    return [(p.step, p.value) for p in client.get_metric_history(run.run_id, key)]


def images(client, run):
    """Key, step and pixels of the full-size pictures, as the UI finds them."""
    paths = [f.path for f in client.list_artifacts(run.run_id, "images") if f.path.endswith(".png")]
    found = [re.fullmatch(r"images/(.+)\+step\+(\d+)\+timestamp\+.*", p) for p in paths]
    return {
        (m[1].replace("~", "/"), int(m[2])): np.asarray(Image.open(client.download_artifacts(run.run_id, p)))
        for m, p in zip(found, paths, strict=True)
    }, len(paths)


def test_one_point_per_metric_and_step_also_after_continuing(start, client):
    run = start()
    run.metrics({"reward/preference": 0.5, "objective": np.float32(0.25), "eval/base/six tasks": 1}, step=0)
    run.metrics({"reward/preference": 0.75, "reward/judge": 2.0}, step=0)
    run.metrics({"reward/preference": 0.75}, step=1)
    again = start(after=run)
    again.metrics({"reward/preference": 9.0, "objective": 9.0, "grad_norm": 1.5}, step=0)
    again.metrics({"reward/preference": 1.0}, step=2)
    again.metrics({}, step=3)
    assert points(client, run, "reward/preference") == [(0, 0.5), (1, 0.75), (2, 1.0)]
    assert points(client, run, "reward/judge") == [(0, 2.0)]
    assert points(client, run, "objective") == [(0, 0.25)]
    assert points(client, run, "grad_norm") == [(0, 1.5)]
    assert points(client, run, "eval/base/six tasks") == [(0, 1.0)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_metric_that_is_not_finite_is_refused_with_its_batch(start, client, value):
    run = start()
    with pytest.raises(ValueError, match=r"at step 7, not finite: reward/judge = "):
        run.metrics({"objective": 1.0, "reward/judge": value}, step=7)
    assert client.get_run(run.run_id).data.metrics == {}


def test_parameters_tags_and_the_configuration(start, client, checkout, uri):
    run = start()
    data = client.get_run(run.run_id).data
    assert data.params == flattened(CONFIG)
    assert data.params["reward.components.1.name"] == "judge"
    assert data.params["adapter.targets"] == '["to_q", "to_k"]'
    assert data.params["train.learning_rate"] == "1e-05"
    assert (data.params["model.revision"], data.params["adapter.empty"], data.params["train.resume"]) == ("null", "{}", "false")
    assert re.fullmatch(r"see resolved_config.yaml \(501 characters, sha256 \w{12}\)", data.params["long"])
    config = Path(client.download_artifacts(run.run_id, "resolved_config.yaml"))
    assert yaml.safe_load(config.read_text(encoding="utf-8")) == CONFIG
    assert data.tags["method"] == "sparse"
    assert data.tags.items() >= code_version(checkout).items()
    info = client.get_run(run.run_id).info
    assert (info.run_name, info.status) == ("a run", "RUNNING")
    assert info.artifact_uri.startswith("file:///")
    assert "a%20store" in info.artifact_uri
    assert run.info()["page"].endswith(f"#/experiments/{info.experiment_id}/runs/{run.run_id}")
    assert shlex.split(run.info()["command"]) == [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]


def test_the_project_reads_its_configuration_back(start, client):
    shipped = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
    config = load(shipped, ["tracking.run_name='1e-3'", "tracking.experiment='true'", "train.learning_rate=1e-5"])
    run = start(config.model_dump(mode="json"))
    assert load(Path(client.download_artifacts(run.run_id, "resolved_config.yaml")), []) == config


def test_more_parameters_than_one_mlflow_batch(start, client):
    many = CONFIG | {"many": {f"setting{i}": i for i in range(250)}}
    assert client.get_run(start(many).run_id).data.params == flattened(many)


def test_continuing_with_other_settings_keeps_the_parameters_and_says_so(start, client):
    run = start()
    run.finish("FAILED")
    other = CONFIG | {"train": {"learning_rate": 1e-4, "resume": False, "steps": 9}, "long": "o" * 501}
    again = start(other, after=run)
    found = client.get_run(run.run_id)
    assert again.run_id == run.run_id
    assert found.info.status == "RUNNING"
    assert found.data.params == flattened(CONFIG)
    assert found.data.tags["continued_with_other"] == "long train.learning_rate train.steps"
    config = Path(client.download_artifacts(run.run_id, "resolved_config_continued.yaml"))
    assert yaml.safe_load(config.read_text(encoding="utf-8")) == other
    start(after=run)
    assert client.get_run(run.run_id).data.tags["continued_with_other"] == ""


def test_pictures_are_found_by_key_and_step_once(start, client):
    run = start()
    run.picture("previews/a_red-ring.0", PICTURE, step=0)
    run.picture("previews/a_red-ring.0", PICTURE // 2, step=0)
    again = start(after=run)
    again.picture("previews/a_red-ring.0", PICTURE // 2, step=0)
    again.picture("previews/a_red-ring.0", PICTURE[:, ::-1], step=20)
    found, files = images(client, run)
    assert files == 2
    np.testing.assert_array_equal(found["previews/a_red-ring.0", 0], PICTURE)
    np.testing.assert_array_equal(found["previews/a_red-ring.0", 20], PICTURE[:, ::-1])
    assert client.get_run(run.run_id).data.tags["mlflow.loggedImages"] == "True"  # what makes the UI show the slider


@pytest.mark.parametrize("array", [PICTURE.astype(np.float32), PICTURE[:, :, 0], np.zeros((4, 4, 4), np.uint8)])
def test_only_uint8_rgb_is_a_picture(start, array):
    with pytest.raises(ValueError, match=r"has to be uint8 of shape \(H, W, 3\)"):
        start().picture("previews/0", array, step=0)


def test_files_and_folders(start, client, tmp_path):
    run = start()
    (tmp_path / "adapter" / "deep").mkdir(parents=True)
    (tmp_path / "adapter" / "deep" / "weights").write_bytes(b"w")
    run.artifact(tmp_path / "adapter", "export")
    run.artifact(tmp_path / "adapter" / "deep" / "weights")
    run.text("| a | b |", "evaluation/table.md")
    assert Path(client.download_artifacts(run.run_id, "export/adapter/deep/weights")).read_bytes() == b"w"
    assert Path(client.download_artifacts(run.run_id, "weights")).read_bytes() == b"w"
    assert Path(client.download_artifacts(run.run_id, "evaluation/table.md")).read_text() == "| a | b |"
    with pytest.raises(ValueError, match="depends on the working directory"):
        run.artifact(Path("weights"))
    with pytest.raises(FileNotFoundError, match="there is no /nowhere"):
        run.artifact(Path("/nowhere"))


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_status(start, client, status):
    run = start()
    run.finish(status)
    info = client.get_run(run.run_id).info
    assert info.status == status
    assert info.end_time >= info.start_time


@pytest.mark.parametrize(("error", "status"), [(None, "FINISHED"), (OSError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_block_ends_the_run(start, client, error, status):
    with contextlib.suppress(OSError, KeyboardInterrupt), start() as run:
        if error:
            raise error
    assert client.get_run(run.run_id).info.status == status


def test_a_store_that_is_gone_does_not_hide_the_error_of_a_block(start):
    def block():
        with start() as run:
            run.run_id = "0" * 32
            raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        block()


def test_the_working_directory_does_not_matter_between_calls(start, client, monkeypatch):
    run = start()
    monkeypatch.chdir("/")
    run.metrics({"objective": 1.0}, step=0)
    run.text("text", "text.txt")
    assert points(client, run, "objective") == [(0, 1.0)]
    assert Path(client.download_artifacts(run.run_id, "text.txt")).read_text() == "text"


def test_what_cannot_be_continued_or_started(start):
    gone = start()
    gone.run_id = "0" * 32
    with pytest.raises(MlflowException, match="not found"):
        start(after=gone)
    with pytest.raises(ValueError, match="name another one"):
        start(experiment="Default")


def test_no_password_in_what_is_kept_or_a_person_is_told(start, client):
    storage = {"storage": "s3://key:secret@bucket/runs"}
    run = start(CONFIG | {"tracking": {"experiment": "e", "uri": "postgresql://me:secret/word@host/db"}, "train": storage})
    assert client.get_run(run.run_id).data.params["tracking.uri"] == "postgresql://me:***@host/db"
    config = Path(client.download_artifacts(run.run_id, "resolved_config.yaml"))
    assert yaml.safe_load(config.read_text())["tracking"] == {"experiment": "e", "uri": "postgresql://me:***@host/db"}
    assert client.get_run(run.run_id).data.params["train.storage"] == "s3://key:***@bucket/runs"
    assert "secret" not in config.read_text()
    run.uri = "https://me:secret@tracking/"
    assert run.info()["page"].startswith("https://me:***@tracking/#/experiments/")
    run.uri = "postgresql://me:secret@host/db"
    assert run.info()["command"].endswith("'postgresql://me:***@host/db'")


def test_the_code_version(checkout, tmp_path):
    tags = code_version(checkout)
    assert re.fullmatch(r"[0-9a-f]{40}", tags["git.commit"])
    assert tags["git.changed"] == "false"
    (checkout / "file").write_text("two")
    assert code_version(checkout)["git.changed"] == "true"
    (checkout / "file").write_text("one")
    inside = checkout / "installed"  # say site-packages of a virtual environment in somebody's repository
    inside.mkdir()
    (inside / "flowbp_ray").mkdir()
    versions = []
    for source in ("one = 1", "one = 2", "one = 1"):
        (inside / "flowbp_ray" / "module.py").write_text(source)
        tags = code_version(inside)
        assert set(tags) == {"flowbp_ray.version"}
        versions.append(tags["flowbp_ray.version"])
    assert re.fullmatch(r"\S+\+sources\.[0-9a-f]{12}", versions[0])
    assert versions[0] == versions[2] != versions[1]
    (tmp_path / ".git").mkdir()
    assert code_version(tmp_path)["git.commit"].startswith("unknown: fatal: not a git repository")


def test_prompts_are_datasets_by_what_they_contain(start, uri):
    first, again, other = start(), start(), start()
    for run, prompts in ((first, ["a", "b"]), (again, ["a", "b"]), (other, ["a", "c"])):
        for _ in range(2):  # as a run that goes on
            run.prompts("/somewhere/prompts.txt", prompts, "training")
    client = MlflowClient(uri)
    inputs = [client.get_run(r.run_id).inputs.dataset_inputs for r in (first, again, other)]
    assert [len(of) for of in inputs] == [1, 1, 1]
    names, digests = ({getattr(i.dataset, k) for (i,) in inputs} for k in ("name", "digest"))
    assert names == {"prompts.txt"}
    assert len(digests) == 2
    assert inputs[0][0].dataset.digest == inputs[1][0].dataset.digest
    assert {t.key: t.value for t in inputs[0][0].tags} == {"mlflow.data.context": "training"}
    found = client.search_runs([first.experiment_id], "dataset.name = 'prompts.txt'")
    assert {first.run_id, again.run_id, other.run_id} <= {r.info.run_id for r in found}
