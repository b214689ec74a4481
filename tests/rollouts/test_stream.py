"""The stream of rollouts on a real cluster, between stages that only wait."""

import asyncio

import ray
from ray.data import DataContext

from flowbp_ray.config import load
from flowbp_ray.rollouts.stream import rollouts
from pipelines.machines import SPARSE
from pipelines.stand_ins import Pace, Reward, Sampler, paced

PACE = Pace(rollout=0.01, reward=0.01, update=0.0, sample_bytes=1024)
LAST = 3


def test_a_micro_batch_that_waits_for_its_version_keeps_no_other_one(cluster):
    """An actor's tasks begin in any order: here each is let in once the one after it waits too."""

    class Reversed:
        """A policy store."""

        def __init__(self):
            self.asked, self.changed = set(), asyncio.Condition()

        async def admit(self, version):
            async with self.changed:
                self.asked.add(version)
                self.changed.notify_all()
                both = self.changed.wait_for(lambda: version == LAST or version + 1 in self.asked)
                await asyncio.wait_for(both, timeout=60)

        async def fetch(self, version):
            return []

    settings = {"train.policy_lag": 0, "train.batch": 2, "train.micro_batch": 2, "train.steps": LAST + 1}
    settings |= {"cluster.samplers": 1, "cluster.sampler_cpus": 0.1}
    config = load(SPARSE, [f"{key}={value}" for key, value in settings.items()])
    store = ray.remote(Reversed).options(num_cpus=0).remote()
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with DataContext.current(context):
        stream = rollouts(config, ["a red ring"], store, "", sampler=paced(Sampler, PACE), reward=paced(Reward, PACE))
        steps = [int(block["step"][0]) for block in stream.iter_batches(batch_size=None)]
    ray.kill(store)
    assert steps == [0, 1, 2, 3]
