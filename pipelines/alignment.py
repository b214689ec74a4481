"""One alignment from beginning to end on a Ray cluster: serve the rewards, evaluate, train, evaluate, show."""

import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import PlacementGroupID
from ray.actor import ActorHandle
from ray.train import Checkpoint, CheckpointConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from tqdm import tqdm

from flowbp_ray.config import AlignConfig, dump
from flowbp_ray.pictures import Cell, Row, sheet
from flowbp_ray.rollouts.evaluation import Pictures, differences, evaluate, scores
from flowbp_ray.rollouts.policy import PolicyStore
from flowbp_ray.rollouts.prompts import pictured, read_prompts
from flowbp_ray.rollouts.stages import Rewarding, RewardStage, SamplerStage, Sampling
from flowbp_ray.rollouts.stream import InTurn, rollouts
from flowbp_ray.shapes.checker import check
from flowbp_ray.shapes.evaluation import Score
from flowbp_ray.tracking.registry import Exported
from flowbp_ray.tracking.store import masked
from flowbp_ray.tracking.tracker import RUN_FILE, WARNINGS
from flowbp_ray.training import EXPORT_FILE, NOTE_FILE
from flowbp_ray.training.worker import Job, learner_of, train_loop
from pipelines.causes import clean_up, lost, reason
from pipelines.runs import BEGAN, CONFIG, Kept
from pipelines.session import Session, on_this_node, progress, session

#: What a run is: its configuration, what it began with, and its MLflow run. Its folder has them, and each checkpoint.
IDENTITY = (CONFIG, BEGAN, RUN_FILE)
PATIENCE = 180  # seconds without a step, or ten times the longest so far, after which the user is told what may be missing


@dataclass(frozen=True)
class Outcome:
    """What an alignment leaves: its folder (``before_after.png``, ``table.md``, …), the scores, the MLflow run."""

    folder: Path
    #: The adapter's folder, or the pipeline's.
    exported: Path
    base: dict[str, Score] | None
    aligned: dict[str, Score]
    info: dict[str, str]
    #: By stage, one value a step.
    seconds: dict[str, list[float]]
    #: The first and the last pictures of the preview's prompts, uint8 ``(B, H, W, 3)``; None if there were none.
    pictures: tuple[np.ndarray, np.ndarray] | None
    #: What a person has to know beside the scores: ``stopped`` and why, ``warnings`` and how many, ``best`` and why that,
    #: ``model`` and its URI in MLflow's registry.
    notes: dict[str, str]


@dataclass(frozen=True)
class Parts:
    """What does the work of an attempt; `pipelines.scale` puts others in its place."""

    sampler: type[Sampling] = SamplerStage
    reward: type[Rewarding] = RewardStage
    learner: Callable[[AlignConfig, int], Any] = learner_of


REAL = Parts()


def align(config: AlignConfig, folder: Path) -> Outcome:
    """Run on the connected cluster and write to the ``folder``: a new one, or that of a run that was not finished."""
    prompts = read_prompts(config.prompts)
    with session(config, folder) as at:
        note_prompts(config, prompts, at)
        base = judged(config, "base", at, None, 0, folder) if config.evaluation.before else None
        preview = previewed(config)
        result = trained(config, prompts, folder, at, preview)
        chosen, version, notes = best(config, result)
        if warnings := ray.get(at.tracker.warnings.remote()):
            notes["warnings"] = f"{len(warnings)}, in {folder / WARNINGS}"
        for note in notes.items():
            ray.get(at.tracker.tag.remote(*note))
        with chosen.as_directory() as checkpoint:
            exported = export(config, Path(checkpoint), folder)
        adapter = (exported / EXPORT_FILE).read_bytes() if config.adapter else exported
        aligned = judged(config, "aligned", at, adapter, version, folder)
        (folder / "table.md").write_text(table(config, base, aligned), encoding="utf-8")
        if shown := ray.get(at.tracker.first_and_last.remote()):
            last = result.metrics["version"]
            after = "after" if version == last else f"after {last} steps; exported is what {version} gave"
            before_after(config, [p for p, _ in preview], shown[0], shown[1], after).save(folder / "before_after.png")
            ray.get(at.tracker.artifact.remote(folder / "before_after.png"))
        if config.adapter:  # whole models stay where they are
            ray.get(at.tracker.artifact.remote(exported))
        ray.get(at.tracker.artifact.remote(folder / "table.md", "evaluation"))
        samples = tuple(p for p in [folder / "before_after.png"] if p.exists())
        figures = (folder / "table.md").read_text("utf-8")
        of = Exported(exported, config, masked(dump(config)), version, figures, samples)
        if registered := ray.get(at.tracker.register.remote(of)):
            notes["model"] = registered
        before = None if base is None else scores(base)
        seconds = ray.get(at.tracker.seconds.remote())
    return Outcome(folder, exported, before, scores(aligned), at.info, seconds, shown, notes)


