"""Which policy versions a train worker keeps for samplers, with a real store on a real cluster."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from flowbp_ray.config import load
from flowbp_ray.rollouts.batches import Chunk, Piece
from flowbp_ray.rollouts.policy import PolicyStore
from flowbp_ray.training.publishing import Publisher

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


def chunk(version):
    return Chunk((Piece("weights", 0, np.full(4, version, np.float32)),), "checksum")


def learner(lag, version=0, rank=0, publishers=1):
    """Of train workers the first ones have a part of what is trained."""
    config = load(SPARSE, [f"train.policy_lag={lag}"])
    made = SimpleNamespace(config=config, version=version, rank=rank, publishes=rank < publishers)
    made.policy = lambda: [chunk(made.version)]
    return made


@pytest.fixture
def store(cluster):
    made = ray.remote(PolicyStore).options(num_cpus=0).remote(1)
    yield made
    ray.kill(made)


def fetched(store, version):
    (reference,) = ray.get(store.fetch.remote(version))
    return ray.get(reference).pieces[0].values[0]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_version_is_there_as_long_as_it_is_asked_for(store, lag):
    of = learner(lag)
    publisher = Publisher(store, of)
    for of.version in range(3):
        assert publisher.publish()[0] == 16  # bytes
    assert [fetched(store, version) for version in range(2 - lag, 3)] == list(range(2 - lag, 3))
    with pytest.raises(ray.exceptions.RayTaskError, match="policy version"):
        fetched(store, 1 - lag)
    assert list(publisher.kept()) == [1] * lag  # beside the newest, which a checkpoint has anyway


def test_a_worker_without_a_part_of_the_weights_publishes_nothing(store):
    publisher = Publisher(store, learner(1, rank=1))
    assert publisher.publish() == (0, 0.0)
    assert publisher.kept() == {}
    publisher.publish_again({})
    assert not ray.wait([store.fetch.remote(0)], timeout=1)[0]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_version_in_parts_exists_when_all_workers_have_published_theirs(cluster, lag):
    store = ray.remote(PolicyStore).options(num_cpus=0).remote(2)
    ranks = [learner(lag, rank=rank, publishers=2) for rank in (0, 1)]
    publishers = [Publisher(store, of) for of in ranks]
    for version in range(3):
        for of, publisher in zip(ranks, publishers, strict=True):
            if of.rank == 1:  # the other one has retired what was before, and published its part
                assert not ray.wait([store.fetch.remote(version)], timeout=1)[0]
            of.version = version
            publisher.publish()
        chunks = ray.get(ray.get(store.fetch.remote(version)))
        assert [chunk.pieces[0].values[0] for chunk in chunks] == [version, version]
    ray.kill(store)


def test_a_run_that_goes_on_publishes_what_is_still_asked_for(store):
    Publisher(store, learner(1, version=5)).publish_again({4: [chunk(4)]})
    assert [fetched(store, version) for version in (4, 5)] == [4, 5]
