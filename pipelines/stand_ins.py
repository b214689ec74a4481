"""Stand-ins for what an alignment computes, with set durations and sizes: what is left is the orchestration, which is real.

Stages that sample and reward import no torch; a train worker has it from Ray Train anyway.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from ray.actor import ActorHandle

from flowbp_ray.config import AlignConfig
from flowbp_ray.randomness import seed_of
from flowbp_ray.rollouts.batches import Block, Chunk, MicroBatch, Piece, policy_version
from flowbp_ray.rollouts.plans import plan_of
from flowbp_ray.rollouts.stages import Rewarding, Sampling, Stage
from flowbp_ray.surrogate.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 64 * 2**20  # bytes, as of `flowbp_ray.training.weights`


@dataclass(frozen=True)
class Pace:
    """Seconds for a micro-batch, and sizes."""

    rollout: float
    reward: float
    update: float
    #: Of a sample, as the train worker gets it.
    sample_bytes: int
    #: Of a policy version.
    policy_bytes: int = 2**20
    #: The part of all micro-batches that take a sampler twice as long.
    stragglers: float = 0.0

    def rollout_of(self, seed: int, step: int, part: int) -> float:
        """Of one micro-batch, which is a straggler or not by the seed."""
        late = seed_of(seed, step, part, "straggler") % 1000 < 1000 * self.stragglers
        return self.rollout * (2 if late else 1)


class Sampler(Sampling):
    """Loads policies, and then waits."""

    pace: Pace

    def __init__(self, config: AlignConfig, prompts: Sequence[str], store: ActorHandle) -> None:
        super().__init__(config, store)
        self.prompts, self.version = prompts, -1

    def work(self, block: Block) -> Block:
        """Columns as a sampler's, of half a sample's size each."""
        began, pace = time.perf_counter(), self.pace
        batch = MicroBatch.of(self.config, int(block["number"][0]))
        if batch.version != self.version:
            for chunk in self.chunks(batch.version):
                for piece in chunk.pieces:
                    hashlib.sha256(piece.values.copy().data)  # as into a model, and the proof that it is there
            self.version = batch.version
        loading, began = time.perf_counter() - began, time.perf_counter()
        number, seed = len(batch.samples), self.config.train.seed
        values = np.ones((number, 1, pace.sample_bytes // 8), np.float32)
        columns: Block = {
            "step": np.full(number, batch.step),
            "part": np.full(number, batch.part),
            "version": np.full(number, batch.version),
            "sample": np.array(batch.samples),
            "prompt": np.array([self.prompts[s % len(self.prompts)] for s in batch.samples], dtype=object),
            "latents": values,
            "inputs": values,
            "weight": np.ones(number, np.float32),
            "loading_seconds": np.full(number, loading / number),
        }
        wait(began, pace.rollout_of(seed, batch.step, batch.part))
        return columns | {"sampling_seconds": np.full(number, (time.perf_counter() - began) / number)}


class Reward(Rewarding):
    """Waits, and gives back what it got."""

    pace: Pace

    def __init__(self, config: AlignConfig, application: str) -> None:
        super().__init__()
        self.names = [component.name for component in config.reward.components]

    def work(self, block: Block) -> Block:
        """Gradients in place of the reward inputs."""
        began, number = time.perf_counter(), len(block["step"])
        block["gradients"] = block.pop("inputs").copy()
        block["objective"] = np.zeros(number, np.float32)
        block |= {f"reward/{name}": block["objective"] for name in self.names}
        wait(began, self.pace.reward)
        return block | {"reward_seconds": np.full(number, (time.perf_counter() - began) / number)}


class Learner:
    """Waits, and publishes as many bytes as a policy has; a `flowbp_ray.training.learner.Learner` to the train loop."""

    def __init__(self, pace: Pace, config: AlignConfig, rank: int) -> None:
        import torch

        from flowbp_ray.training.checkpoints import Progress

        self.pace, self.config, self.rank, self.progress = pace, config, rank, Progress()
        self.sigmas = np.linspace(1, 0, config.sampling.steps + 1)
        self.weights = SimpleNamespace(parameters={})
        self.backbone = SimpleNamespace(device=torch.device("cpu"))
        self.publishes = rank == 0

    @property
    def version(self) -> int:
        """The number of steps so far."""
        return self.progress.version

    @property
    def plan(self) -> Plan:
        """A plan; nothing depends on it."""
        return plan_of(self.config, self.sigmas, self.version)

    def policy(self) -> Iterator[Chunk]:
        """Bytes in chunks, from the first worker."""
        from flowbp_ray.training.weights import checksum

        for start in range(0, self.pace.policy_bytes if self.publishes else 0, CHUNK):
            values = np.ones(min(CHUNK, self.pace.policy_bytes - start), np.uint8)
            pieces = (Piece("weights", start, values),)
            yield Chunk(pieces, checksum(pieces))

    def accumulate(self, block: Block) -> None:
        """A micro-batch's share; RuntimeError if it is of another step or policy version, as the real one's."""
        began = time.perf_counter()
        if set(block["step"]) != {self.version} or set(block["version"]) != {policy_version(self.config, self.version)}:
            raise RuntimeError(f"step {self.version} was given step {set(block['step'])}, policy version {set(block['version'])}")
        for column in ("latents", "gradients"):
            block[column].sum()  # which reads all of it
        wait(began, self.pace.update)

    def update(self, add_up: Callable[["Tensor"], None] | None = None) -> float:
        """The next version; an adapter's gradients are added up before. (Those of whole models are as they come.)"""
        import torch

        if add_up is not None and self.pace.policy_bytes <= CHUNK:
            add_up(torch.zeros(self.pace.policy_bytes // 4))
        self.progress.version += 1
        return 1.0

    def save(self, folder: Path, policies: object) -> None:
        """A checkpoint of nothing."""
        if self.publishes:
            (folder / "stand_in.txt").write_text(f"{self.version}\n", encoding="utf-8")


def wait(began: float, seconds: float) -> None:
    """Until so long after the beginning."""
    time.sleep(max(0.0, began + seconds - time.perf_counter()))


S = TypeVar("S", bound=Stage)


def paced(stage: type[S], pace: Pace) -> type[S]:
    """The stage at a pace, under the same name."""
    return type(stage.__name__, (stage,), {"pace": pace})
