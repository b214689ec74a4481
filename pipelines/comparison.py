"""Methods side by side: what a cell measured, the table of all cells, its standard errors, a chart and a sheet of pictures."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import stats

from flowbp_ray.config import AlignConfig
from flowbp_ray.files import replace_text
from flowbp_ray.pictures import Cell, Row, sheet
from flowbp_ray.rollouts.plans import plan_of
from flowbp_ray.shapes.captions import TASKS
from flowbp_ray.shapes.checker import check
from flowbp_ray.surrogate.quadrature import Grid

BASE = "base"


@dataclass(frozen=True)
class Measured:
    """One method and seed: each figure with its error over the evaluation's pictures, tasks and mean as shares of 1."""

    method: str
    seed: int
    values: dict[str, float]
    errors: dict[str, float]
    #: Median seconds of a step; 0 for the base model, which has none.
    seconds: float
    #: Velocity evaluations a scored sample, both guidance branches counted: without gradient in sampling, with it in the update.
    sampled: float
    differentiated: float

    def save(self, file: Path, config: str) -> None:
        """Write it, with the configuration that it is of; a file that is there is whole."""
        replace_text(file, json.dumps(asdict(self) | {"config": config}, indent=1))


def read(file: Path, config: str) -> Measured | None:
    """A finished cell, None if there is none yet; ValueError if it is of another configuration."""
    if not file.exists():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.pop("config") != config:
        raise ValueError(f"{file} was measured with another configuration: give another --output, or remove it to run it again")
    return Measured(**content)


def evaluations(config: AlignConfig, sigmas: Grid) -> tuple[float, float]:
    """Velocity evaluations a scored sample, in sampling and in the update, on average over the run's own draws."""
    guided, surrogate = config.sampling.guidance_scale > 1, config.surrogate
    sampled, differentiated = [], []
    for step in range(config.train.steps):
        plan = plan_of(config, sigmas, step)
        ran = plan.last_index + (plan.last_index in plan.velocities_needed) + plan.copies
        both = guided and (plan.attach_negative or not surrogate.detach_negative)
        sampled.append(ran * (2 if guided else 1) / len(plan.reward_inputs))
        differentiated.append(len(plan.active) * (2 if both else 1) / len(plan.reward_inputs))
    return float(np.mean(sampled)), float(np.mean(differentiated))


@dataclass(frozen=True)
class Summary:
    """All cells of one figure: methods' means over the seeds, and one standard error for all of them."""

    means: dict[str, float]
    #: Of a method's mean, from what is left when each seed's and each method's own level is taken away.
    error: float
    #: How much two methods have to be apart for chance to give less than one such pair in twenty.
    resolved: float


def summary(cells: Sequence[Measured], figure: str) -> Summary:
    """A two-way layout: every seed has all methods on the same prompts and noise, so its level is no error.

    With one seed nothing can be left over: the error is then the largest one over an evaluation's own pictures.
    """
    methods, seeds = list(dict.fromkeys(c.method for c in cells)), sorted({c.seed for c in cells})
    values = {(c.method, c.seed): c.values[figure] for c in cells}
    table = np.array([[values[m, s] for s in seeds] for m in methods])
    means = dict(zip(methods, table.mean(1).tolist(), strict=True))
    if len(seeds) == 1 or len(methods) == 1:
        error = max(c.errors[figure] for c in cells) / math.sqrt(len(seeds))
        return Summary(means, error, float(stats.norm.ppf(0.975)) * math.sqrt(2) * error)
    left = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    freedom = (len(methods) - 1) * (len(seeds) - 1)
    error = math.sqrt((left**2).sum() / freedom / len(seeds))
    return Summary(means, error, float(stats.t.ppf(0.975, freedom)) * math.sqrt(2) * error)


