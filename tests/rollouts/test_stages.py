"""What every stage notes of itself, and what it works on first."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flowbp_ray.config import load
from flowbp_ray.rollouts.stages import Rewarding, Timed, sample_bytes
from pipelines.machines import SPARSE


class Stage(Timed):
    name = "stage"

    def work(self, block):
        return block | {"latents": np.zeros((2, 3), np.float32)}


def block():
    return {"step": np.zeros(2, np.int64), "prompt": np.array(["a ring", "zwölf"], dtype=object)}


def test_waiting_is_from_one_block_to_the_next_and_bytes_are_of_what_is_handed_on():
    stage = Stage()
    first = stage(block())
    assert first["stage_waiting_seconds"].tolist() == [0, 0]
    assert first["stage_bytes"].tolist() == [(2 * 8 + 6 + 6 + 2 * 3 * 4) / 2] * 2
    time.sleep(0.2)
    assert stage(block())["stage_waiting_seconds"].sum() >= 0.2


def test_bytes_of_texts_are_utf_8():
    assert sample_bytes(block()) == (2 * 8 + 6 + 6) / 2


def test_the_first_of_what_is_there_is_rewarded_first():
    """Whatever came first: in a run's order across steps, one at a time."""
    done, at_work, going = [], threading.Event(), threading.Event()

    class Stage(Rewarding):
        def work(self, block):
            at_work.set()
            assert going.wait(60)
            done.append((int(block["step"][0]), int(block["part"][0])))
            return block

    stage = Stage(load(SPARSE, ["train.batch=4", "train.micro_batch=2"]))
    with ThreadPoolExecutor(4) as threads:
        waiting = []
        for here, (step, part) in enumerate([(1, 0), (2, 0), (1, 1), (0, 1)], start=1):
            given = {"step": np.full(2, step), "part": np.full(2, part), "prompt": np.array(["a", "b"], dtype=object)}
            waiting.append(threads.submit(stage, given))
            while len(stage.given) < here and not waiting[-1].done():
                time.sleep(0.01)
            assert at_work.wait(60)  # the first one, before there is another
        going.set()
        for one in waiting:
            one.result(timeout=60)
    assert done == [(1, 0), (0, 1), (1, 1), (2, 0)]
