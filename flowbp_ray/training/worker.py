"""The Ray Train side: every worker learns from its share of each step's micro-batches and publishes its part of the weights
(unless sharded, all of them are rank 0's). All report checkpoints together; rank 0 alone reports metrics.

Driver and controller import this module too, so the learner, with diffusers, is imported where it is made.
"""

import math
import platform
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
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
from flowbp_ray.rollouts.batches import Block, MicroBatch, policy_version
from flowbp_ray.rollouts.plans import plan_of
from flowbp_ray.rollouts.stages import REWARDS, service
from flowbp_ray.training.metrics import means, totals
from flowbp_ray.training.publishing import Publisher
from flowbp_ray.training.watch import CollapseWatch, diversity

if TYPE_CHECKING:
    from flowbp_ray.training.learner import Learner


def learner_of(config: AlignConfig, rank: int) -> "Learner":
    """A rank's learner."""
    from flowbp_ray.training.learner import Learner

    return Learner(config, rank)


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
    rank, newest = train.get_context().get_world_rank(), train.get_checkpoint()
    if rank == 0 and not (job.folder / "config.yaml").exists():
        raise RuntimeError(
            f"the train worker on {platform.node()} cannot see {job.folder}, where its checkpoints would go: "
            "set output to a folder that all machines of the cluster share"
        )
    if newest is None:
        worker = TrainWorker(job, rank, None)
    else:
        from flowbp_ray.training.checkpoints import check

        with newest.as_directory() as folder:
            progress, _ = check(Path(folder))
            if (progress.stopped and job.config.watch.stop) or progress.version >= job.config.train.steps:
                return progress.stopped
            worker = TrainWorker(job, rank, Path(folder))
    return worker.run()


