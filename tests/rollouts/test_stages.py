"""What every stage notes of itself, what it works on first, and how a sampler has its policies."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ray

from flowbp_ray.config import load
from flowbp_ray.rollouts.policy import PolicyStore
from flowbp_ray.rollouts.stages import Sampling, Stage, sample_bytes
from pipelines.machines import SPARSE

LAG_0 = load(SPARSE, ["train.policy_lag=0"])
PARTS = LAG_0.train.batch // LAG_0.train.micro_batch


class Noted(Stage):
    name = "stage"

    def work(self, block):
        return block | {"latents": np.zeros((2, 3), np.float32)}


def block():
    return {"step": np.zeros(2, np.int64), "part": np.zeros(2, np.int64), "prompt": np.array(["a ring", "zwölf"], dtype=object)}


def test_waiting_is_from_one_block_to_the_next_and_bytes_are_of_what_is_handed_on():
    stage = Noted()
    first = stage(block())
    assert first["stage_waiting_seconds"].tolist() == [0, 0]
    assert first["stage_bytes"].tolist() == [(2 * 2 * 8 + 6 + 6 + 2 * 3 * 4) / 2] * 2
    time.sleep(0.2)
    assert stage(block())["stage_waiting_seconds"].sum() >= 0.2


def test_bytes_of_texts_are_utf_8():
    assert sample_bytes(block()) == (2 * 2 * 8 + 6 + 6) / 2


def test_of_what_it_was_given_it_works_on_what_comes_first():
    """In whatever order that came: rewards for one that is late keep all train workers waiting."""

    class Noting(Noted):
        """Notes what it works on, and waits for the word."""

        def work(self, block):
            worked.append((int(block["step"][0]), int(block["part"][0])))
            assert go.wait(60)
            return super().work(block)

    worked, go, stage = [], threading.Event(), Noting()
    places = [(1, 3), (2, 0), (1, 5), (1, 4)]
    with ThreadPoolExecutor() as threads:
        results = []
        for number, (step, part) in enumerate(places, 1):
            results.append(threads.submit(stage, block() | {"step": np.full(2, step), "part": np.full(2, part)}))
            while len(stage.given) < number or not worked:
                assert not results[-1].done(), results[-1].result()
                time.sleep(0.001)
        go.set()
        for result in results:
            result.result(timeout=60)
    assert worked == [(1, 3), (1, 4), (1, 5), (2, 0)]


class Loading(Sampling):
    """Loads the version of each micro-batch."""

    loaded: list[tuple[int, list[str]]]

    def work(self, block):
        version = int(block["number"][0]) // PARTS
        self.loaded.append((version, list(self.chunks(version))))
        return {"step": np.zeros(1)}


def of(number):
    return {"number": np.array([number])}


def test_a_sampler_loads_what_it_was_told_or_asks_again_and_keeps_none(cluster):
    class Counting(PolicyStore):
        """Counts what it is asked."""

        asked = 0

        async def fetch(self, version):
            self.asked += 1
            return await super().fetch(version)

        async def all_asked(self):
            return self.asked

    store = ray.remote(Counting).options(num_cpus=0).remote(1)
    for version in (0, 1):
        ray.get(store.publish.remote(version, 0, [ray.put(f"chunk {version} {n}") for n in (0, 1)]))
    sampling = Loading(LAG_0, store)
    sampling.loaded = []
    for number in (0, PARTS, 1):  # the last one again, as where a machine was lost
        sampling(of(number))
        assert not sampling.told
    asked = ray.get(store.all_asked.remote())
    ray.kill(store)
    assert sampling.loaded == [(version, [f"chunk {version} {n}" for n in (0, 1)]) for version in (0, 1, 0)]
    assert asked == 3


def test_a_version_that_is_told_again_when_it_is_loaded_is_not_kept(cluster):
    """Both micro-batches of it were waiting: nobody would ever load it from there."""

    class Slow:
        """Tells one when both have asked, and the other one later."""

        def __init__(self):
            self.asked, self.both, self.later = 0, asyncio.Event(), asyncio.Event()

        async def fetch(self, version):
            self.asked += 1
            first = self.asked == 1
            if not first:
                self.both.set()
            await (self.both if first else self.later).wait()
            return []

        async def tell(self):
            self.later.set()

        async def number(self):
            return self.asked

    class Once(Loading):
        """Has the weights for the second one."""

        def work(self, block):
            return {"step": np.zeros(1)} if self.loaded else super().work(block)

    store = ray.remote(Slow).options(num_cpus=0).remote()
    sampling = Once(LAG_0, store)
    sampling.loaded = []
    with ThreadPoolExecutor() as threads:
        first = threads.submit(sampling, of(0))
        while ray.get(store.number.remote()) < 1:
            time.sleep(0.01)
        second = threads.submit(sampling, of(1))
        first.result(timeout=60)
        ray.get(store.tell.remote())
        second.result(timeout=60)
    ray.kill(store)
    assert sampling.loaded == [(0, [])]
    assert not sampling.told