def table(cells: Sequence[Measured], note: str) -> str:
    """Markdown: a row a method, then which differences of the mean the errors resolve."""
    methods = list(dict.fromkeys(c.method for c in cells))
    figures = [f for f in cells[0].values if f.startswith("reward/")] + [*TASKS, "mean", "watermarked"]
    summaries = {f: summary(cells, f) for f in figures}
    head = [f.removeprefix("reward/").replace("_", " ") for f in figures]
    lines = [
        "| | " + " | ".join([*head, "s/step", "sampled", "differentiated"]) + " |",
        "| --- |" + " ---: |" * (len(head) + 3),
    ]
    for method in methods:
        own = [c for c in cells if c.method == method]
        shown = [f"{_scale(f) * summaries[f].means[method]:.{2 if f.startswith('reward/') else 1}f}" for f in figures]
        cost = ["", "", ""]
        if method != BASE:
            cost = [f"{np.mean([getattr(c, k) for c in own]):.1f}" for k in ("seconds", "sampled", "differentiated")]
        lines.append(f"| {method} | " + " | ".join([*shown, *cost]) + " |")
    errors = [f"± {_scale(f) * summaries[f].error:.{2 if f.startswith('reward/') else 1}f}" for f in figures]
    lines += ["| *standard error* | " + " | ".join([*errors, "", "", ""]) + " |", "", note, ""]
    for figure in [f for f in figures if f.startswith("reward/")] + ["mean", "watermarked"]:
        lines.append(f"- {_verdict(figure, summaries[figure])}")
    return "\n".join(lines) + "\n"


def _scale(figure: str) -> float:
    return 1.0 if figure.startswith("reward/") else 100.0


def _verdict(figure: str, of: Summary) -> str:
    scale, name = _scale(figure), "mean of the tasks" if figure == "mean" else figure.removeprefix("reward/")
    pairs = combinations(sorted(of.means, key=of.means.__getitem__, reverse=True), 2)
    apart = [f"{one} > {two}" for one, two in pairs if of.means[one] - of.means[two] > of.resolved]
    told = "; ".join(apart) or "none"
    return f"{name}: differences over {scale * of.resolved:.2f} are resolved (two-sided 5 %, not corrected for the pairs): {told}"


def chart(cells: Sequence[Measured], file: Path) -> None:
    """Bars of every method: the tasks' mean and each reward, with standard errors, the base as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = [m for m in dict.fromkeys(c.method for c in cells) if m != BASE]
    figures = ["mean"] + [f for f in cells[0].values if f.startswith("reward/")]
    page, panels = plt.subplots(
        1, len(figures), figsize=(4.2 * len(figures), 0.42 * len(methods) + 1.6), sharey=True, squeeze=False
    )
    for panel, figure in zip(panels[0], figures, strict=True):
        of, scale = summary(cells, figure), _scale(figure)
        values = [scale * of.means[m] for m in methods]
        panel.barh(methods, values, xerr=scale * of.error, color="#4c72b0", ecolor="#1c1c1c", capsize=3)
        shown = [*values, *([scale * of.means[BASE]] if BASE in of.means else [])]
        if BASE in of.means:
            panel.axvline(scale * of.means[BASE], color="#b3261e", linestyle="--", label="base model")
            panel.legend(loc="lower right", fontsize=8)
        room = max(max(shown) - min(shown), 4 * scale * of.error) or 1.0
        panel.set_xlim(min(shown) - 0.6 * room, max(shown) + 0.4 * room)
        panel.set_title("six tasks' mean, % right" if figure == "mean" else figure.removeprefix("reward/"), fontsize=10)
    panels[0][0].invert_yaxis()
    page.tight_layout()
    page.savefig(file, dpi=120)
    plt.close(page)


def grid(prompts: Sequence[str], pictures: Mapping[str, np.ndarray]) -> Image.Image:
    """Rows methods, columns prompts: uint8 pictures ``(B, H, W, 3)`` with the checker's verdicts."""
    rows = []
    for method, shown in pictures.items():
        verdicts = [check(p, t) for p, t in zip(shown, prompts, strict=True)]
        cells = [Cell(p, t, v.reason, v.right) for p, t, v in zip(shown, prompts, verdicts, strict=True)]
        rows.append(Row(method, cells))
    return sheet("The same prompts and noise, one method a row", rows)
