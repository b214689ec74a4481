"""The stream of rollouts on Ray Data: a pool of samplers, rewards. One block is one micro-batch, all along.

A sampler has its next micro-batches at hand, and begins one when the policy version that it asks for exists. Where samplers come
and go, micro-batches wait for that before the pool.
"""

from collections.abc import Sequence

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, Dataset

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.stages import Admission, RewardStage, SamplerStage, Sampling, Timed

#: Micro-batches that wait for their policy versions. As admitting takes no time, Ray Data's own turn between two would be
#: most of it.
AHEAD = 16


def rollouts(
    config: AlignConfig,
    prompts: Sequence[str],
    store: ActorHandle,
    application: str,
    first_step: int = 0,
    sampler: type[Sampling] = SamplerStage,
    reward: type[Timed] = RewardStage,
) -> Dataset:
    """All micro-batches of a run from a step on, in order, by these stages. Set ``preserve_order`` where it is executed."""
    cluster = config.cluster
    parts = config.train.batch // config.train.micro_batch
    source = ray.data.from_arrow([pa.table({"number": [n]}) for n in range(first_step * parts, config.train.steps * parts)])
    whole = {"batch_size": None, "batch_format": "numpy"}  # a killed actor is restarted and its task repeated, by default

    def pool(size: int, most: int | None = None, *, ahead: int, threads: bool = False) -> ActorPoolStrategy:
        # One micro-batch is worked on, and where there are others they are fetched, or handed on, meanwhile. A process without
        # one waits for Ray Data's executor, which looks for what is done each 0.1 s as long as anything is not.
        return ActorPoolStrategy(
            min_size=size,
            max_size=most or size,
            max_tasks_in_flight_per_actor=ahead,
            max_concurrent_calls_per_actor=ahead,
            enable_true_multi_threading=threads,
        )

    if cluster.max_samplers is not None:
        # Ray Data has samplers come and go by how many of them were given something: that must not be what has to wait.
        waiting = pool(1, ahead=AHEAD, threads=True)
        source = source.map_batches(Admission, fn_constructor_args=(config, store), compute=waiting, num_cpus=0.01, **whole)
    return source.map_batches(
        sampler,
        fn_constructor_args=(config, prompts, store),
        compute=pool(cluster.samplers, cluster.max_samplers, ahead=2, threads=True),
        num_cpus=cluster.sampler_cpus,
        num_gpus=cluster.sampler_gpus,
        **whole,
    ).map_batches(
        reward,
        fn_constructor_args=(config, application),
        compute=pool(cluster.rewards.most, ahead=4),
        num_cpus=0.01,
        **whole,
    )
