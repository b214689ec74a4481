"""The stream of rollouts on a real cluster, between stages that only wait."""

import asyncio
import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from ray.data import DataContext
from ray.data._internal.execution import streaming_executor_state as executor

from flowbp_ray.config import load
from flowbp_ray.rollouts.stages import Sampling
from flowbp_ray.rollouts.stream import InTurn, rollouts
from flowbp_ray.rollouts.turns import AtOnce
from pipelines.machines import SPARSE
from pipelines.stand_ins import Pace, Reward, Sampler, paced

PACE = Pace(rollout=0.01, reward=0.01, update=0.0, sample_bytes=1024)
LAST = 3


@contextlib.contextmanager
def streaming():
    """Without bars."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    with DataContext.current(context):
        yield


def stream(lag, store, *more, parts=1, sampler=Sampler, reward=Reward, pace=PACE):
    """Of steps 0 to LAST, each of so many micro-batches."""
    settings = {"train.policy_lag": lag, "train.batch": 2 * parts, "train.micro_batch": 2, "train.steps": LAST + 1}
    settings |= {"cluster.samplers": 1, "cluster.sampler_cpus": 0.1}
    config = load(SPARSE, [*(f"{key}={value}" for key, value in settings.items()), *more])
    return rollouts(config, ["a red ring"], store, "", sampler=paced(sampler, pace), reward=paced(reward, pace))


def open_store():
    """A policy store that has all versions."""

    class Open:  # here, it is sent to its process as it is
        async def fetch(self, version):
            return []

    return ray.remote(Open).options(num_cpus=0).remote()


def test_a_stage_and_a_train_worker_read_what_is_sampled_where_it_lies(cluster):
    """In the object store, which nobody may write to: whoever has made a copy may write to that."""

    class Looking(Reward):
        """Notes whether it has a copy."""

        def work(self, block):
            copied = block["latents"].flags.writeable
            return super().work(block) | {"copied": np.full(len(block["step"]), copied)}

    store = open_store()
    with streaming():
        pace = replace(PACE, sample_bytes=2**20)
        blocks = list(stream(1, store, reward=Looking, pace=pace).iter_batches(batch_size=None))
    ray.kill(store)
    assert len(blocks) == LAST + 1
    assert not any(block["copied"].any() or block["latents"].flags.writeable for block in blocks)


def test_the_executor_waits_for_more_to_be_done_as_long_as_it_is_told_to(cluster):
    name = "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S"
    assert name in executor.process_completed_tasks.__code__.co_names  # not a copy of its value
    store = open_store()
    with streaming():
        (iterator,) = stream(1, store).streaming_split(1)
        next(iter(iterator.iter_batches(batch_size=None)))
    waits = ray.get(iterator._coord_actor.__ray_call__.remote(lambda _: vars(sys.modules[executor.__name__])[name]))
    ray.kill(store)
    assert waits == AtOnce.gathers


@pytest.mark.parametrize("handing_on", [False, True])
def test_the_executor_looks_when_the_first_task_is_done_or_something_is_to_be_handed_on(cluster, handing_on):
    @ray.remote(num_cpus=0)
    class Task:
        def __init__(self):
            self.done = asyncio.Event()

        async def run(self):
            await self.done.wait()

        async def end(self):
            self.done.set()

    class Patient(AtOnce):
        looks_anyway = None

    actors = [Task.remote() for _ in range(2)]
    tasks = [actor.run.remote() for actor in actors]
    if not handing_on:
        ray.get(actors[1].end.remote())
    operator = SimpleNamespace(
        has_next=lambda: handing_on,
        get_active_tasks=lambda: [SimpleNamespace(get_waitable=lambda task=task: task) for task in tasks],
    )
    Patient().on_execution_step(SimpleNamespace(_topology=[operator]))  # it returns
    assert ray.wait(tasks, num_returns=2, timeout=0)[0] == ([] if handing_on else tasks[1:])
    for actor in actors:
        ray.kill(actor)


def reversing_store(last):
    """A policy store that lets each in once the one after it waits too, up to the ``last``; it says whether one came too late."""

    class Reversing:
        def __init__(self):
            self.asked, self.changed, self.late = set(), asyncio.Condition(), False

        async def fetch(self, which):
            async with self.changed:
                self.asked.add(which)
                self.changed.notify_all()
                both = self.changed.wait_for(lambda: which == last or which + 1 in self.asked)
                try:
                    await asyncio.wait_for(both, timeout=30)
                except TimeoutError:
                    self.late = True
            return []

        async def was_late(self):
            return self.late

    return ray.remote(Reversing).options(num_cpus=0).remote()


def test_a_micro_batch_that_waits_in_a_sampler_keeps_no_other_one(cluster):
    """An actor's tasks begin in any order."""

    class ByNumber(Sampler):
        """Asks for micro-batches, not for versions."""

        def admit(self, block):
            ray.get(self.store.fetch.remote(int(block["number"][0])))

        def chunks(self, version):
            return []

    store = reversing_store(2 * (LAST + 1) - 1)
    with streaming():
        blocks = stream(0, store, parts=2, sampler=ByNumber).iter_batches(batch_size=None)
        steps = [int(block["step"][0]) for block in blocks]
    late = ray.get(store.was_late.remote())
    ray.kill(store)
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not late