def note_prompts(config: AlignConfig, prompts: list[str], at: Session) -> None:
    """Log what is trained and judged with."""
    shown = [row["prompt"] for rows in pictured(config).values() for row in rows]
    ray.get(at.tracker.prompts.remote(config.prompts.path, prompts, "training"))
    ray.get(at.tracker.prompts.remote(config.evaluation.prompts, shown, "evaluation"))


def best(config: AlignConfig, result: Result) -> tuple[Checkpoint, int, dict[str, str]]:
    """The checkpoint to export, how many steps it has, and why it is that one, if not as the last of all steps."""
    last, metric = result.metrics["version"], config.train.best
    notes = {} if result.return_value is None else {"stopped": result.return_value}
    if metric is None:
        return result.checkpoint, last, notes
    checkpoint, metrics = max(result.best_checkpoints, key=lambda kept: (kept[1][metric], kept[1]["version"]))
    why = f"{Path(checkpoint.path).name} is exported: {metric} was {metrics[metric]:.4g} in the steps up to it, the most"
    if metrics["version"] != last:
        why += f"; up to the last one, {Path(result.checkpoint.path).name}, it was {result.metrics[metric]:.4g}"
    return checkpoint, metrics["version"], notes | {"best": why}


def export(config: AlignConfig, checkpoint: Path, folder: Path) -> Path:
    """From a checkpoint the folder ``adapter``, or where all weights were trained the pipeline ``model``."""
    exported = folder / ("adapter" if config.adapter else "model")
    if exported.exists():
        shutil.rmtree(exported)  # of an earlier attempt, or of fewer steps
    if config.adapter:
        exported.mkdir()
        for name in (EXPORT_FILE, NOTE_FILE):
            shutil.copy(checkpoint / name, exported / name)
        return exported
    from flowbp_ray.training import full  # with diffusers, which takes seconds

    full.complete(config.model.source, config.model.revision, checkpoint / full.TRANSFORMER, exported)
    return exported


def judge_base(config: AlignConfig, folder: Path) -> dict[str, Score]:
    """Evaluate the model as it is, in an MLflow run of its own."""
    with session(config, folder) as at:
        base = judged(config, "base", at, None, 0, folder)
    return scores(base)


def trained(config: AlignConfig, prompts: list[str], folder: Path, at: Session, preview: list[tuple[str, int]]) -> Result:
    """All steps, from the newest checkpoint on. A process or machine that is lost costs the steps since then, and is made up for
    as often as ``train.retries`` says; anything else that goes wrong would again, and ends the run.

    Ray Train's own FailureConfig would repeat all other errors too, and not outlive its controller.
    """
    kept, tries = Kept(config, folder), 0
    kept.mend()
    with progress(config.train.steps, "starting samplers and train workers", "step", kept.steps) as bar:
        while True:
            began = kept.steps
            try:
                return attempt(config, prompts, folder, at, preview, kept, bar)
            except Exception as error:
                tries = 1 if kept.steps > began else tries + 1
                if not lost(error) or tries > config.train.retries:
                    raise
                bar.write(f"lost: {reason(error)}\ngoing on from step {kept.steps}", sys.stderr)
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
    began, told, said, reached, longest = time.monotonic(), False, 0, bar.n, 0.0
    try:
        while not ray.wait([running], timeout=0.5)[0]:
            said = look(bar, at.tracker, said)
            kept.copy()
            since = time.monotonic() - began
            if bar.n > reached:
                began, told, reached, longest = began + since, False, bar.n, max(longest, since)
            elif not told and since > max(PATIENCE, 10 * longest):
                told = True
                missing = f"{config.reserved()} are needed, free are {ray.available_resources()}"
                missing += "; torch.compile takes minutes too" if config.cluster.compile else ""
                bar.write(f"no step for {since:.0f} seconds: {missing}", sys.stderr)
        look(bar, at.tracker, said)
    except BaseException:
        ray.cancel(running, force=True)
        raise
    finally:
        clean_up("give back what was reserved", lambda: free(placement_groups() - others))
        ray.kill(store)  # an error's traceback may hold its handle for as long as that is looked at
    result: Result = ray.get(running)
    return result


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


