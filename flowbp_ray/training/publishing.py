"""How policy versions get from a train worker to the samplers."""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from flowbp_ray.rollouts.batches import Chunk, policy_version

if TYPE_CHECKING:
    from flowbp_ray.training.checkpoints import Policies
    from flowbp_ray.training.learner import Learner


class Publisher:
    """Puts a worker's part of the policy versions into Ray's object store, and keeps it there while it may be asked for. A worker
    that has no part of them does nothing here."""

    def __init__(self, store: ActorHandle, learner: "Learner") -> None:
        self.store, self.learner = store, learner
        self.published: dict[int, list[ObjectRef]] = {}

    def publish(self) -> tuple[int, float]:
        """Publish the newest version; its bytes, and the seconds that it took.

        What no sampler will ask for any more goes first, so that at lag 0 there is one version, and not two, at any time.
        """
        learner, began = self.learner, time.perf_counter()
        if not learner.publishes:
            return 0, 0.0
        oldest = learner.version - learner.config.train.policy_lag
        ray.get(self.store.retire.remote(oldest))
        for version in [v for v in self.published if v < oldest]:
            del self.published[version]
        return self._hand_out(learner.version, learner.policy()), time.perf_counter() - began

    def publish_again(self, earlier: "Policies") -> None:
        """Publish the newest version and those before it that are still asked for, as a checkpoint had them."""
        if self.learner.publishes:
            for version in self._before():
                self._hand_out(version, earlier.get(version, []))
        self.publish()

    def kept(self) -> "Policies":
        """What a checkpoint of now needs beside the newest version: the chunks of those before it that are still asked for."""
        return {version: ray.get(self.published[version]) for version in self._before() if version in self.published}

    def _before(self) -> range:
        newest = self.learner.version
        return range(policy_version(self.learner.config, newest), newest)

    def _hand_out(self, version: int, chunks: Iterable[Chunk]) -> int:
        """Their bytes."""
        pushed, references = 0, []
        for chunk in chunks:
            pushed += chunk.bytes
            references.append(ray.put(chunk))
        self.published[version] = references
        ray.get(self.store.publish.remote(version, self.learner.rank, references))
        return pushed
