"""Evaluation on Ray Data: the same prompts, seeds, guidance and grid, whatever the adapter is."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.stages import Examiner, Painter
from flowbp_ray.shapes.captions import TASKS, evaluation_prompts
from flowbp_ray.shapes.evaluation import Score, share, six_tasks

SEEDS_APART = 1_000_000  # between two evaluation seeds: more than there are pictures of a task


def evaluate(
    config: AlignConfig, application: str, exported: bytes | None, progress: Callable[[int], object]
) -> dict[str, Score]:
    """The six tasks, their ``mean``, the share ``watermarked`` and every reward component's mean, with standard errors.

    ``exported`` is an adapter's file; None is the base.
    """
    settings = config.evaluation
    source = []
    for task, prompts in evaluation_prompts(settings.per_task, settings.seed).items():
        for start in range(0, len(prompts), settings.batch):
            texts = prompts[start : start + settings.batch]
            seeds = [settings.seed * SEEDS_APART + start + i for i in range(len(texts))]
            source.append(pa.table({"task": [task] * len(texts), "prompt": texts, "seed": seeds}))
    whole = {"batch_size": None, "batch_format": "numpy"}
    cluster = config.cluster
    judged = (
        ray.data.from_arrow(source)
        .map_batches(
            Painter,
            fn_constructor_args=(config, exported),
            compute=ActorPoolStrategy(size=cluster.samplers),
            num_cpus=cluster.sampler_cpus,
            num_gpus=cluster.sampler_gpus,
            **whole,
        )
        .map_batches(
            Examiner,
            fn_constructor_args=(application,),
            compute=ActorPoolStrategy(size=cluster.reward_replicas),
            num_cpus=0.01,
            **whole,
        )
    )
    blocks = []
    for block in judged.iter_batches(batch_size=None, batch_format="numpy"):
        blocks.append(block)
        progress(len(block["right"]))
    columns = {k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]}
    scores = six_tasks({task: columns["right"][columns["task"] == task].tolist() for task in TASKS})
    scores["watermarked"] = share(columns["watermarked"].tolist())
    for name in (k for k in columns if k.startswith("reward/")):
        values = columns[name].astype(np.float64)
        scores[name] = Score(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))
    return scores