def judged(config: AlignConfig, name: str, at: Session, exported: bytes | Path | None, step: int, folder: Path) -> Pictures:
    """Evaluate, keeping pictures and scores in the run's folder, and log the figures."""
    total, place = sum(map(len, pictured(config).values())), folder / "evaluation" / f"{name}_{step:06d}"
    for part in ("pictures", "scores"):
        (place / part).mkdir(parents=True, exist_ok=True)
    with progress(total, f"evaluate {name}", "picture") as bar:
        pictures = evaluate(config, at.rewards, exported, bar.update, place)
    averages = scores(pictures)
    figures = {f"eval/{name}/{k}": s.value for k, s in averages.items()}
    figures |= {f"eval/{name}/{k}_error": s.error for k, s in averages.items()}
    ray.get(at.tracker.figures.remote(figures, step))
    return pictures


def previewed(config: AlignConfig) -> list[tuple[str, int]]:
    """The prompts and seeds that are pictured along the way: the tasks in turn."""
    number = config.evaluation.preview_prompts
    by_task = pictured(config, number or 1).values()
    return [(row["prompt"], seed) for seed, row in enumerate([r for rows in zip(*by_task, strict=True) for r in rows][:number])]


def before_after(config: AlignConfig, prompts: list[str], before: Any, after: Any, heading: str) -> Any:
    """Two rows of the same prompts and seeds, with the checker's verdicts where it judges; ``heading`` is the second one's."""

    def row(heading: str, pictures: Any) -> Row:
        if not config.evaluation.checked:
            return Row(heading, [Cell(p, t) for p, t in zip(pictures, prompts, strict=True)])
        verdicts = [check(p, t) for p, t in zip(pictures, prompts, strict=True)]
        return Row(heading, [Cell(p, t, v.reason, v.right) for p, t, v in zip(pictures, prompts, verdicts, strict=True)])

    return sheet(
        "The same prompts and seeds",
        [row("before" if config.adapter is None or config.adapter.init_from is None else "start", before), row(heading, after)],
    )


def table(config: AlignConfig, base: Pictures | None, aligned: Pictures) -> str:
    """base | aligned | difference, as Markdown: tasks in per cent of pictures right, rewards in their own units."""
    before, gained = (None, None) if base is None else (scores(base), differences(base, aligned))
    lines = ["| | base | aligned | difference |", "| --- | ---: | ---: | ---: |"]
    for name, after in scores(aligned).items():
        scale = 1.0 if name.startswith("reward/") else 100.0
        columns = [(before, ""), ({name: after}, ""), (gained, "+")]
        cells = ["" if of is None else number(of[name], scale, sign) for of, sign in columns]
        lines.append(f"| {f'**{name}**' if name == 'mean' else name.replace('_', ' ')} | {' | '.join(cells)} |")
    settings, sampling = config.evaluation, config.sampling
    lines.append("")
    of = f"Means over {settings.per_task} pictures."
    if settings.checked:
        of = (
            f"Tasks: % right by the exact checker, {settings.per_task} pictures each; watermarked: % of all of these (the "
            "checker lets none of them pass); rewards: their mean."
        )
    lines.append(
        f"{of} ± is one standard error, a difference's over the same prompts and noise. Guidance "
        f"{sampling.guidance_scale:g}, {sampling.steps} steps, seed {settings.seed}, weights: {settings.weights}."
    )
    return "\n".join(lines) + "\n"


def number(score: Score, scale: float, sign: str) -> str:
    """Value and error, with as many decimals as two digits of the error need: rewards have all kinds of units."""
    error = scale * score.error
    decimals = max(2, 1 - math.floor(math.log10(error))) if error else 2
    return f"{scale * score.value:{sign}.{decimals}f} ± {error:.{decimals}f}"
