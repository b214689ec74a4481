"""The stream of rollouts on a real cluster, between stages that only wait."""

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import ray
from ray.data import DataContext

from flowbp_ray.config import load
from flowbp_ray.rollouts.stages import Sampling
from flowbp_ray.rollouts.stream import rollouts
from pipelines.machines import SPARSE
from pipelines.stand_ins import Pace, Reward, Sampler, paced

PACE = Pace(rollout=0.01, reward=0.01, update=0.0, sample_bytes=1024)
LAST = 3


@contextlib.contextmanager
def streaming():
    """In order, as in a run."""
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with DataContext.current(context):
        yield


def stream(lag, store, *more, parts=1, sampler=Sampler, reward=Reward, pace=PACE):
    """Of steps 0 to LAST, each of so many micro-batches."""
    settings = {"train.policy_lag": lag, "train.batch": 2 * parts, "train.micro_batch": 2, "train.steps": LAST + 1}
    settings |= {"cluster.samplers": 1, "cluster.sampler_cpus": 0.1}
    config = load(SPARSE, [*(f"{key}={value}" for key, value in settings.items()), *more])
    return rollouts(config, ["a red ring"], store, "", sampler=paced(sampler, pace), reward=paced(reward, pace))


def test_a_stage_and_a_train_worker_read_what_is_sampled_where_it_lies(cluster):
    """In the object store, which nobody may write to: whoever has made a copy may write to that."""

    class Open:
        """A policy store that has all versions."""

        async def admit(self, version):
            pass

        async def fetch(self, version):
            return []

    class Looking(Reward):
        """Notes whether it has a copy."""

        def work(self, block):
            copied = block["latents"].flags.writeable
            return super().work(block) | {"copied": np.full(len(block["step"]), copied)}

    store = ray.remote(Open).options(num_cpus=0).remote()
    with streaming():
        pace = replace(PACE, sample_bytes=2**20)
        blocks = list(stream(1, store, reward=Looking, pace=pace).iter_batches(batch_size=None))
    ray.kill(store)
    assert len(blocks) == LAST + 1
    assert not any(block["copied"].any() or block["latents"].flags.writeable for block in blocks)


@pytest.mark.parametrize(("lag", "samplers"), [(0, ()), (1, ("cluster.max_samplers=2",))], ids=["in samplers", "before the pool"])
def test_a_micro_batch_that_waits_for_its_version_keeps_no_other_one(cluster, lag, samplers):
    """An actor's tasks begin in any order: here each is let in once the one after it waits too."""

    class Reversed:
        """A policy store."""

        def __init__(self):
            self.asked, self.changed = set(), asyncio.Condition()

        async def admit(self, version):
            async with self.changed:
                self.asked.add(version)
                self.changed.notify_all()
                both = self.changed.wait_for(lambda: version == LAST - lag or version + 1 in self.asked)
                await asyncio.wait_for(both, timeout=60)

        async def fetch(self, version):
            return []

    store = ray.remote(Reversed).options(num_cpus=0).remote()
    with streaming():
        blocks = stream(lag, store, *samplers).iter_batches(batch_size=None)
        steps = [int(block["step"][0]) for block in blocks]
    ray.kill(store)
    assert steps == [0, 1, 2, 3]


def test_of_micro_batches_that_may_begin_the_first_one_does(cluster):
    """In whatever order they come, since rewards and train workers wait for them in theirs."""

    class Gate:
        """A policy store that lets nobody in before all ask, and the first to ask as the last one."""

        def __init__(self):
            self.asked, self.changed = 0, asyncio.Condition()

        async def admit(self, version):
            async with self.changed:
                self.asked += 1
                turn = self.asked
                self.changed.notify_all()
                await self.changed.wait_for(lambda: self.asked == 3)
            await asyncio.sleep(0.2 * (3 - turn))

    class Noted(Sampling):
        """Notes what it works on."""

        def work(self, block):
            worked.append(int(block["number"][0]))
            return {"step": np.zeros(1)}

    worked, store = [], ray.remote(Gate).options(num_cpus=0).remote()
    sampling = Noted(load(SPARSE, []), store)
    with ThreadPoolExecutor() as threads:
        for number in (3, 1, 7):
            asked = threads.submit(sampling, {"number": np.array([number])})
    asked.result()
    ray.kill(store)
    assert worked == [1, 3, 7]


@pytest.mark.parametrize("lag", [0, 1])
def test_no_more_is_sampled_than_the_steps_that_may_be_under_way(cluster, tmp_path, lag):
    """However long nobody learns from them: that is what bounds the object store."""

    class First:
        """A policy store that never has more than the first version."""

        async def admit(self, version):
            while version > 0:
                await asyncio.sleep(1)

        async def fetch(self, version):
            return []

    class Noted(Sampler):
        """Leaves a file for each micro-batch."""

        def work(self, block):
            (tmp_path / str(block["number"][0])).touch()
            return super().work(block)

    store = ray.remote(First).options(num_cpus=0).remote()
    with streaming():
        blocks = iter(stream(lag, store, parts=2, sampler=Noted).iter_batches(batch_size=None, prefetch_batches=0))
        steps = [int(next(blocks)["step"][0]) for _ in range(2 * (lag + 1))]
        time.sleep(2)
    assert steps == sorted([*range(lag + 1)] * 2)
    assert len(list(tmp_path.iterdir())) == len(steps)
    ray.kill(store)
    del blocks
