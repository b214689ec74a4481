"""The tracker in this process; tests/e2e has it as an actor."""

import numpy as np
import pytest
from mlflow import MlflowClient, MlflowException

from flowbp_ray.tracking.store import tracking_uri
from flowbp_ray.tracking.tracker import Tracker

CONFIG = {"model": {"path": "shapes"}, "surrogate": {"method": "sparse"}, "tracking": {"uri": None}}


@pytest.fixture
def make(tmp_path):
    """Trackers of one folder, each as after the one before died."""
    (tmp_path / "run").mkdir()
    return lambda: Tracker(tracking_uri(f"sqlite:///{tmp_path}/mlflow.db"), "tests", None, CONFIG, tmp_path / "run")


@pytest.fixture
def tracker(make):
    return make()


def pictures(value):
    return np.full((2, 8, 8, 3), value, np.uint8)


def test_it_knows_the_newest_step_and_the_first_and_last_pictures(tracker):
    assert tracker.progress() is None
    assert tracker.first_and_last() is None
    for version in range(3):
        tracker.metrics({"objective": float(version)}, version)
        tracker.previews(["a red ring", "a red ring"], pictures(version), version)
    tracker.figures({"eval/mean": 1.0}, 99)
    assert tracker.progress() == (2, {"objective": 2.0})
    first, last = tracker.first_and_last()
    assert (first == 0).all()
    assert (last == 2).all()


def test_every_prompt_has_its_own_pictures_by_step(tracker, tmp_path):
    """Also two that are alike, or that have what MLflow's keys cannot."""
    prompts = ["a ring: red?", "a ring: red?"]
    tracker.previews(prompts, pictures(7), 0)
    tracker.previews(prompts, pictures(9), 5)
    tracker.finish("FINISHED")
    client = MlflowClient(tracker.run.uri)
    run_id = tracker.info()["run_id"]
    paths = [f.path.removeprefix("images/").split("+") for f in client.list_artifacts(run_id, "images")]
    names = {(path[0], path[2]) for path in paths}
    assert len(names) == 4
    assert client.get_run(run_id).info.status == "FINISHED"


def history(tracker, metric):
    points = MlflowClient(tracker.run.uri).get_metric_history(tracker.run.run_id, metric)
    return [(p.step, p.value) for p in points]


def test_another_one_goes_on_where_it_was(make):
    first = make()
    first.text("two plans", "plans.txt")
    for step in range(3):
        first.metrics({"objective": step / 2, "seconds/step": 1.0 + step}, step)
    first.previews(["a red ring"], pictures(3)[:1], 0)
    first.warn(["after step 1: odd"])

    again = make()
    assert again.run.run_id == first.run.run_id
    assert again.warnings() == ["after step 1: odd"]
    again.warn(["after step 1: odd", "after step 3: odder"])
    for step in (2, 3):  # the second one is done again
        again.metrics({"objective": step / 2, "seconds/step": 9.0}, step)
    again.previews(["a red ring"], pictures(5)[:1], 3)
    again.finish("FINISHED")
    assert history(again, "objective") == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]
    assert history(again, "seconds/step") == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 9.0)]
    assert again.seconds() == {"step": [1.0, 2.0, 9.0, 9.0]}
    assert again.warnings() == ["after step 1: odd", "after step 3: odder"]
    first_pictures, last = again.first_and_last()
    assert (first_pictures == 3).all()
    assert (last == 5).all()
    client = MlflowClient(again.run.uri)
    assert len(client.list_artifacts(again.run.run_id, "images")) == 4  # two pictures, each with its thumbnail
    artifacts = {f.path for f in client.list_artifacts(again.run.run_id)}
    assert {"plans.txt", "warnings.txt"} <= artifacts


class BucketError(Exception):
    """As of a store of artifacts, whose library has errors of its own."""


class Down:
    """A server that answers again after some calls."""

    def __init__(self, client, calls, error=MlflowException):
        self.client, self.calls, self.error = client, calls, error

    def __getattr__(self, name):
        self.calls -= 1
        if self.calls >= 0:
            raise self.error("API request failed: connection refused")
        return getattr(self.client, name)


def test_a_line_that_was_being_written_is_no_line(make):
    first = make()
    first.metrics({"objective": 1.0}, 0)
    with (first.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "ti')
    again = make()
    again.run._client = Down(again.run._client, 10**6)
    again.metrics({"objective": 2.0}, 1)
    assert history(make(), "objective") == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize("error", [MlflowException, BucketError])
def test_training_goes_on_while_mlflow_does_not_answer_and_what_it_missed_is_sent_later(make, monkeypatch, error):
    monkeypatch.setattr("flowbp_ray.tracking.tracker.AGAIN", 0.0)
    monkeypatch.setattr("flowbp_ray.tracking.tracker.RESTS", 0)
    one = make()
    one.metrics({"objective": 0.0}, 0)
    one.run._client = Down(one.run._client, 3, error)
    for step in (1, 2):
        one.metrics({"objective": float(step)}, step)
    one.previews(["a red ring"], pictures(3)[:1], 2)
    assert history(one, "objective") == [(0, 0.0)]
    assert one.progress() == (2, {"objective": 2.0})
    (warning,) = one.warnings()
    assert warning.startswith("MLflow takes nothing at the moment; training goes on")
    one.metrics({"objective": 3.0}, 3)
    assert history(one, "objective") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    one.finish("FINISHED")


def test_what_mlflow_never_got_is_kept_and_said(make, monkeypatch):
    monkeypatch.setattr("flowbp_ray.tracking.tracker.AT_THE_END", 0.0)
    one = make()
    one.run._client = Down(one.run._client, 10**6)
    one.metrics({"objective": 1.0}, 0)
    with pytest.raises(RuntimeError, match=r"does not take 2 entries, which are in .* alone: .*connection refused"):
        one.finish("FINISHED")
    again = make()
    again.finish("FINISHED")
    assert history(again, "objective") == [(0, 1.0)]
    assert MlflowClient(again.run.uri).get_run(again.run.run_id).info.status == "FINISHED"


def test_figures_that_are_not_finite_are_refused_and_not_kept(tracker):
    with pytest.raises(ValueError, match="at step 4, not finite: objective = nan"):
        tracker.metrics({"objective": float("nan")}, 4)
    assert not (tracker.folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(("waited", "rest"), [(40, 400), (100, 600)])
def test_a_server_that_is_silent_is_left_alone_ten_times_as_long_as_it_was_waited_for(tracker, monkeypatch, waited, rest):
    now = [1000.0]

    def silent(*_):
        now[0] += waited
        raise MlflowException("timed out")

    monkeypatch.setattr("flowbp_ray.tracking.tracker.time.monotonic", lambda: now[0])
    monkeypatch.setattr(tracker.run, "metrics", silent)
    for step in range(3):
        tracker.figures({"loss": 1.0}, step)
    assert (now[0], tracker.not_before) == (1000 + waited, 1000 + waited + rest)
