"""The Ray Train side: every worker learns from its share of each step's micro-batches, rank 0 publishes and reports.

Driver and controller import this module too, so the learner, with diffusers, is imported where it is made.
"""

import platform
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray import train
from ray.actor import ActorHandle
from torch import Tensor

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.asking import Request
from flowbp_ray.rollouts.batches import Block, MicroBatch, policy_version
from flowbp_ray.rollouts.plans import plan_of
from flowbp_ray.rollouts.stages import REWARDS, service
from flowbp_ray.training.watch import CollapseWatch, diversity

if TYPE_CHECKING:
    from flowbp_ray.training.learner import Learner


@dataclass(frozen=True)
class Job:
    """What a train worker is given: ``folder`` is the run's, all handles are Ray's, ``preview`` the fixed prompts and seeds
    that are pictured."""

    config: AlignConfig
    folder: Path
    store: ActorHandle
    tracker: ActorHandle
    rewards: str
    preview: list[tuple[str, int]]


def train_loop(job: Job) -> str | None:
    """Do all steps of a run, or those until its watch stops it: why it did, on rank 0. RuntimeError if a micro-batch reaches
    another rank than its own, or another step, or if the run's folder is not to be seen from here."""
    from flowbp_ray.training.learner import Learner

    config, rank = job.config, train.get_context().get_world_rank()
    if rank == 0 and not (job.folder / "config.yaml").exists():
        raise RuntimeError(
            f"the train worker on {platform.node()} cannot see {job.folder}, where its checkpoints would go: "
            "set output to a folder that all machines of the cluster share"
        )
    learner = Learner(config, rank)
    publish(job, learner)
    if rank == 0:
        plans = (f"step {step}: {plan_of(config, learner.sigmas, step).table()}" for step in range(config.train.steps))
        ray.get(job.tracker.text.remote("\n\n".join(plans), "plans.txt"))
        named = (f"{name} {tuple(p.shape)}" for name, p in learner.weights.parameters.items())
        ray.get(job.tracker.text.remote("\n".join(named), "trained_parameters.txt"))
    watch = CollapseWatch(config.watch, [f"reward/{c.name}" for c in config.reward.components if c.weight == 0])
    watch.see(show(job, learner), -1)
    shard = train.get_dataset_shard("rollouts")
    blocks = iter(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
    parts = config.train.batch // config.train.micro_batch // config.train.workers
    logged = None
    stopped = None
    since: dict[str, list[float]] = defaultdict(list)  # the last checkpoint: what it is judged by, on rank 0
    for step in range(config.train.steps):
        began, sums, seconds = time.perf_counter(), torch.zeros(0), {"waiting": 0.0, "update": 0.0}
        names: list[str] = []
        plan = learner.plan
        for part in range(parts):
            asked = time.perf_counter()
            block = next(blocks, None)
            if block is None:
                raise RuntimeError(
                    f"the stream of rollouts ended in step {step} of {config.train.steps}: see what its stages say"
                )
            seconds["waiting"] += time.perf_counter() - asked
            wanted = part * config.train.workers + rank
            own = MicroBatch.of(config, step * parts * config.train.workers + wanted)
            if block["sample"].tolist() != list(own.samples):
                raise RuntimeError(f"rank {rank} was given samples {block['sample'].tolist()} of step {step}, not {own.samples}")
            started = time.perf_counter()
            learner.accumulate(block)
            seconds["update"] += time.perf_counter() - started
            names, values = totals(block)
            sums = values if part == 0 else sums + values
        started = time.perf_counter()
        norm = learner.update(add_up if config.train.workers > 1 else None)
        seconds["update"] += time.perf_counter() - started
        pushed, seconds["publishing"] = publish(job, learner)
        names, sums = [*names, "policy_bytes"], torch.cat([sums, torch.tensor([pushed])])
        if config.train.workers > 1:
            sums = sums.to(learner.backbone.device)  # on GPUs, Ray Train's process group adds up what is there alone
            add_up(sums)
        if rank == 0:
            if logged is not None:
                ray.get(logged)
            seconds["step"] = time.perf_counter() - began
            figures = dict(zip(names, sums.tolist(), strict=True))
            seconds |= {stage: figures.pop(f"{stage}_seconds") for stage in ("loading", "sampling", "reward")}
            metrics = {"policy_bytes": figures.pop("policy_bytes")} | {k: v / config.train.batch for k, v in figures.items()}
            metrics |= {"grad_norm": norm, "policy_version": policy_version(config, step)}
            metrics |= {f"seconds/{stage}": value for stage, value in seconds.items()}
            metrics |= {f"active/{k}": a.index for k, a in enumerate(plan.active)}
            logged = job.tracker.metrics.remote(metrics, step)  # waited for in the next step
            for metric in ("objective", *(k for k in metrics if k.startswith("reward/"))):
                since[metric].append(metrics[metric])
        ends = learner.version == config.train.steps
        shows = ends or learner.version % config.evaluation.preview_every == 0
        pictured = show(job, learner) if shows else {}
        warnings = watch.see(metrics | pictured, step) if rank == 0 else []
        if warnings:
            ray.get(job.tracker.warn.remote(warnings))
        stops = not ends and config.watch.stop and agreed(bool(warnings), learner)
        if stops and not shows:
            show(job, learner)
        if ends or stops or learner.version % config.train.checkpoint_every == 0:
            checkpoint(learner, {metric: float(np.mean(values)) for metric, values in since.items()})
            since.clear()
        if stops:
            stopped = next(iter(warnings), None)
            break  # with all ranks' iterators gone, Ray Data ends its stages, those that wait for the next policy version too
    if logged is not None:
        ray.get(logged)
    return stopped


def totals(block: Block) -> tuple[list[str], Tensor]:
    """Names and sums over the samples of what is reported as a mean, and of the seconds."""
    names = sorted(k for k in block if k.startswith(("reward/", "weight/")) or k == "objective" or k.endswith("_seconds"))
    return names, torch.tensor([float(np.sum(block[k], dtype=np.float64)) for k in names], dtype=torch.float64)


def add_up(values: Tensor) -> None:
    """Replace ``values`` by their sum over all train workers."""
    dist.all_reduce(values)


def agreed(stop: bool, learner: "Learner") -> bool:
    """Whether a worker wants to stop; all of them have to ask at the same time."""
    wanted = torch.tensor(float(stop), device=learner.backbone.device)
    if learner.config.train.workers > 1:
        add_up(wanted)
    return bool(wanted.item())


def show(job: Job, learner: "Learner") -> dict[str, float]:
    """Picture the fixed prompts and seeds by the evaluated weights: the reward service decodes, the tracker keeps them.

    Returns, and logs, the diversity over further seeds, on rank 0 and if there are any.
    """
    if not job.preview or (learner.rank != 0 and not job.config.train.sharded):
        return {}
    prompts, seeds, looks = [p for p, _ in job.preview], [s for _, s in job.preview], []
    for again in range(job.config.evaluation.preview_seeds):  # one after the other: the first are the same however many there are
        latents = learner.preview(prompts, [s + again * len(seeds) for s in seeds]).cpu().numpy()  # sharded, it needs all workers
        if learner.rank == 0:
            seen = Request(service(job.rewards), "look", latents, prompts, what=REWARDS, prompts=prompts)
            looks.append(seen.result()["pictures"])
    if learner.rank != 0:
        return {}
    ray.get(job.tracker.previews.remote(prompts, looks[0], learner.version))
    if len(looks) == 1:
        return {}
    measured = {"diversity": diversity(np.stack(looks))}
    ray.get(job.tracker.figures.remote(measured, learner.version))
    return measured


def publish(job: Job, learner: "Learner") -> tuple[int, float]:
    """Put this worker's part of the newest policy version into the object store; its bytes and seconds.

    What no sampler will ask for any more goes first, so that at lag 0 there is one version, and not two, at any time.
    """
    began = time.perf_counter()
    ray.get(job.store.retire.remote(learner.version - job.config.train.policy_lag))
    chunks, pushed = [], 0
    for chunk in learner.policy():
        pushed += chunk.bytes
        chunks.append(ray.put(chunk))
    if chunks:
        ray.get(job.store.publish.remote(learner.version, learner.rank, chunks))
    return pushed, time.perf_counter() - began


def checkpoint(learner: "Learner", means: dict[str, float]) -> None:
    """Report a checkpoint to Ray Train, which keeps it and judges it by rank 0's ``means``; every rank has to call this, those
    with files give them."""
    metrics = {"version": learner.version} | means
    with tempfile.TemporaryDirectory() as folder:
        learner.save(Path(folder))
        given = train.Checkpoint.from_directory(folder) if any(Path(folder).iterdir()) else None
        train.report(metrics, checkpoint=given, checkpoint_dir_name=name(learner.version))


def name(version: int) -> str:
    """A checkpoint's folder."""
    return f"checkpoint_{version:06d}"
