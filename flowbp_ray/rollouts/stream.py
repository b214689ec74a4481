"""The stream of rollouts on Ray Data: a pool of samplers, rewards. One block is one micro-batch, all along.

A sampler begins a micro-batch when the policy version that it asks for exists. Where samplers come and go, micro-batches wait for
that before the pool.
"""

import warnings
from collections.abc import Sequence

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataIterator, Dataset, ExecutionOptions
from ray.train import DataConfig
from ray.util.annotations import RayDeprecationWarning

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.stages import Admission, Rewarding, RewardStage, SamplerStage, Sampling
from flowbp_ray.rollouts.turns import AtOnce

#: Of a process in which micro-batches wait for their policy versions, each in one. A sampler may have two that wait, and Ray has
#: it make earlier ones again, which those wait for, if a machine is lost that had what came of them.
THREADS = 16
#: Micro-batches that a process of the stage of rewards has: while one is scored, the others are fetched or handed on.
REWARDS_AT_HAND = 4


def at_hand(config: AlignConfig) -> int:
    """How many micro-batches a sampler has, with the one that it works on.

    At lag 0 all of a step wait for its last one, and one that a sampler has at hand waits for that sampler, where another one
    could begin it: behind a slow one it is late by the time that this takes.
    """
    return 1 if config.train.policy_lag == 0 and config.cluster.samplers > 1 else 2


def rollouts(
    config: AlignConfig,
    prompts: Sequence[str],
    store: ActorHandle,
    application: str,
    first_step: int = 0,
    sampler: type[Sampling] = SamplerStage,
    reward: type[Rewarding] = RewardStage,
) -> Dataset:
    """All micro-batches of a run from a step on, in order, by these stages."""
    cluster = config.cluster
    parts = config.train.batch // config.train.micro_batch
    source = ray.data.from_arrow([pa.table({"number": [n]}) for n in range(first_step * parts, config.train.steps * parts)])
    whole = {"batch_size": None, "batch_format": "numpy"}

    def pool(size: int, most: int | None = None, *, ahead: int, threads: int) -> ActorPoolStrategy:
        # One micro-batch is worked on, and where there are others they are fetched, or handed on, meanwhile. A process without
        # one waits until Ray Data's executor has seen that it is free.
        return ActorPoolStrategy(
            min_size=size,
            max_size=most or size,
            max_tasks_in_flight_per_actor=ahead,
            max_concurrent_calls_per_actor=threads,
            enable_true_multi_threading=True,
        )

    samplers = pool(cluster.samplers, ahead=at_hand(config), threads=THREADS)
    if cluster.max_samplers is not None:
        # Ray Data has samplers come and go by how many threads have something: nothing that has to wait must be among it.
        waiting = pool(1, ahead=THREADS, threads=THREADS)
        source = source.map_batches(Admission, fn_constructor_args=(config, store), compute=waiting, num_cpus=0.01, **whole)
        ahead = at_hand(config)
        samplers = pool(cluster.samplers, cluster.max_samplers, ahead=ahead, threads=ahead)
    # Ray Data restarts a killed actor and repeats its task by itself.
    stream = source.map_batches(
        sampler,
        fn_constructor_args=(config, prompts, store),
        compute=samplers,
        num_cpus=cluster.sampler_cpus,
        num_gpus=cluster.sampler_gpus,
        **whole,
    ).map_batches(
        reward,
        fn_constructor_args=(config, application),
        compute=pool(cluster.rewards.most, ahead=REWARDS_AT_HAND, threads=REWARDS_AT_HAND),
        num_cpus=0.01,
        **whole,
    )
    with warnings.catch_warnings(action="ignore", category=RayDeprecationWarning):
        # Ray Data would give one whose machine has a micro-batch all that it has room for, while others have nothing to do. It
        # says that it will no longer have this as an option some day, and has no other one for it.
        stream.context.execution_options = ExecutionOptions(preserve_order=True, actor_locality_enabled=False)
    stream.context.custom_execution_callback_classes = [*stream.context.custom_execution_callback_classes, AtOnce]
    return stream


class InTurn(DataConfig):
    """Deals micro-batches of `rollouts` out to train workers in turn, in order, each when it is there: they all have as many
    samples.

    Ray Train's own splits equally whatever comes, so it keeps what there is until every worker can have as many.
    """

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: list[ActorHandle] | None,
        worker_node_ids: list[str] | None,
        **_: object,
    ) -> list[dict[str, DataIterator]]:
        """For each rank the iterators of all datasets, by name."""
        ranks: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            stream = dataset.copy(dataset)
            stream.set_name(name)
            # Which rank gets which depends on the order alone, not on where it lies.
            for rank, split in zip(ranks, stream.streaming_split(world_size, equal=False), strict=True):
                rank[name] = split
        return ranks
