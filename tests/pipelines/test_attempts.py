"""One attempt at a training: its progress bar, and how it ends. tests/e2e has it run."""

import io
import time
from pathlib import Path

import pytest
import ray
from ray.train import WorkerGroupError
from tqdm import tqdm

from flowbp_ray.config import load
from pipelines import attempts, runs
from pipelines.attempts import PATIENCE, Parts, Patience, attempt, follow
from pipelines.causes import lost, reason
from pipelines.session import Session
from pipelines.stand_ins import Pace, Reward, Sampler, paced

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


def test_the_bar_shows_reward_pace_and_time_left():
    shown = io.StringIO()
    with tqdm(total=4, desc="starting", unit="step", file=shown, mininterval=0) as bar:
        follow(bar, None)
        follow(bar, (1, {"reward/preference": 3.14159, "objective": 1.0}))
        bar.refresh()
    last = shown.getvalue().split("\r")[-1]
    assert "align" in last
    assert "2/4" in last
    assert "preference=3.14" in last
    assert "objective" not in last


def test_patience_ends_once_and_by_the_pace_of_new_steps(monkeypatch):
    now = 0.0
    monkeypatch.setattr(attempts.time, "monotonic", lambda: now)
    patience, told = Patience(70), []  # a lost attempt had got there, and this one begins at 50
    for done in range(51, 73):
        now += 30
        told += [patience.ends(done), patience.ends(done)]
    assert not any(told)
    for seconds in (290, 11, 300):  # the longest step had 30
        now += seconds
        told.append(patience.ends(72))
    assert told[-3:] == [False, True, False]
    assert PATIENCE < 300


def test_storage_that_does_not_answer_is_not_what_went_wrong(monkeypatch, tmp_path):
    """A worker is lost while it does not: training goes on when it answers."""

    class Kept:
        asked = 0

        def __init__(self, *_):
            pass

        def mend(self):
            pass

        @property
        def steps(self):
            self.asked += 1
            if self.asked == 2:
                raise OSError("the checkpoints cannot be read")
            return 0

    def attempt(*_):
        attempts_made.append(1)
        if len(attempts_made) == 1:
            raise ray.exceptions.ActorDiedError
        return "trained"

    attempts_made = []
    monkeypatch.setattr(attempts, "Kept", Kept)
    monkeypatch.setattr(attempts, "attempt", attempt)
    config = load(SPARSE, [f"output={tmp_path}"])
    assert attempts.trained(config, [], tmp_path, None, []) == "trained"
    assert len(attempts_made) == 2


@pytest.mark.drill
def test_a_model_that_train_workers_cannot_load_ends_it_while_samplers_wait_for_its_weights(cluster, tmp_path):
    class Quiet:
        def progress(self):
            return None

        def warnings(self):
            return []

    def learner(config, rank):
        until = time.monotonic() + 60
        while not list(tmp_path.glob("loaded*")):  # the stream is begun before
            assert time.monotonic() < until
            time.sleep(0.1)
        raise ValueError("no such weights")

    class Loaded(paced(Sampler, Pace(0.01, 0.01, 0.01, sample_bytes=1000))):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            (tmp_path / f"loaded{time.monotonic_ns()}").touch()

    cpus = ["cluster.samplers=2", "cluster.sampler_cpus=0.1", "cluster.trainer_cpus=0.1"]
    config = load(SPARSE, [*cpus, "train.workers=2", "train.steps=3", f"output={tmp_path}"])
    folder, tracker = tmp_path / "run", ray.remote(Quiet).options(num_cpus=0).remote()
    runs.begin(config, folder, None)
    parts = Parts(Loaded, paced(Reward, Loaded.pace), learner)
    with tqdm(total=3, disable=True) as bar, pytest.raises(WorkerGroupError) as caught:
        attempt(config, ["a red ring"], folder, Session(tracker, "", {}), [], runs.Kept(config, folder), bar, parts)
    assert reason(caught.value) == "no such weights"
    assert not lost(caught.value)
    ray.kill(tracker)
