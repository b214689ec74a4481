"""The tracker in this process; tests/e2e has it as an actor."""

import numpy as np
import pytest
from mlflow import MlflowClient

from flowbp_ray.tracking.store import tracking_uri
from flowbp_ray.tracking.tracker import Tracker

CONFIG = {"model": {"path": "shapes"}, "surrogate": {"method": "sparse"}, "tracking": {"uri": None}}


@pytest.fixture
def tracker(tmp_path):
    return Tracker(tracking_uri(f"sqlite:///{tmp_path}/mlflow.db"), "tests", None, CONFIG)


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
