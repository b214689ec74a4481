"""The stream of rollouts on Ray Data: admission, a pool of samplers, rewards. One block is one micro-batch, all along.

A micro-batch enters when the policy version that it asks for exists, so no sampler ever waits inside a task.
"""

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import ray
from ray import serve
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, Dataset

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.sampler import Block, MicroBatch, Sampler

ANSWER_WITHIN = 600  # seconds, for one micro-batch's rewards


class Admission:
    """Lets a micro-batch pass when its policy version exists."""

    def __init__(self, config: AlignConfig, store: ActorHandle) -> None:
        self.config, self.store = config, store

    def __call__(self, block: Block) -> Block:
        """The same block, later."""
        ray.get(self.store.admit.remote(MicroBatch.of(self.config, int(block["number"][0])).version))
        return block


class StreamedSampler(Sampler):
    """A sampler that fetches its policies from the store."""

    def __init__(self, config: AlignConfig, prompts: Sequence[str], store: ActorHandle) -> None:
        super().__init__(config, prompts, lambda version: ray.get(store.fetch.remote(version)))


class RewardStage:
    """Asks the reward service: one request a reward input, with the whole micro-batch."""

    def __init__(self, application: str) -> None:
        self.service = serve.get_app_handle(application)

    def __call__(self, block: Block) -> Block:
        """Scores and gradients in place of the reward inputs."""
        began = time.perf_counter()
        inputs, prompts = block.pop("inputs"), block["prompt"].tolist()
        pending = [self.service.score.remote(np.ascontiguousarray(inputs[:, m]), prompts) for m in range(inputs.shape[1])]
        answers = [p.result(timeout_s=ANSWER_WITHIN) for p in pending]
        block["gradients"] = np.stack([a["gradient"] for a in answers], 1)  # (B, reward inputs, C, h, w)
        block["objective"] = np.mean([a["objective"] for a in answers], 0)
        for name in answers[0]["components"]:
            block[f"reward/{name}"] = np.mean([a["components"][name] for a in answers], 0)
        block["reward_seconds"] = np.full(len(prompts), (time.perf_counter() - began) / len(prompts))
        return block


def rollouts(config: AlignConfig, prompts: Sequence[str], store: ActorHandle, application: str) -> Dataset:
    """All micro-batches of a run, in order. Set ``preserve_order`` where it is executed."""
    cluster = config.cluster
    number = config.train.steps * config.train.batch // config.train.micro_batch
    source = ray.data.from_arrow([pa.table({"number": [n]}) for n in range(number)])
    whole = {"batch_size": None, "batch_format": "numpy", "max_restarts": -1, "max_task_retries": -1}

    def pool(size: int) -> ActorPoolStrategy:
        return ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)

    return (
        source.map_batches(Admission, fn_constructor_args=(config, store), compute=pool(1), num_cpus=0.01, **whole)
        .map_batches(
            StreamedSampler,
            fn_constructor_args=(config, prompts, store),
            compute=pool(cluster.samplers),
            num_cpus=cluster.sampler_cpus,
            num_gpus=cluster.sampler_gpus,
            **whole,
        )
        .map_batches(
            RewardStage, fn_constructor_args=(application,), compute=pool(cluster.reward_replicas), num_cpus=0.01, **whole
        )
    )
