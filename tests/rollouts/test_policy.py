"""The store's own logic; that it serves samplers is shown end to end."""

import asyncio

import numpy as np
import pytest

from flowbp_ray.rollouts.batches import Policy
from flowbp_ray.rollouts.policy import PolicyStore


def policy(version):
    return Policy(version, {"w": np.full(2, version, np.float32)}, f"sum{version}")


def test_who_needs_a_version_waits_until_it_exists():
    async def run():
        store, order = PolicyStore(keep=2), []

        async def need(version):
            await store.admit(version)
            order.append(f"admitted {version}")

        waiting = [asyncio.create_task(need(v)) for v in (1, 0)]
        for version in (0, 1):
            await asyncio.sleep(0)
            order.append(f"published {version}")
            await store.publish(policy(version))
            await asyncio.sleep(0.01)
        await asyncio.gather(*waiting)
        return order

    assert asyncio.run(run()) == ["published 0", "admitted 0", "published 1", "admitted 1"]


def test_only_the_newest_are_kept():
    async def run():
        store = PolicyStore(keep=2)
        for version in range(4):
            await store.publish(policy(version))
        assert (await store.fetch(2)).checksum == "sum2"
        with pytest.raises(KeyError, match=r"policy version 1 is not here, only \[2, 3\]"):
            await store.fetch(1)

    asyncio.run(run())


def test_a_version_that_is_not_the_next_is_refused():
    async def run():
        store = PolicyStore(keep=2)
        await store.publish(policy(0))
        for version in (0, 2):
            with pytest.raises(ValueError, match=f"policy version {version} cannot follow version 0"):
                await store.publish(policy(version))

    asyncio.run(run())
