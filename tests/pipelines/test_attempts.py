"""One attempt at a training: its progress bar, and how it ends. tests/e2e has it run."""

import io
import time
from pathlib import Path

import pytest
import ray
from ray.train import WorkerGroupError
from tqdm import tqdm

from flowbp_ray.config import load
from pipelines import runs
from pipelines.attempts import Parts, attempt, follow
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
