"""Training on a Ray cluster: one attempt after the other, each a stream of rollouts and a group of train workers."""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import PlacementGroupID
from ray.actor import ActorHandle
from ray.train import CheckpointConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from tqdm import tqdm

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.policy import PolicyStore
from flowbp_ray.rollouts.stages import Rewarding, RewardStage, SamplerStage, Sampling
from flowbp_ray.rollouts.stream import InTurn, rollouts
from flowbp_ray.tracking.tracker import RUN_FILE
from flowbp_ray.training.worker import Job, learner_of, train_loop
from pipelines.causes import clean_up, lost, reason
from pipelines.runs import BEGAN, CONFIG, Kept
from pipelines.session import Session, on_this_node, progress

#: What a run is: its configuration, what it began with, and its MLflow run. Its folder has them, and each checkpoint.
IDENTITY = (CONFIG, BEGAN, RUN_FILE)
PATIENCE = 180  # seconds without a step, or ten times the longest so far, after which the user is told what may be missing


@dataclass(frozen=True)
class Parts:
    """What does the work of an attempt; `pipelines.scale` puts others in its place."""

    sampler: type[Sampling] = SamplerStage
    reward: type[Rewarding] = RewardStage
    learner: Callable[[AlignConfig, int], Any] = learner_of


REAL = Parts()


def trained(config: AlignConfig, prompts: list[str], folder: Path, at: Session, preview: list[tuple[str, int]]) -> Result:
    """All steps, from the newest checkpoint on. A process or machine that is lost costs the steps since then, and is made up for
    as often as ``train.retries`` says; anything else that goes wrong would again, and ends the run.

    Ray Train's own FailureConfig would repeat all other errors too, and not outlive its controller.
    """
    kept, tries = Kept(config, folder), 0
    kept.mend()
    steps = kept.steps
    with progress(config.train.steps, "starting samplers and train workers", "step", steps) as bar:
        while True:
            began = steps
            try:
                return attempt(config, prompts, folder, at, preview, kept, bar)
            except Exception as error:
                with contextlib.suppress(OSError):  # storage that does not answer now is not what went wrong
                    steps = kept.steps
                tries = 1 if steps > began else tries + 1
                if not lost(error) or tries > config.train.retries:
                    raise
                bar.write(f"lost: {reason(error)}\ngoing on from step {steps}", sys.stderr)
                kept.mend()


def attempt(
    config: AlignConfig,
    prompts: list[str],
    folder: Path,
    at: Session,
    preview: list[tuple[str, int]],
    kept: Kept,
    bar: tqdm,
    parts: Parts = REAL,
) -> Result:
    """One stream of rollouts and one group of train workers, as far as they get."""
    others = placement_groups()
    # All samplers may wait in it: of Ray's own 1,000 calls at once none would be left for who publishes.
    store = ray.remote(PolicyStore).options(num_cpus=0, max_concurrency=100_000)
    store = store.remote(config.train.workers if config.train.sharded else 1)
    cluster = config.cluster
    first = min(kept.steps, config.train.steps - 1)  # where all steps are done nobody reads it
    stream = rollouts(config, prompts, store, at.rewards, first, parts.sampler, parts.reward)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=Job(config, folder, store, at.tracker, at.rewards, preview, IDENTITY, parts.learner),
        scaling_config=ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=cluster.trainer_gpus > 0,
            resources_per_worker={"CPU": cluster.trainer_cpus} | ({"GPU": cluster.trainer_gpus} if cluster.trainer_gpus else {}),
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=kept.storage,
            checkpoint_config=CheckpointConfig(  # beside these it keeps the last one
                num_to_keep=config.train.keep_checkpoints, checkpoint_score_attribute=config.train.best
            ),
        ),
        datasets={"rollouts": stream},
        dataset_config=InTurn(),
    )
    # As a task of its own: in the main thread Ray Train takes Ctrl-C for itself, and a thread would outlive the connection.
    running = ray.remote(num_cpus=0, max_retries=0, max_calls=1, scheduling_strategy=on_this_node())(TorchTrainer.fit).remote(
        trainer
    )
    said, patience = 0, Patience(bar.n)
    try:
        while not ray.wait([running], timeout=0.5)[0]:
            said = look(bar, at.tracker, said)
            kept.copy()
            if patience.ends(bar.n):
                missing = f"{config.reserved()} are needed, free are {ray.available_resources()}"
                missing += "; torch.compile takes minutes too" if config.cluster.compile else ""
                bar.write(f"no step for {time.monotonic() - patience.since:.0f} seconds: {missing}", sys.stderr)
        look(bar, at.tracker, said)
    except BaseException:
        ray.cancel(running, force=True)
        raise
    finally:
        clean_up("give back what was reserved", lambda: free(placement_groups() - others))
        ray.kill(store)  # an error's traceback may hold its handle for as long as that is looked at
    result: Result = ray.get(running)
    return result


class Patience:
    """With steps that do not come, of which a person is told once."""

    def __init__(self, steps: float) -> None:
        self.steps, self.since, self.longest, self.ended = steps, time.monotonic(), 0.0, False

    def ends(self, steps: float) -> bool:
        """Whether it ends now, where so many steps are done."""
        now = time.monotonic()
        if steps == self.steps:
            ends = not self.ended and now - self.since > max(PATIENCE, 10 * self.longest)
            self.ended |= ends
            return ends
        if steps > self.steps:  # else an attempt before this one had got further
            self.longest = max(self.longest, now - self.since)
        self.steps, self.since, self.ended = steps, now, False
        return False


def placement_groups() -> set[str]:
    """This driver's, by their ids, which end with that of its job."""
    own = ray.get_runtime_context().get_job_id()
    return {group for group, of in placement_group_table().items() if group.endswith(own) and of["state"] != "REMOVED"}


def free(groups: set[str]) -> None:
    """Remove what Ray Train reserved for train workers and did not give back. Ray itself does that for a lost controller only
    where the cluster has a dashboard, else when the driver ends; the next attempt needs the room."""
    for group in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def look(bar: tqdm, tracker: ActorHandle, said: int) -> int:
    """Put the newest figures on the bar, and above it all but the first ``said`` warnings; how many there are."""
    newest, warnings = ray.get([tracker.progress.remote(), tracker.warnings.remote()])
    for warning in warnings[said:]:
        bar.write(f"warning {warning}", sys.stderr)
    follow(bar, newest)
    return len(warnings)


def follow(bar: tqdm, newest: tuple[int, dict[str, float]] | None) -> None:
    """Put a step's figures on the bar."""
    if newest is None or bar.n == newest[0] + 1:
        return
    step, figures = newest
    rewards = {k.removeprefix("reward/"): f"{v:.2f}" for k, v in figures.items() if k.startswith("reward/")}
    if not bar.desc.startswith("align"):
        bar.set_description("align", refresh=False)
        bar.unpause()  # the time left is counted from the first step on
    bar.set_postfix(rewards, refresh=False)
    bar.update(step + 1 - bar.n)
