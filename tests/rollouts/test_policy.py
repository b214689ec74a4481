"""The store's own logic; that it serves samplers is shown end to end."""

import asyncio

import pytest

from flowbp_ray.rollouts.policy import PolicyStore


def test_who_needs_a_version_waits_until_all_of_it_exists():
    async def run():
        store, order = PolicyStore(publishers=2), []

        async def need(version):
            order.append(await store.fetch(version))

        waiting = [asyncio.create_task(need(v)) for v in (1, 0)]
        for version in (0, 1):
            for publisher in (1, 0):
                await asyncio.sleep(0)
                order.append(f"published {version} by {publisher}")
                await store.publish(version, publisher, [f"chunk {version} {publisher}"])
                await asyncio.sleep(0.01)
        await asyncio.gather(*waiting)
        return order

    assert asyncio.run(run()) == [
        "published 0 by 1", "published 0 by 0", ["chunk 0 1", "chunk 0 0"],
        "published 1 by 1", "published 1 by 0", ["chunk 1 1", "chunk 1 0"],
    ]  # fmt: skip


def test_what_is_retired_is_let_go():
    async def run():
        store = PolicyStore(publishers=1)
        for version in range(4):
            await store.retire(version - 1)
            await store.publish(version, 0, [])
        assert await store.fetch(2) == []
        with pytest.raises(KeyError, match=r"policy version 1 is not here, only \[2, 3\]"):
            await store.fetch(1)
        await store.retire(4)
        await store.publish(4, 0, [])

    asyncio.run(run())


def test_a_version_that_is_not_the_next_is_refused():
    async def run():
        store = PolicyStore(publishers=1)
        await store.publish(0, 0, [])
        for version in (0, 2):
            with pytest.raises(ValueError, match=f"policy version {version} of train worker 0 cannot follow version 0"):
                await store.publish(version, 0, [])

    asyncio.run(run())


def test_workers_that_go_on_publish_the_versions_in_use_one_after_the_other():
    """None waits for the others."""

    async def run():
        store = PolicyStore(publishers=2)
        for publisher in (1, 0):
            for version in (7, 8):
                await store.publish(version, publisher, [f"chunk {version} {publisher}"])
        assert await store.fetch(7) == ["chunk 7 1", "chunk 7 0"]
        with pytest.raises(ValueError, match="policy version 7 of train worker 0 cannot follow version 8"):
            await store.publish(7, 0, [])

    asyncio.run(run())
