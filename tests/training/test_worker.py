"""What a train worker does where nothing is left to do."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowbp_ray.config import load
from flowbp_ray.training import worker
from flowbp_ray.training.checkpoints import Progress
from flowbp_ray.training.worker import Job, train_loop

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


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
