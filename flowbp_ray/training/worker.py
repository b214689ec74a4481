"""The Ray Train side: every worker learns from its share of each step's micro-batches, rank 0 publishes and reports.

Driver and controller import this module too, so the learner, with diffusers, is imported where it is made.
"""

import math
import platform
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray import ObjectRef, train
from ray.actor import ActorHandle
from torch import Tensor

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.asking import Request
from flowbp_ray.rollouts.batches import Block, Chunk, MicroBatch, policy_version
from flowbp_ray.rollouts.plans import plan_of
from flowbp_ray.rollouts.stages import REWARDS, service
from flowbp_ray.training.watch import CollapseWatch, diversity

if TYPE_CHECKING:
    from flowbp_ray.training.learner import Learner


def learner_of(config: AlignConfig, rank: int) -> "Learner":
    """A rank's learner."""
    from flowbp_ray.training.learner import Learner

    return Learner(config, rank)


#: The chunks of the policy versions that may be asked for, as far as this worker published them.
Published = dict[int, list[ObjectRef]]


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
    #: Of the run's folder, the files that say what it is: each checkpoint has them too.
    identity: tuple[str, ...]
    #: Makes the learner of a rank.
    learner: Callable[[AlignConfig, int], "Learner"] = learner_of


def train_loop(job: Job) -> str | None:
    """Do all steps of a run that are still to be done, or those until its watch stops it: why it did, on rank 0.

    It goes on from the newest checkpoint that Ray Train has of the run. RuntimeError if a micro-batch reaches another rank than
    its own, or another step, or if the run's folder is not to be seen from here; FloatingPointError where too many steps in a
    row have no finite gradient.
    """
    config, rank = job.config, train.get_context().get_world_rank()
    if rank == 0 and not (job.folder / "config.yaml").exists():
        raise RuntimeError(
            f"the train worker on {platform.node()} cannot see {job.folder}, where its checkpoints would go: "
            "set output to a folder that all machines of the cluster share"
        )
    learner = job.learner(config, rank)
    published: Published = {}
    if (newest := train.get_checkpoint()) is None:
        publish(job, learner, published)
        if rank == 0:
            plans = (f"step {step}: {plan_of(config, learner.sigmas, step).table()}" for step in range(config.train.steps))
            ray.get(job.tracker.text.remote("\n\n".join(plans), "plans.txt"))
            named = (f"{name} {tuple(p.shape)}" for name, p in learner.weights.parameters.items())
            ray.get(job.tracker.text.remote("\n".join(named), "trained_parameters.txt"))
    else:
        with newest.as_directory() as folder:
            earlier = learner.restore(Path(folder))
        if learner.progress.stopped or learner.version >= config.train.steps:
            return learner.progress.stopped
        for version in range(policy_version(config, learner.version), learner.version):
            hand_out(job, learner, published, version, earlier.get(version, []))
        publish(job, learner, published)
    progress = learner.progress
    held_out = [f"reward/{c.name}" for c in config.reward.components if c.weight == 0]
    watch = CollapseWatch(config.watch, held_out, progress.watch)
    progress.watch = watch.state
    if learner.version == 0:
        watch.see(show(job, learner), -1)
    shard = train.get_dataset_shard("rollouts")
    blocks = iter(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
    fetching = ThreadPoolExecutor(1)
    parts = config.train.batch // config.train.micro_batch // config.train.workers
    logged = None
    since: dict[str, list[float]] = defaultdict(list)  # the last checkpoint: what it is judged by, on rank 0
    for step in range(learner.version, config.train.steps):
        began, sums, seconds = time.perf_counter(), torch.zeros(0), {"waiting": 0.0, "update": 0.0}
        names: list[str] = []
        plan, taken = learner.plan, list[Block]()
        coming = one_ahead(blocks, parts, fetching)
        for part in range(parts):
            asked = time.perf_counter()
            block = next(coming)
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
            taken.append(block)
            seconds["update"] += time.perf_counter() - started
            names, values = totals(block)
            sums = values if part == 0 else sums + values
        started = time.perf_counter()
        norm = learner.update(add_up if config.train.workers > 1 else None)
        seconds["update"] += time.perf_counter() - started
        if progress.skipped_in_a_row:
            skipped(job, learner, step, taken)
        pushed, seconds["publishing"] = publish(job, learner, published)
        names, sums = [*names, "policy_bytes"], torch.cat([sums, torch.tensor([pushed])])
        if config.train.workers > 1:
            sums = sums.to(learner.backbone.device)  # on GPUs, Ray Train's process group adds up what is there alone
            add_up(sums)
        if rank == 0:
            if logged is not None:
                ray.get(logged)
            seconds["step"] = time.perf_counter() - began
            figures = dict(zip(names, sums.tolist(), strict=True))
            seconds |= {k.removesuffix("_seconds"): figures.pop(k) for k in list(figures) if k.endswith("_seconds")}
            metrics = {"policy_bytes": figures.pop("policy_bytes")}
            for stage in ("sampling", "reward"):
                metrics[f"sample_bytes/{stage}"] = figures.pop(f"{stage}_bytes") / config.train.batch
            metrics |= {k: v / config.train.batch for k, v in figures.items()}
            metrics |= {"grad_norm": norm} if math.isfinite(norm) else {}
            metrics |= {"policy_version": policy_version(config, step), "skipped_updates": progress.skipped}
            metrics |= {f"seconds/{stage}": value for stage, value in seconds.items()}
            metrics |= {f"active/{k}": a.index for k, a in enumerate(plan.active)}
            logged = job.tracker.metrics.remote(metrics, step)  # waited for in the next step, or before a checkpoint
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
        if stops:
            progress.stopped = next(iter(warnings), None)
        if ends or stops or learner.version % config.train.checkpoint_every == 0:
            if logged is not None:
                ray.get(logged)  # a step that is not done again has its point
            checkpoint(job, learner, published, {metric: float(np.mean(values)) for metric, values in since.items()})
            since.clear()
        if stops:
            break  # with all ranks' iterators gone, Ray Data ends its stages, those that wait for the next policy version too
    return progress.stopped


def one_ahead(blocks: Iterator[Block], number: int, fetching: Executor) -> Iterator[Block | None]:
    """So many blocks, None for each that there is not, every next one fetched while one is worked on.

    Ray Data's own prefetching gives none before it has the one after it, which of a step's last one may depend on that step.
    """
    coming = fetching.submit(next, blocks, None)
    for left in reversed(range(number)):
        block = coming.result()
        if left:
            coming = fetching.submit(next, blocks, None)
        yield block


def totals(block: Block) -> tuple[list[str], Tensor]:
    """Names and sums over the samples of what is reported as a mean, and of the seconds."""
    names = sorted(
        k for k in block if k.startswith(("reward/", "weight/")) or k == "objective" or k.endswith(("_seconds", "_bytes"))
    )
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


def publish(job: Job, learner: "Learner", published: Published) -> tuple[int, float]:
    """Put this worker's part of the newest policy version into the object store; its bytes and seconds.

    What no sampler will ask for any more goes first, so that at lag 0 there is one version, and not two, at any time.
    """
    began, oldest = time.perf_counter(), learner.version - job.config.train.policy_lag
    ray.get(job.store.retire.remote(oldest))
    for version in [v for v in published if v < oldest]:
        del published[version]
    pushed = hand_out(job, learner, published, learner.version, learner.policy())
    return pushed, time.perf_counter() - began


def hand_out(job: Job, learner: "Learner", published: Published, version: int, chunks: Iterable[Chunk]) -> int:
    """Publish a version's chunks, if this worker has a part of it; their bytes."""
    pushed, references = 0, []
    for chunk in chunks:
        pushed += chunk.bytes
        references.append(ray.put(chunk))
    if learner.publishes:
        published[version] = references
        ray.get(job.store.publish.remote(version, learner.rank, references))
    return pushed


def skipped(job: Job, learner: "Learner", step: int, blocks: list[Block]) -> None:
    """Warn of a step without a finite gradient, the first time in a row with all that is needed to repeat it on the disk.

    FloatingPointError where there are too many in a row.
    """
    row, most = learner.progress.skipped_in_a_row, job.config.train.max_skipped
    folder = job.folder / f"not_finite_{step + 1 - row:06d}"
    if row == 1:
        learner.dump(folder, blocks)
    what = f"the gradient of step {step} is not finite, so no update was made ({row} in a row; what it was is in {folder})"
    if learner.rank == 0:
        ray.get(job.tracker.warn.remote([f"after step {step}: {what}"]))
    if row > most:
        agreed(True, learner)  # all have kept what they had
        raise FloatingPointError(
            f"{what}: train.max_skipped allows {most} in a row; lower train.learning_rate, or compute in float32 (model.dtype)"
        )


def checkpoint(job: Job, learner: "Learner", published: Published, means: dict[str, float]) -> None:
    """Report a checkpoint to Ray Train, which keeps it and judges it by rank 0's ``means``; every rank has to call this, those
    with files give them."""
    metrics = {"version": learner.version} | means
    asked_for = range(policy_version(learner.config, learner.version), learner.version)
    policies = {version: ray.get(published[version]) for version in asked_for if version in published}
    with tempfile.TemporaryDirectory() as folder:
        for file in job.identity if learner.rank == 0 else ():
            shutil.copy(job.folder / file, folder)
        learner.save(Path(folder), policies)
        given = train.Checkpoint.from_directory(folder) if any(Path(folder).iterdir()) else None
        train.report(metrics, checkpoint=given, checkpoint_dir_name=name(learner.version))


def name(version: int) -> str:
    """A checkpoint's folder."""
    return f"checkpoint_{version:06d}"