def test_where_samplers_come_and_go_a_micro_batch_that_waits_for_its_version_keeps_no_other_one(cluster):
    store = reversing_store(LAST - 1)
    with streaming():
        blocks = stream(1, store, "cluster.max_samplers=2").iter_batches(batch_size=None)
        steps = [int(block["step"][0]) for block in blocks]
    late = ray.get(store.was_late.remote())
    ray.kill(store)
    assert steps == [0, 1, 2, 3]
    assert not late


def test_of_micro_batches_that_may_begin_the_first_one_does(cluster):
    """In whatever order they come, since rewards and train workers wait for them in theirs."""

    class Gate:
        """A policy store that lets nobody in before all ask, and the first to ask as the last one."""

        def __init__(self):
            self.asked, self.changed = 0, asyncio.Condition()

        async def fetch(self, version):
            async with self.changed:
                self.asked += 1
                turn = self.asked
                self.changed.notify_all()
                await self.changed.wait_for(lambda: self.asked == 3)
            await asyncio.sleep(0.2 * (3 - turn))
            return []

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


def test_one_micro_batch_is_worked_on_at_a_time_and_an_error_keeps_none_of_the_others(cluster):
    """Also where one with a lower number comes while a higher one is worked on."""

    class Slow(Sampling):
        """Notes begin and end, and fails once."""

        def work(self, block):
            number = int(block["number"][0])
            worked.append(("begin", number))
            time.sleep(0.5)
            worked.append(("end", number))
            if number == 5:
                raise ValueError("five")
            return {"step": np.zeros(1)}

    worked, store = [], open_store()
    sampling = Slow(load(SPARSE, []), store)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(sampling, {"number": np.array([5])})
        while not worked:
            time.sleep(0.01)
        others = [threads.submit(sampling, {"number": np.array([number])}) for number in (1, 7)]
    with pytest.raises(ValueError, match="five"):
        first.result()
    assert all(other.result() for other in others)
    ray.kill(store)
    assert worked == [(what, number) for number in (5, 1, 7) for what in ("begin", "end")]


def test_at_lag_0_a_sampler_has_nothing_at_hand_that_another_one_could_begin(cluster):
    """Of each step one waits until the others are sampled, which they never would be if its sampler had one of them."""

    class Steps:
        """A policy store that has the next version when a step is sampled."""

        def __init__(self):
            self.sampled, self.asked, self.changed = [], [], asyncio.Condition()

        async def fetch(self, version):
            self.asked.append(version)
            await self.until(4 * version)
            return []

        async def until(self, number):
            async with self.changed:
                await asyncio.wait_for(self.changed.wait_for(lambda: len(self.sampled) >= number), 60)

        async def done(self, number):
            async with self.changed:
                self.sampled.append(number)
                self.changed.notify_all()

        async def all(self):
            return self.sampled, self.asked

    class Last(Sampler):
        """Of a step, its second micro-batch is sampled last."""

        def work(self, block):
            number = int(block["number"][0])
            if number % 4 == 1:
                ray.get(self.store.until.remote(number + 2))
            sampled = super().work(block)
            ray.get(self.store.done.remote(number))
            return sampled

    store = ray.remote(Steps).options(num_cpus=0).remote()
    with streaming():
        for _ in stream(0, store, "cluster.samplers=2", parts=4, sampler=Last).iter_batches(batch_size=None):
            pass
    sampled, asked = ray.get(store.all.remote())
    ray.kill(store)
    assert len(sampled) == 4 * (LAST + 1)
    assert [number % 4 for number in sampled[3::4]] == [1] * (LAST + 1)
    assert all(asked.count(version) <= 2 for version in asked)  # by each sampler once


def test_a_train_worker_has_its_micro_batch_before_there_is_one_for_the_next(cluster):
    """And they have them in turn."""

    class Signal:
        def __init__(self):
            self.sent = asyncio.Event()

        async def send(self):
            self.sent.set()

        async def fetch(self, version):
            return []

        async def wait(self):
            await self.sent.wait()

    class Waiting(Sampler):
        """Samples the second micro-batch when it may."""

        def work(self, block):
            if int(block["number"][0]) == 1:
                ray.get(self.store.wait.remote())
            return super().work(block)

    store = ray.remote(Signal).options(num_cpus=0).remote()
    made = stream(1, store, parts=2, sampler=Waiting)
    made.context.enable_progress_bars = False
    splits = [one["rollouts"] for one in InTurn().configure({"rollouts": made}, 2, None, None)]
    with ThreadPoolExecutor(2) as ranks:
        blocks = [iter(split.iter_batches(batch_size=None, prefetch_batches=0)) for split in splits]
        first, second = (ranks.submit(next, one) for one in blocks)
        try:
            numbers = [first.result(timeout=60)["part"][0]]
            assert not second.done()
        finally:  # else a failure would wait for the other one
            ray.get(store.send.remote())
        numbers.append(second.result(timeout=60)["part"][0])
        rest = list(ranks.map(lambda one: [int(block["part"][0]) for block in one], blocks))
    ray.kill(store)
    assert numbers == [0, 1]
    assert rest == [[rank] * LAST for rank in (0, 1)]


@pytest.mark.parametrize("lag", [0, 1])
def test_no_more_is_sampled_than_the_steps_that_may_be_under_way(cluster, tmp_path, lag):
    """However long nobody learns from them: that is what bounds the object store."""

    class First:
        """A policy store that never has more than the first version."""

        async def fetch(self, version):
            while version > 0:
                await asyncio.sleep(1)
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
