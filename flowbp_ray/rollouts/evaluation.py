"""Evaluation on Ray Data: the same prompts, seeds, guidance and grid, whatever the adapter is."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy

from flowbp_ray.backbones.sd3 import DTYPES, SD3Backbone
from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.batches import Block
from flowbp_ray.rollouts.stages import Examiner
from flowbp_ray.shapes.captions import TASKS, evaluation_prompts
from flowbp_ray.shapes.evaluation import Score, six_tasks
from flowbp_ray.training.adapter import EXPORT_FILE, load_export

SEEDS_APART = 1_000_000  # between two evaluation seeds: more than there are pictures of a task


class Painter:
    """Samples finished latents with an exported adapter (its file's bytes), or with the base model."""

    def __init__(self, config: AlignConfig, exported: bytes | None) -> None:
        torch.set_num_threads(config.cluster.threads)
        device = "cuda" if config.cluster.sampler_gpus else "cpu"
        model, self.sampling = config.model, config.sampling
        self.backbone = SD3Backbone.from_pretrained(model.source, DTYPES[model.dtype], device, model.revision)
        if exported is not None:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / EXPORT_FILE).write_bytes(exported)
                load_export(self.backbone, Path(folder))

    def __call__(self, block: Block) -> Block:
        """Add finished latents to ``prompt`` and ``seed``."""
        latents = self.backbone.sample_latents(
            block["prompt"].tolist(),
            block["seed"].tolist(),
            steps=self.sampling.steps,
            guidance_scale=self.sampling.guidance_scale,
            height=self.sampling.height,
            width=self.sampling.width,
        )
        return block | {"latents": latents.cpu().numpy()}


def evaluate(
    config: AlignConfig, application: str, exported: bytes | None, progress: Callable[[int], object]
) -> dict[str, Score]:
    """The six tasks, their ``mean``, and every reward component's mean with its standard error; ``exported`` None is the base."""
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
            compute=ActorPoolStrategy(size=evaluators(config)),
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
    for name in (k for k in columns if k.startswith("reward/")):
        values = columns[name].astype(np.float64)
        scores[name] = Score(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))
    return scores


def evaluators(config: AlignConfig) -> int:
    """Nothing trains meanwhile, so the train workers' places sample too where they are alike."""
    cluster = config.cluster
    alike = cluster.trainer_cpus >= cluster.sampler_cpus and cluster.trainer_gpus >= cluster.sampler_gpus
    return cluster.samplers + (config.train.workers if alike else 0)
