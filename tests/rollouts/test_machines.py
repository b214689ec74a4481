"""The stream of rollouts where its stages are on several machines."""

import asyncio
import os
from collections import Counter

import numpy as np
import pytest
import ray

from flowbp_ray.config import load
from flowbp_ray.rollouts.stream import rollouts
from pipelines.machines import SPARSE, Machines
from pipelines.session import quiet_streams
from pipelines.stand_ins import Pace, Reward, Sampler, paced


@pytest.mark.drill
def test_rewards_on_another_machine_than_the_sampler_have_as_much_to_do():
    """Not only what those beside it have no room for: of four micro-batches they would have none."""

    class Gate:  # here, it is sent to its process as it is
        """A policy store that has the first version when both reward stages are there."""

        def __init__(self):
            self.there, self.changed = 0, asyncio.Condition()

        async def began(self):
            async with self.changed:
                self.there += 1
                self.changed.notify_all()

        async def fetch(self, version):
            async with self.changed:
                await self.changed.wait_for(lambda: self.there == 2)
            return []

    class Where(Reward):
        """Notes which process it is, and on which machine."""

        def __init__(self, *given):
            super().__init__(*given)
            ray.get(ray.get_actor("gate").began.remote())

        def work(self, block):
            at = f"{os.getpid()} on {ray.get_runtime_context().get_node_id()}"
            return super().work(block) | {"at": np.full(len(block["step"]), at)}

    settings = {"train.batch": 8, "train.micro_batch": 2, "train.policy_lag": 0, "train.steps": 1}
    settings |= {"cluster.samplers": 1, "cluster.sampler_cpus": 0.1, "cluster.reward_replicas": 2}
    config = load(SPARSE, [f"{key}={value}" for key, value in settings.items()])
    pace = Pace(rollout=0.5, reward=3.0, update=0.0, sample_bytes=2**20)
    with Machines(workers=1):
        quiet_streams()
        store = ray.remote(Gate).options(num_cpus=0, name="gate").remote()
        stream = rollouts(config, ["a red ring"], store, "", sampler=paced(Sampler, pace), reward=paced(Where, pace))
        worked = Counter(block["at"][0] for block in stream.iter_batches(batch_size=None))
    assert sorted(worked.values()) == [2, 2]
    assert len({at.partition(" on ")[2] for at in worked}) == 2  # else that says nothing
