"""The stream of rollouts on Ray Data: admission, a pool of samplers, rewards. One block is one micro-batch, all along.

A micro-batch enters when the policy version that it asks for exists, so no sampler ever waits inside a task.
"""

from collections.abc import Sequence

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, Dataset

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.stages import Admission, RewardStage, SamplerStage, Timed

#: Micro-batches that wait in the process that admits them: as each takes it no time, Ray Data's own turn between two would be
#: most of it. A stage that scores has one that waits, and fetches it while the one before is scored and handed on. So has a
#: sampler at policy_lag 1; at 0, where the step waits for its last sampler, another one may be free for it sooner.
AHEAD = 16


def rollouts(
    config: AlignConfig,
    prompts: Sequence[str],
    store: ActorHandle,
    application: str,
    first_step: int = 0,
    sampler: type[Timed] = SamplerStage,
    reward: type[Timed] = RewardStage,
) -> Dataset:
    """All micro-batches of a run from a step on, in order, by these stages. Set ``preserve_order`` where it is executed."""
    cluster = config.cluster
    parts = config.train.batch // config.train.micro_batch
    source = ray.data.from_arrow([pa.table({"number": [n]}) for n in range(first_step * parts, config.train.steps * parts)])
    whole = {"batch_size": None, "batch_format": "numpy"}  # a killed actor is restarted and its task repeated, by default

    def pool(size: int, most: int | None = None, *, ahead: int) -> ActorPoolStrategy:
        return ActorPoolStrategy(
            min_size=size,
            max_size=most or size,
            max_tasks_in_flight_per_actor=ahead,
            max_concurrent_calls_per_actor=min(ahead, 2),  # of which one works, and the other is fetched or handed on
        )

    return (
        source.map_batches(Admission, fn_constructor_args=(config, store), compute=pool(1, ahead=AHEAD), num_cpus=0.01, **whole)
        .map_batches(
            sampler,
            fn_constructor_args=(config, prompts, store),
            compute=pool(cluster.samplers, cluster.max_samplers, ahead=1 + config.train.policy_lag),
            num_cpus=cluster.sampler_cpus,
            num_gpus=cluster.sampler_gpus,
            **whole,
        )
        .map_batches(
            reward,
            fn_constructor_args=(config, application),
            compute=pool(cluster.rewards.most, ahead=2),
            num_cpus=0.01,
            **whole,
        )
    )
