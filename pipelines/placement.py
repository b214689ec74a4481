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
    """Seconds of a micro-batch by stage, of its texts (in sampling and in the update), of the optimizer's step and of a policy
    version, and bytes of a sample, measured one after the other here.

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
    share = {"workers": 1, "batch": (1 + REPEATS) * config.train.micro_batch}  # the last micro-batch is the step's last too
    learner = Learner(config.model_copy(update={"train": config.train.model_copy(update=share)}))
    policy, publishing = timed(lambda: list(learner.policy()))
    sampler = Sampler(config, read_prompts(config.prompts), lambda _: policy)
    rewards = here(config)
    _, loading = timed(lambda: sampler.hold(0))
    number: Block = {"number": np.array([0])}
    found: dict[str, list[float]] = {"sampling": [], "reward": [], "update": [], "texts": []}
    told(f"{1 + REPEATS} micro-batches of {config.train.micro_batch} samples through each of them")
    for _ in range(1 + REPEATS):
        block, seconds = timed(lambda: sampler(dict(number)))
        found["sampling"].append(seconds)
        scored, seconds = timed(partial(rewarded, config, dict(block), lambda *asked: partial(rewards.score, *asked)))
        found["reward"].append(seconds)
        _, seconds = timed(partial(learner.accumulate, scored))
        found["update"].append(seconds)
        _, seconds = timed(partial(sampler.backbone.encode, block["prompt"].tolist()))
        found["texts"].append(seconds)
    _, stepping = timed(learner.update)
    figures = {stage: statistics.median(values[1:]) for stage, values in found.items()}
    for stage in ("sampling", "update"):  # where they are kept by now; a run's may be new
        figures[stage] += figures["texts"]
    more = {"stepping": stepping, "publishing": publishing, "loading": loading}
    return figures | more | {"sample_bytes": sample_bytes(scored)}


def timed(do: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and its seconds; on a GPU when all of it is done."""
    import torch

    began = time.perf_counter()
    answer = do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return answer, time.perf_counter() - began


def predicted(config: AlignConfig, figures: dict[str, float], cores: int | None) -> dict[str, Any]:
    """Seconds of a step at both lags, what each stage needs of it, what takes longest at the configured lag, and at lag 1 the
    smallest pools that do not hold up the train workers; None where these would wait all the same.

    ``cores`` are those that all processes share, None where each has its own.
    """
    train, cluster = config.train, config.cluster
    pools = Pools(cluster.samplers, cluster.reward_replicas, train.workers)
    number = train.batch // train.micro_batch
    sampling, reward, update = figures["sampling"], figures["reward"], figures["update"]
    between = figures["stepping"] + figures["publishing"]
    needs = stages(number, sampling, reward, update, pools)
    needs["samplers"] += figures["loading"]
    needs["train workers"] += between
    if cores is not None:
        needs["cores of this machine"] = number * (sampling + reward + update) * cluster.threads / cores

    def under_way(of: Pools) -> float:
        """Seconds of one step by itself, from the first sample to the next version."""
        return alone([sampling] * number, reward, update, of) + between + figures["loading"]

    once = under_way(pools)
    rounds = {0: {"one step by itself": once}, 1: {"two steps under way": once / 2}}
    lag = {number: max(*needs.values(), *more.values()) for number, more in rounds.items()}
    of = needs | rounds[train.policy_lag]
    learning = needs["train workers"]
    suggested = None
    if train.policy_lag == 1 and learning > figures["loading"]:
        enough = Pools(least(number * sampling, learning - figures["loading"]), least(number * reward, learning), train.workers)
        # With more processes than a step has micro-batches, some would have none.
        if max(enough.samplers, enough.replicas) <= number and under_way(enough) / 2 <= learning:
            suggested = enough
    return {
        "stages": of,
        "step": lag,
        "bottleneck": max(of, key=lambda stage: of[stage]),
        "pools": suggested,
    }


def least(seconds: float, within: float) -> int:
    """How many processes do so many seconds' work within others, but for one in a hundred."""
    return max(1, math.ceil(seconds / within - 0.01))


def report(config: AlignConfig, figures: dict[str, float], found: dict[str, Any]) -> str:
    """The profile and what is predicted, for a reader."""
    cluster = config.cluster
    processes = {"samplers": cluster.samplers, "rewards": cluster.reward_replicas, "train workers": config.train.workers}
    measured = {"samplers": "sampling", "rewards": "reward", "train workers": "update"}
    lines = ["| stage | seconds a micro-batch | processes | seconds a step |", "| --- | ---: | ---: | ---: |"]
    for stage, seconds in found["stages"].items():
        each = f"{figures[measured[stage]]:.3f}" if stage in measured else ""
        lines.append(f"| {stage} | {each} | {processes.get(stage, '')} | {seconds:.2f} |")
    longest, step = found["bottleneck"], found["step"]
    setting = f" ({SETTINGS[longest]})" if longest in SETTINGS else ""
    lines += [
        "",
        f"A step would take about {step[0]:.2f} s at train.policy_lag 0 and {step[1]:.2f} s at 1 (configured is "
        f"{config.train.policy_lag}); the bottleneck: {longest}{setting}.",
        f"A sample has {figures['sample_bytes'] / 1e6:.3f} MB on its way; a policy version is published in "
        f"{figures['publishing']:.2f} s and loaded in {figures['loading']:.2f} s.",
        f"Of sampling and of the update, a micro-batch's texts take {figures['texts']:.3f} s, unless the worker still has them.",
    ]
    if config.train.policy_lag == 0:
        lines.append("At train.policy_lag 0 stages wait for each other whatever their processes: 1 overlaps them.")
    elif (pools := found["pools"]) is None:
        lines.append("The train workers wait whatever the samplers, as a step's micro-batches are few: more of them would help.")
    else:
        given = {"samplers": pools.samplers, "max_samplers": None, "reward_replicas": pools.replicas, "reward_max_replicas": None}
        chosen = config.model_copy(update={"cluster": cluster.model_copy(update=given)})
        reserved = ", ".join(f"{number:g} {kind}s" for kind, number in chosen.reserved().items() if number)
        lines.append(
            "Where each process has cores or a GPU of its own, neither samplers nor rewards hold up the train workers with "
            f"cluster.samplers={pools.samplers} cluster.reward_replicas={pools.replicas} train.workers={pools.workers}, which "
            f"reserves {reserved}."
        )
    return "\n".join(lines)


def shared_cores(config: AlignConfig) -> int | None:
    """The cores that all processes of a run on this machine share; None where they are on a cluster, or on GPUs."""
    on_gpus = config.cluster.sampler_gpus or config.cluster.trainer_gpus
    return None if os.environ.get("RAY_ADDRESS") or on_gpus else os.cpu_count()
