"""What a train worker does at its start, and where nothing is left to do."""

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowbp_ray.config import load
from flowbp_ray.training import checkpoints, worker
from flowbp_ray.training.checkpoints import Progress
from flowbp_ray.training.worker import Job, begun, train_loop

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


@pytest.mark.parametrize(("version", "stopped"), [(3, None), (1, "gradients grew tenfold")])
def test_a_run_that_is_finished_or_was_stopped_loads_nothing_and_asks_for_nothing(tmp_path, monkeypatch, version, stopped):
    (tmp_path / "config.yaml").touch()
    checkpoints.write(tmp_path, 0, 1, {}, {}, Progress(version=version, stopped=stopped))
    ray_train = SimpleNamespace(  # neither a stream nor anything else
        get_context=lambda: SimpleNamespace(get_world_rank=lambda: 0),
        get_checkpoint=lambda: SimpleNamespace(as_directory=lambda: contextlib.nullcontext(str(tmp_path))),
    )
    monkeypatch.setattr(worker, "train", ray_train)
    config = load(SPARSE, ["train.steps=3", "watch.stop=true"])
    assert train_loop(Job(config, tmp_path, None, None, "rewards", [], (), lambda *_: pytest.fail("a model"))) == stopped
    if stopped:  # a false alarm
        monkeypatch.setattr(worker, "TrainWorker", lambda *_: SimpleNamespace(run=lambda: "went on"))
        assert train_loop(Job(load(SPARSE, ["train.steps=3"]), tmp_path, None, None, "rewards", [], ())) == "went on"


def test_the_stream_begins_before_anybody_asks_and_gives_all_in_order():
    asked, given = threading.Event(), threading.Event()

    def made():
        asked.set()
        given.wait(10)
        yield from range(3)

    blocks = begun(made())
    assert asked.wait(10)
    given.set()
    assert list(blocks) == [0, 1, 2]
    with pytest.raises(ValueError, match="no such model"):
        next(begun(failing()))
    assert next(begun(iter(()))) is None


def failing():
    yield from ()
    raise ValueError("no such model")


def test_pictures_are_logged_while_the_next_step_is_done(monkeypatch):
    told = SimpleNamespace(remote=lambda *_: "pictures"), SimpleNamespace(remote=lambda *_: "diversity")
    one = worker.TrainWorker.__new__(worker.TrainWorker)
    tracker = SimpleNamespace(previews=told[0], figures=told[1])
    one.job, one.rank, one.logged = SimpleNamespace(preview=[("a red ring", 1)], tracker=tracker), 0, []
    one.config = load(SPARSE, ["evaluation.preview_seeds=2"])
    one.learner = SimpleNamespace(preview=lambda prompts, seeds: torch.zeros(1, 4, 8, 8), version=3)
    one.look = lambda latents, prompts: np.zeros((1, 8, 8, 3), np.uint8)
    waited = []
    monkeypatch.setattr(worker.ray, "get", waited.extend)
    one.show()
    assert (waited, one.logged) == ([], ["pictures", "diversity"])
    one.settle()
    assert (waited, one.logged) == (["pictures", "diversity"], [])
