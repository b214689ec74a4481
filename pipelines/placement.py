"""A short profile of each stage, and what it says of a run: where it would wait, and how many processes of each would not."""

import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.batches import Block
from flowbp_ray.rollouts.prompts import read_prompts
from flowbp_ray.rollouts.stages import rewarded, sample_bytes
from pipelines.bounds import Pools, alone, stages
from pipelines.waits import SETTINGS

REPEATS = 3  # micro-batches that are timed, after one that is not
T = TypeVar("T")


def profile(config: AlignConfig, told: Callable[[str], object]) -> dict[str, float]:
    """Seconds of a micro-batch by stage and of a policy version, and bytes of a sample, measured one after the other here.

    All three stages' models are in this process at once. Errors are those of loading them.
    """
    from flowbp_ray.rollouts.sampler import Sampler
    from flowbp_ray.training.learner import Learner
    from serve.rewards import here

    if config.train.sharded:
        import torch.distributed as dist

        dist.init_process_group(
            "nccl" if config.cluster.trainer_gpus else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )  # of one, which has all of the model
    told("loading the models of all stages")
    learner = Learner(config.model_copy(update={"train": config.train.model_copy(update={"workers": 1})}))
    policy, publishing = timed(lambda: list(learner.policy()))
    sampler = Sampler(config, read_prompts(config.prompts), lambda _: policy)
    rewards = here(config)
    _, loading = timed(lambda: sampler.hold(0))
    number: Block = {"number": np.array([0])}
    found: dict[str, list[float]] = {"sampling": [], "reward": [], "update": []}
    told(f"{1 + REPEATS} micro-batches of {config.train.micro_batch} samples through each of them")
    for _ in range(1 + REPEATS):
        block, seconds = timed(lambda: sampler(dict(number)))
        found["sampling"].append(seconds)
        scored, seconds = timed(partial(rewarded, config, dict(block), lambda *asked: partial(rewards.score, *asked)))
        found["reward"].append(seconds)
        _, seconds = timed(partial(learner.accumulate, scored))
        found["update"].append(seconds)
    figures = {stage: statistics.median(values[1:]) for stage, values in found.items()}
    return figures | {"publishing": publishing, "loading": loading, "sample_bytes": sample_bytes(scored)}


def timed(do: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and its seconds; on a GPU when all of it is done."""
    import torch

    began = time.perf_counter()
    answer = do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return answer, time.perf_counter() - began


def predicted(config: AlignConfig, figures: dict[str, float], cores: int | None) -> dict[str, Any]:
    """Seconds of a step at both lags, each stage's share of them, and the smallest pools that do not hold up the train workers.

    ``cores`` are those that all processes share, None where each has its own.
    """
    train, cluster = config.train, config.cluster
    pools = Pools(cluster.samplers, cluster.reward_replicas, train.workers)
    number = train.batch // train.micro_batch
    sampling, reward, update = figures["sampling"], figures["reward"], figures["update"]
    needs = stages(number, sampling, reward, update, pools)
    once = alone([sampling] * number, reward, update, pools)
    if cores is not None:
        needs["cores of this machine"] = number * (sampling + reward + update) * cluster.threads / cores
    between = figures["publishing"] + figures["loading"]  # no stage can do without the next version
    lag = {0: max(once, needs.get("cores of this machine", 0.0)) + between, 1: max(*needs.values(), once / 2) + between / 2}
    longest = max(needs, key=lambda stage: needs[stage])
    return {
        "stages": needs,
        "step": lag,
        "bottleneck": longest,
        "pools": {
            "cluster.samplers": math.ceil(needs["samplers"] * pools.samplers / needs["train workers"] - 0.01) or 1,
            "cluster.reward_replicas": math.ceil(needs["rewards"] * pools.replicas / needs["train workers"] - 0.01) or 1,
            "train.workers": train.workers,
        },
    }


def report(config: AlignConfig, figures: dict[str, float], found: dict[str, Any]) -> str:
    """The profile and what is predicted, for a reader."""
    cluster = config.cluster
    processes = {"samplers": cluster.samplers, "rewards": cluster.reward_replicas, "train workers": config.train.workers}
    measured = {"samplers": "sampling", "rewards": "reward", "train workers": "update"}
    lines = ["| stage | seconds a micro-batch | processes | seconds a step |", "| --- | ---: | ---: | ---: |"]
    for stage, seconds in found["stages"].items():
        each = f"{figures[measured[stage]]:.3f}" if stage in measured else ""
        lines.append(f"| {stage} | {each} | {processes.get(stage, '')} | {seconds:.2f} |")
    lag, longest = config.train.policy_lag, found["bottleneck"]
    setting = f" ({SETTINGS[longest]})" if longest in SETTINGS else ""
    suggested = " ".join(f"{key}={value}" for key, value in found["pools"].items())
    chosen = config.model_copy(
        update={
            "cluster": cluster.model_copy(
                update={
                    "samplers": found["pools"]["cluster.samplers"],
                    "max_samplers": None,
                    "reward_replicas": found["pools"]["cluster.reward_replicas"],
                    "reward_max_replicas": None,
                }
            )
        }
    )
    reserved = ", ".join(f"{number:g} {kind}s" for kind, number in chosen.reserved().items() if number)
    return "\n".join(
        [
            *lines,
            "",
            f"A step would take about {found['step'][0]:.2f} s at train.policy_lag 0 and {found['step'][1]:.2f} s at 1 "
            f"(configured is {lag}); the bottleneck: {longest}{setting}.",
            f"A sample has {figures['sample_bytes'] / 1e6:.3f} MB on its way; a policy version is published in "
            f"{figures['publishing']:.2f} s and loaded in {figures['loading']:.2f} s.",
            f"Where each process has cores or a GPU of its own, neither samplers nor rewards hold up the train workers with "
            f"{suggested}, which reserves {reserved}.",
        ]
    )


def shared_cores(config: AlignConfig) -> int | None:
    """The cores that all processes of a run on this machine share; None where they are on a cluster, or on GPUs."""
    on_gpus = config.cluster.sampler_gpus or config.cluster.trainer_gpus
    return None if os.environ.get("RAY_ADDRESS") or on_gpus else os.cpu_count()
