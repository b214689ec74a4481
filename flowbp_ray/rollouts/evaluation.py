"""Evaluation on Ray Data: the same prompts, seeds, guidance and grid, whatever the adapter is."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from pyarrow import parquet
from ray.data import ActorPoolStrategy

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.pictures import Examiner, Painter, scores_file
from flowbp_ray.rollouts.prompts import pictured
from flowbp_ray.shapes.captions import TASKS
from flowbp_ray.shapes.evaluation import Score, average, seeds, six_tasks

#: One row a picture, in the order of their seeds: ``task``, ``seed``, ``prompt`` and ``reward/NAME`` each; what the judges say,
#: by their names: ``right``, ``watermarked``, ``alignment``, ``quality``, and text in ``reason``.
Pictures = dict[str, np.ndarray]

TEXTS = ("task", "prompt", "reason")


def evaluate(
    config: AlignConfig,
    application: str,
    exported: bytes | Path | None,
    progress: Callable[[int], object],
    folder: Path | None = None,
) -> Pictures:
    """Sample and judge all pictures; ``exported`` is an adapter's file, or a pipeline's folder; None is the base.

    In a ``folder`` pictures and scores are kept, and what is there is not made again.
    """
    settings, source, finished = config.evaluation, [], []
    for place, (task, rows) in enumerate(pictured(config).items()):
        for start in range(0, len(rows), settings.batch):
            some = rows[start : start + settings.batch]
            numbers = seeds(place, start, len(some), settings.seed)
            if folder and scores_file(folder, numbers).exists():
                finished.append(parquet.read_table(scores_file(folder, numbers)))
                progress(len(numbers))
                continue
            prompts, entries = [row["prompt"] for row in some], [json.dumps(row) for row in some]
            source.append(pa.table({"task": [task] * len(some), "prompt": prompts, "row": entries, "seed": numbers}))
    blocks = [{k: np.array(v.to_pylist()) for k, v in zip(t.column_names, t.columns, strict=True)} for t in finished]
    if source:
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
                fn_constructor_args=(config, application, folder),
                compute=ActorPoolStrategy(size=cluster.rewards.most),
                num_cpus=settings.judge_cpus,
                num_gpus=settings.judge_gpus,
                **whole,
            )
        )
        for block in judged.iter_batches(batch_size=None, batch_format="numpy"):
            blocks.append(block)
            progress(len(block["seed"]))
    order = np.argsort(np.concatenate([b["seed"] for b in blocks]))
    return {k: np.concatenate([b[k] for b in blocks])[order] for k in blocks[0]}


def scores(pictures: Pictures) -> dict[str, Score]:
    """Where pictures are right or wrong the six tasks and their ``mean``; of all else that is said of them the mean; with
    standard errors. A file's prompts are some of all that could be asked for, so they count as what is independent, and not each
    prompt's pictures; the embedded world's are drawn evenly from all that a task has."""
    averages, shapes = {}, set(pictures["task"]) <= set(TASKS)
    if "right" in pictures and shapes:
        averages = six_tasks({task: pictures["right"][pictures["task"] == task] for task in TASKS})
    elif "right" in pictures:
        from flowbp_ray.evaluators import geneval_rules

        rows = [{"tag": task, "prompt": prompt} for task, prompt in zip(pictures["task"], pictures["prompt"], strict=True)]
        averages = geneval_rules.summary(rows, pictures["right"])
    others = (k for k in pictures if k not in (*TEXTS, "seed", "right"))
    return averages | {name: average(pictures[name], None if shapes else pictures["prompt"]) for name in others}


def differences(before: Pictures, after: Pictures) -> dict[str, Score]:
    """What `scores` gains from ``before`` to ``after``, picture by picture: both have the same prompts and noise, so much of
    what makes scores uncertain is the same in both."""
    if not np.array_equal(before["seed"], after["seed"]):
        raise ValueError("the two evaluations are of different pictures: only the same prompts and seeds can be compared")
    texts = {k: after[k] for k in (*TEXTS, "seed") if k in after}
    own = {k: after[k].astype(np.float64) - before[k].astype(np.float64) for k in after if k not in texts}
    return scores(own | texts)
