"""How long a step cannot take less than, from what a micro-batch takes in each stage and how many processes each has."""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pools:
    """Processes of each stage."""

    samplers: int
    replicas: int
    workers: int


def alone(sampling: Sequence[float], reward: float, update: float, pools: Pools, *, in_order: bool = True) -> float:
    """Seconds of one step by itself, as at policy_lag 0: its micro-batches go through all stages one after the other, each as
    soon as it can, which is not before those that come before it if they are handed on in order, and else when it is sampled.
    ``sampling`` has each one's seconds; the other stages take the same for all."""
    samplers, replicas, workers = ([0.0] * number for number in (pools.samplers, pools.replicas, pools.workers))
    sampled = []
    for seconds in sampling:
        sampled.append(heapq.heappop(samplers) + seconds)
        heapq.heappush(samplers, sampled[-1])
    for part, ready in enumerate(itertools.accumulate(sampled, max) if in_order else sorted(sampled)):
        rewarded = max(ready, heapq.heappop(replicas)) + reward
        heapq.heappush(replicas, rewarded)
        rank = part % pools.workers  # the one that has nothing to do, or is the first to have nothing
        workers[rank] = max(workers[rank], rewarded) + update
    return max(workers)


def stages(micro_batches: int, sampling: float, reward: float, update: float, pools: Pools) -> dict[str, float]:
    """Seconds that each stage needs for a step with all of its processes busy; at policy_lag 1 a step takes the longest, or half
    of `alone`, if that is longer, as two steps are under way."""
    return {
        "samplers": micro_batches * sampling / pools.samplers,
        "rewards": micro_batches * reward / pools.replicas,
        "train workers": micro_batches * update / pools.workers,
    }
