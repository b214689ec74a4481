"""The order in which a train worker fetches and works, and what it does where nothing is left to do."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowbp_ray.config import load
from flowbp_ray.training import worker
from flowbp_ray.training.checkpoints import Progress
from flowbp_ray.training.worker import Job, one_ahead, train_loop

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


def blocks(fetched, number):
    for n in range(number):
        fetched.append(n)
        yield {"step": n}


def test_the_next_block_is_fetched_while_one_is_worked_on_and_none_of_the_next_step():
    fetched, waiting = [], threading.Event()

    def coming():
        yield from blocks(fetched, 2)
        waiting.wait(10)
        yield from blocks(fetched, 2)

    stream = coming()
    with ThreadPoolExecutor(1) as fetching:
        step = one_ahead(stream, 3, fetching)
        assert next(step) == {"step": 0}
        assert next(step) == {"step": 1}  # though the third is not there
        waiting.set()
        assert next(step) == {"step": 0}
        assert next(step, "end") == "end"
        assert fetched == [0, 1, 0]
        assert list(one_ahead(stream, 2, fetching)) == [{"step": 1}, None]


def test_what_goes_wrong_in_the_stream_is_raised_where_the_block_is_asked_for():
    def broken():
        yield {"step": 0}
        raise OSError("the stage died")

    with ThreadPoolExecutor(1) as fetching:
        step = one_ahead(broken(), 2, fetching)
        assert next(step) == {"step": 0}
        with pytest.raises(OSError, match="the stage died"):
            next(step)


@pytest.mark.parametrize(("version", "stopped"), [(3, None), (1, "gradients grew tenfold")])
def test_a_run_that_is_finished_or_was_stopped_publishes_nothing_and_asks_for_nothing(tmp_path, monkeypatch, version, stopped):
    (tmp_path / "config.yaml").touch()
    learner = SimpleNamespace(progress=Progress(), version=version, publishes=True)

    def restore(folder):
        learner.progress = Progress(version=version, stopped=stopped)
        return {}

    learner.restore = restore
    ray_train = SimpleNamespace(  # neither a stream nor anything else
        get_context=lambda: SimpleNamespace(get_world_rank=lambda: 0),
        get_checkpoint=lambda: SimpleNamespace(as_directory=lambda: contextlib.nullcontext(str(tmp_path))),
    )
    monkeypatch.setattr(worker, "train", ray_train)
    config = load(SPARSE, ["train.steps=3"])
    assert train_loop(Job(config, tmp_path, None, None, "rewards", [], (), lambda *_: learner)) == stopped
