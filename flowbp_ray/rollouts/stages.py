"""The stages of the stream of rollouts, one class each.

Ray imports this module in every process that passes a stage on, so what loads torch is imported where a model is loaded.
"""

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import ray
from ray import ObjectRef, serve
from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.asking import Request
from flowbp_ray.rollouts.batches import Block, Chunk, MicroBatch

REWARDS = "scoring by the reward service"


def service(application: str) -> DeploymentHandle:
    """What decodes and composes, in a running application of `serve.rewards`."""
    return serve.get_deployment_handle("Rewards", application)


class Stage(ABC):
    """One process of a pool. Of the micro-batches that it was given it works on one at a time, the first in order. In each it
    notes how long it waited for it, and how many bytes a sample has that it hands on.

    Ray starts an actor's calls in any order, so each micro-batch waits here in a thread of its own. Results are handed on in
    order: a late one holds up all behind it.
    """

    #: Of the columns that have what it notes: ``…_waiting_seconds`` and ``…_bytes``.
    name: ClassVar[str]
    #: The columns by whose first row a micro-batch comes before another one.
    order: ClassVar[tuple[str, ...]] = ("step", "part")

    def __init__(self) -> None:
        self.given: list[tuple[int, ...]] = []
        self.changed, self.turn = threading.Condition(), threading.Lock()
        self.ended: float | None = None

    @abstractmethod
    def work(self, block: Block) -> Block:
        """The block with what this stage adds to it."""

    def admit(self, block: Block) -> None:  # noqa: B027 - most may be at once
        """Return when it may be worked on. Those that come before it do not wait for that."""

    def __call__(self, block: Block) -> Block:
        """The block after `work`, with those columns, in turn."""
        place = tuple(int(block[column][0]) for column in self.order)
        with self.changed:
            self.given.append(place)
        try:
            self.admit(block)
            with self.changed:
                self.changed.wait_for(lambda: place == min(self.given))
            with self.turn:
                return self._noted(block)
        finally:
            with self.changed:
                self.given.remove(place)
                self.changed.notify_all()

    def _noted(self, block: Block) -> Block:
        waited = 0.0 if self.ended is None else time.perf_counter() - self.ended
        block = self.work(block)
        number = len(block["step"])
        block[f"{self.name}_bytes"] = np.full(number, sample_bytes(block))
        block[f"{self.name}_waiting_seconds"] = np.full(number, waited / number)
        self.ended = time.perf_counter()
        return block


def sample_bytes(block: Block) -> float:
    """Bytes of a block for each of its samples, texts as UTF-8."""
    total = sum(
        sum(len(str(v).encode()) for v in column) if column.dtype == object else column.nbytes for column in block.values()
    )
    return total / len(block["step"])


class Sampling(Stage):
    """Works on micro-batches, each the one row of ``number``, whose policy version exists."""

    name = "sampling"
    order = ("number",)

    def __init__(self, config: AlignConfig, store: ActorHandle) -> None:
        super().__init__()
        self.config, self.store, self.newest = config, store, -1
        #: Chunks of versions that the store has told of, and which are to be loaded.
        self.told: dict[int, list[ObjectRef]] = {}

    def admit(self, block: Block) -> None:
        """Return when its policy version exists."""
        version = MicroBatch.of(self.config, int(block["number"][0])).version
        if version <= self.newest:
            return  # told already; and for one that is sampled again the store may not keep this version any more
        chunks = ray.get(self.store.fetch.remote(version))
        with self.changed:
            if version > self.newest:  # else another one of it was told, and may have loaded it
                self.newest, self.told[version] = version, chunks

    def chunks(self, version: int) -> Iterator[Chunk]:
        """Of its weights, one after the other, so that there is no second copy of a policy; KeyError if the store has to be asked
        and does not keep it any more."""
        chunks = self.told.pop(version, None)
        if chunks is None:  # a later version was told before: this micro-batch is sampled again, or both were there at once
            chunks = ray.get(self.store.fetch.remote(version))
        return map(ray.get, chunks)


class Admission:
    """Lets a micro-batch, whose number is the one row of ``number``, pass when its policy version exists."""

    def __init__(self, config: AlignConfig, store: ActorHandle) -> None:
        self.config, self.store, self.newest = config, store, -1

    def __call__(self, block: Block) -> Block:
        """The same block, later."""
        version = MicroBatch.of(self.config, int(block["number"][0])).version
        if version > self.newest:  # as a sampler
            with contextlib.suppress(KeyError):  # it has existed: whoever loads it says so if that is too late
                ray.get(self.store.fetch.remote(version))
            self.newest = max(self.newest, version)
        return block


class Rewarding(Stage):
    """Gives a micro-batch its rewards."""

    name = "reward"


class SamplerStage(Sampling):
    """A `Sampler` that has its policies from the store."""

    def __init__(self, config: AlignConfig, prompts: Sequence[str], store: ActorHandle) -> None:
        from flowbp_ray.rollouts.sampler import Sampler

        super().__init__(config, store)
        self.sampler = Sampler(config, prompts, self.chunks)

    def work(self, block: Block) -> Block:
        """Roll out a micro-batch."""
        return self.sampler(block)


class RewardStage(Rewarding):
    """Asks the reward service: one request a reward input, with the whole micro-batch."""

    def __init__(self, config: AlignConfig, application: str) -> None:
        super().__init__()
        self.config, self.service = config, service(application)

    def work(self, block: Block) -> Block:
        """Scores and gradients in place of the reward inputs."""
        prompts = block["prompt"].tolist()

        def ask(*arguments: Any) -> Callable[[], Any]:
            return Request(self.service, "score", *arguments, what=REWARDS, prompts=prompts).result

        return rewarded(self.config, block, ask)


def rewarded(config: AlignConfig, block: Block, ask: Callable[..., Callable[[], Any]]) -> Block:
    """The block with scores and gradients in place of its reward inputs. ``ask(latents, prompts, weights)`` scores, by the time
    that the answer is called for."""
    began, step = time.perf_counter(), int(block["step"][0])
    inputs, prompts = block.pop("inputs"), block["prompt"].tolist()
    components = config.reward.components
    weights = {c.name: c.weight_at(step) for c in components}
    pending = [ask(np.ascontiguousarray(inputs[:, m]), prompts, weights) for m in range(inputs.shape[1])]
    answers = [answer() for answer in pending]
    block["gradients"] = np.stack([a["gradient"] for a in answers], 1)  # (B, reward inputs, C, h, w), as the inputs came
    block["objective"] = np.mean([a["objective"] for a in answers], 0)
    for name in answers[0]["components"]:
        block[f"reward/{name}"] = np.mean([a["components"][name] for a in answers], 0)
    for component in components:
        if component.schedule:
            block[f"weight/{component.name}"] = np.full(len(prompts), weights[component.name])
    block["reward_seconds"] = np.full(len(prompts), (time.perf_counter() - began) / len(prompts))
    return block
