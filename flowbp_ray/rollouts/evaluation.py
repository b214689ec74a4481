"""Evaluation on Ray Data: the same prompts, seeds, guidance and grid, whatever the adapter is."""

from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from flowbp_ray.config import AlignConfig
from flowbp_ray.config.schema import Prompts
from flowbp_ray.rollouts.prompts import read_prompts
from flowbp_ray.rollouts.stages import Examiner, Painter
from flowbp_ray.shapes.captions import TASKS, evaluation_prompts
from flowbp_ray.shapes.evaluation import Score, average, seeds, six_tasks

#: One row a picture, in the order of their seeds: ``task``, ``seed`` and ``reward/NAME`` each; where the checker judges, also
#: ``right`` and ``watermarked``.
Pictures = dict[str, np.ndarray]


def pictured(config: AlignConfig, per_task: int) -> dict[str, list[str]]:
    """So many prompts of each task of the evaluation; a file's are one task."""
    settings = config.evaluation
    if settings.checked:
        return evaluation_prompts(per_task, settings.seed)
    return {"prompts": list(islice(cycle(read_prompts(Prompts(path=settings.prompts))), per_task))}


def evaluate(config: AlignConfig, application: str, exported: bytes | Path | None, progress: Callable[[int], object]) -> Pictures:
    """Sample and judge all pictures; ``exported`` is an adapter's file, or a pipeline's folder; None is the base."""
    settings = config.evaluation
    source = []
    for task, prompts in pictured(config, settings.per_task).items():
        for start in range(0, len(prompts), settings.batch):
            texts = prompts[start : start + settings.batch]
            numbers = seeds(task, start, len(texts), settings.seed)
            source.append(pa.table({"task": [task] * len(texts), "prompt": texts, "seed": numbers}))
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
            fn_constructor_args=(application, settings.checked),
            compute=ActorPoolStrategy(size=cluster.rewards.most),
            num_cpus=0.01,
            **whole,
        )
    )
    blocks = []
    for block in judged.iter_batches(batch_size=None, batch_format="numpy"):
        blocks.append(block)
        progress(len(block["seed"]))
    columns = {k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]}
    return {k: v[np.argsort(columns["seed"])] for k, v in columns.items()}


def scores(pictures: Pictures) -> dict[str, Score]:
    """Where the checker judges the six tasks, their ``mean`` and the share ``watermarked``; every reward component's mean; with
    standard errors."""
    averages = {}
    if "right" in pictures:
        averages = six_tasks({task: pictures["right"][pictures["task"] == task] for task in TASKS})
    others = (k for k in pictures if k == "watermarked" or k.startswith("reward/"))
    return averages | {name: average(pictures[name]) for name in others}


def differences(before: Pictures, after: Pictures) -> dict[str, Score]:
    """What `scores` gains from ``before`` to ``after``, picture by picture: both have the same prompts and noise, so much of
    what makes scores uncertain is the same in both."""
    if not np.array_equal(before["seed"], after["seed"]):
        raise ValueError("the two evaluations are of different pictures: only the same prompts and seeds can be compared")
    own = {k: after[k].astype(np.float64) - before[k].astype(np.float64) for k in after if k not in ("task", "seed")}
    return scores(own | {k: after[k] for k in ("task", "seed")})
