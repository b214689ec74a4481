"""One alignment from beginning to end on a Ray cluster: serve the rewards, evaluate, train, evaluate, show."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from ray.train import Checkpoint, Result

from flowbp_ray.config import AlignConfig, dump
from flowbp_ray.rollouts.evaluation import Pictures, evaluate, scores
from flowbp_ray.rollouts.prompts import pictured, read_prompts
from flowbp_ray.shapes.evaluation import Score
from flowbp_ray.tracking.registry import Exported
from flowbp_ray.tracking.store import masked
from flowbp_ray.tracking.tracker import WARNINGS
from flowbp_ray.training import EXPORT_FILE, NOTE_FILE
from pipelines.attempts import trained
from pipelines.before_after import before_after, table
from pipelines.session import Session, progress, session


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