class TrainWorker:
    """One rank's part in a run that has steps to do, from a checkpoint on or from the beginning."""

    def __init__(self, job: Job, rank: int, newest: Path | None) -> None:
        self.job, self.config, self.rank = job, job.config, rank
        # A thread of Ray Data's fetches the next one meanwhile. With prefetch_batches it would give none before it has the one
        # after it, which of a step's last one may depend on that step.
        self.blocks = begun(
            iter(train.get_dataset_shard("rollouts").iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
        )
        self.learner = job.learner(self.config, self.rank)
        self.publisher = Publisher(job.store, self.learner)
        #: That the last step's metrics, and pictures, are logged.
        self.logged: list[ObjectRef] = []
        #: Since the last checkpoint: what it is judged by, on rank 0.
        self.since: dict[str, list[float]] = defaultdict(list)
        if newest is None:
            self.publisher.publish()
        else:
            self.publisher.publish_again(self.learner.restore(newest))

    def run(self) -> str | None:
        """As `train_loop`."""
        config, learner, steps = self.config, self.learner, self.config.train.steps
        self.announce()
        progress = learner.progress
        progress.stopped = None  # or it is to go on all the same
        held_out = [f"reward/{c.name}" for c in config.reward.components if c.weight == 0]
        watch = CollapseWatch(config.watch, held_out, progress.watch)
        progress.watch = watch.state
        if learner.version == 0:
            watch.see(self.show(), -1)
        for step in range(learner.version, steps):
            metrics = self.step(step)
            ends = learner.version == steps
            shows = ends or learner.version % config.evaluation.preview_every == 0
            pictured = self.show() if shows else {}
            warnings = watch.see(metrics | pictured, step) if self.rank == 0 else []
            if warnings:
                ray.get(self.job.tracker.warn.remote(warnings))
            stops = not ends and config.watch.stop and agreed(bool(warnings), learner)
            if stops and not shows:
                self.show()
            if stops:
                progress.stopped = next(iter(warnings), None)
            if ends or stops or learner.version % config.train.checkpoint_every == 0:
                self.checkpoint()
            if stops:
                break  # with all ranks' iterators gone, Ray Data ends its stages, those that wait for the next policy version too
        return progress.stopped

    def announce(self) -> None:
        """Log the plans of all steps, of which there may be more than when the run began, and what is trained."""
        learner, tracker = self.learner, self.job.tracker
        if self.rank == 0:
            plans = (f"step {s}: {plan_of(self.config, learner.sigmas, s).table()}" for s in range(self.config.train.steps))
            ray.get(tracker.text.remote("\n\n".join(plans), "plans.txt"))
            named = (f"{name} {tuple(p.shape)}" for name, p in learner.weights.parameters.items())
            ray.get(tracker.text.remote("\n".join(named), "trained_parameters.txt"))

    def step(self, step: int) -> dict[str, float]:
        """Do a step and publish what comes of it; its metrics, which are on their way to the tracker, on rank 0."""
        config, learner, began, plan = self.config, self.learner, time.perf_counter(), self.learner.plan
        taken, seconds = self.learn(step)
        started = time.perf_counter()
        norm = learner.update(add_up if config.train.workers > 1 else None)
        seconds["update"] += time.perf_counter() - started
        if learner.progress.skipped_in_a_row:
            self.skipped(step, taken)
        pushed, seconds["publishing"] = self.publisher.publish()
        names, sums = totals(taken)
        names, sums = [*names, "policy_bytes"], torch.cat([sums, torch.tensor([pushed])])
        if config.train.workers > 1:
            sums = sums.to(learner.backbone.device)  # on GPUs, Ray Train's process group adds up what is there alone
            add_up(sums)
        if self.rank != 0:
            return {}
        self.settle()
        seconds["step"] = time.perf_counter() - began
        metrics = means(dict(zip(names, sums.tolist(), strict=True)), seconds, config.train.batch)
        metrics |= {"grad_norm": norm} if math.isfinite(norm) else {}
        metrics |= {"policy_version": policy_version(config, step), "skipped_updates": learner.progress.skipped}
        metrics |= {f"active/{k}": a.index for k, a in enumerate(plan.active)}
        self.logged.append(self.job.tracker.metrics.remote(metrics, step))
        for metric in ("objective", *(k for k in metrics if k.startswith("reward/"))):
            self.since[metric].append(metrics[metric])
        return metrics

    def learn(self, step: int) -> tuple[list[Block], dict[str, float]]:
        """Add up the gradient of this rank's micro-batches of a step: them, and the seconds of waiting and of work."""
        config, workers = self.config, self.config.train.workers
        parts = config.train.batch // config.train.micro_batch // workers
        taken, seconds = list[Block](), {"waiting": 0.0, "update": 0.0}
        for part in range(parts):
            asked = time.perf_counter()
            block = next(self.blocks, None)
            if block is None:
                raise RuntimeError(
                    f"the stream of rollouts ended in step {step} of {config.train.steps}: see what its stages say"
                )
            started = time.perf_counter()
            seconds["waiting"] += started - asked
            own = MicroBatch.of(config, (step * parts + part) * workers + self.rank)
            if block["sample"].tolist() != list(own.samples):
                raise RuntimeError(
                    f"rank {self.rank} was given samples {block['sample'].tolist()} of step {step}, not {own.samples}"
                )
            self.learner.accumulate(block)
            taken.append(block)
            seconds["update"] += time.perf_counter() - started
        return taken, seconds

    def skipped(self, step: int, blocks: list[Block]) -> None:
        """Warn of a step without a finite gradient, the first time in a row with all that is needed to repeat it on the disk.

        FloatingPointError where there are too many in a row.
        """
        job, learner, row = self.job, self.learner, self.learner.progress.skipped_in_a_row
        folder, most = job.folder / f"not_finite_{step + 1 - row:06d}", self.config.train.max_skipped
        if row == 1:
            learner.dump(folder, blocks)
        what = f"the gradient of step {step} is not finite, so no update was made ({row} in a row; what it was is in {folder})"
        if self.rank == 0:
            ray.get(job.tracker.warn.remote([f"after step {step}: {what}"]))
        if row > most:
            agreed(True, learner)  # all have kept what they had
            raise FloatingPointError(
                f"{what}: train.max_skipped allows {most} in a row; lower train.learning_rate, or compute in float32 "
                "(model.dtype)"
            )

    def show(self) -> dict[str, float]:
        """Picture the fixed prompts and seeds by the evaluated weights: the reward service decodes, the tracker keeps them.

        Returns, and logs, the diversity over further seeds, on rank 0 and if there are any.
        """
        job, learner = self.job, self.learner
        if not job.preview or (self.rank != 0 and not self.config.train.sharded):
            return {}
        prompts, seeds, looks = [p for p, _ in job.preview], [s for _, s in job.preview], []
        for again in range(self.config.evaluation.preview_seeds):  # one by one: the first are the same however many there are
            latents = learner.preview(prompts, [s + again * len(seeds) for s in seeds]).cpu().numpy()  # sharded, it needs all
            if self.rank == 0:
                looks.append(self.look(latents, prompts))
        if self.rank != 0:
            return {}
        self.logged.append(job.tracker.previews.remote(prompts, looks[0], learner.version))
        if len(looks) == 1:
            return {}
        measured = {"diversity": diversity(np.stack(looks))}
        self.logged.append(job.tracker.figures.remote(measured, learner.version))
        return measured

    def look(self, latents: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Pictures uint8 ``(B, H, W, 3)`` by the reward service, which has room for a micro-batch."""
        size, pictures = self.config.train.micro_batch, list[np.ndarray]()
        for start in range(0, len(prompts), size):
            some, texts = latents[start : start + size], prompts[start : start + size]
            seen = Request(service(self.job.rewards), "look", some, texts, what=REWARDS, prompts=texts).result()
            pictures.append(seen["pictures"])
        return np.concatenate(pictures)

    def checkpoint(self) -> None:
        """Report a checkpoint to Ray Train, which keeps it and judges it by rank 0's means since the last one; every rank has to
        call this, those with files give them."""
        self.settle()  # a step that is not done again has its point
        metrics = {"version": self.learner.version} | {metric: float(np.mean(values)) for metric, values in self.since.items()}
        self.since.clear()
        with tempfile.TemporaryDirectory() as folder:
            for file in self.job.identity if self.rank == 0 else ():
                shutil.copy(self.job.folder / file, folder)
            self.learner.save(Path(folder), self.publisher.kept())
            given = train.Checkpoint.from_directory(folder) if any(Path(folder).iterdir()) else None
            train.report(metrics, checkpoint=given, checkpoint_dir_name=name(self.learner.version))

    def settle(self) -> None:
        """Wait until what the tracker was told of the last step is logged; the next one has been done meanwhile."""
        ray.get(self.logged)
        self.logged.clear()


def begun(blocks: Iterator[Block]) -> Iterator[Block | None]:
    """The same, the first of which is asked for now, so that whatever makes them loads its models while this process does. That
    first one is None if there is none."""
    first: Future[Block | None] = Future()

    def ask() -> None:
        try:
            first.set_result(next(blocks, None))
        except BaseException as error:  # whoever asks has it
            first.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()  # a process that ends does not wait for it
    return chain(map(Future.result, [first]), blocks)


def add_up(values: Tensor) -> None:
    """Replace ``values`` by their sum over all train workers."""
    dist.all_reduce(values)


def agreed(stop: bool, learner: "Learner") -> bool:
    """Whether a worker wants to stop; all of them have to ask at the same time."""
    wanted = torch.tensor(float(stop), device=learner.backbone.device)
    if learner.config.train.workers > 1:
        add_up(wanted)
    return bool(wanted.item())


def name(version: int) -> str:
    """A checkpoint's folder."""
    return f"checkpoint_{version:06d}"
