"""The watch over a training: what reward hacking, divergence and collapse look like in each step's metrics. Without Ray.

A window is ``watch.window`` steps. Three signs, each said once and again only after a step without it:

- a held-out reward's mean over the last window is below that of its best earlier window by more than
  ``watch.held_out_errors`` standard errors of the difference, while the objective's is above what it was in that window;
- the gradient's norm, before it is cut, was for three steps in a row more than ``watch.grad_norm_factor`` times the first
  window's median: single long ones are common in healthy runs, and harmless, since they are cut;
- pictures of the same prompt from different seeds are less than ``watch.diversity_fraction`` as far apart as at the start.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from flowbp_ray.config.training import Watch

IN_A_ROW = 3  # steps
REMEDY = "look at the previews, and train less, more slowly or with a penalty (train.steps, .learning_rate, .velocity_penalty)"


class CollapseWatch:
    """Takes the metrics of one step after the other; the same metrics give the same sentences.

    ``held_out`` are the metrics of rewards that nothing is trained for. ``state`` is of lists, dicts and numbers that JSON has; a
    watch that is made with it goes on where the other one was.
    """

    def __init__(self, settings: Watch, held_out: Sequence[str], state: dict[str, Any] | None = None) -> None:
        self.settings, self.held_out = settings, list(held_out)
        self.state = state or {"rows": [], "best": {}, "norm": None, "diversity": None, "said": []}

    def see(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """The warnings that are new after ``step``. ``metrics`` has ``diversity`` where there were previews, and ``objective``,
        ``grad_norm`` and the held-out ones unless these were the ones before the first step."""
        found: dict[str, str | None] = {}
        if "diversity" in metrics:
            found["diversity"] = self._diversity(metrics["diversity"])
        if "grad_norm" in metrics:
            rows = self.state["rows"]
            rows.append({"step": step} | {k: float(metrics[k]) for k in ("objective", "grad_norm", *self.held_out)})
            del rows[: -2 * self.settings.window]
            found["grad_norm"] = self._grad_norm(rows)
            found |= {name: self._held_out(rows, name) for name in self.held_out}
        said = self.state["said"]
        new = [f"after step {step}: {text}" for sign, text in found.items() if text and sign not in said]
        self.state["said"] = [s for s in said if s not in found] + [s for s, text in found.items() if text]
        return new

    def _held_out(self, rows: list[dict[str, float]], name: str) -> str | None:
        window, errors, best = self.settings.window, self.settings.held_out_errors, self.state["best"]
        if len(rows) < 2 * window:
            return None
        before, now = _summary(rows[:window], name), _summary(rows[window:], name)
        if name not in best or before["mean"] > best[name]["mean"]:
            best[name] = before
        then = best[name]
        fallen, error = then["mean"] - now["mean"], float(np.hypot(then["error"], now["error"]))
        if errors is None or fallen <= errors * error or now["objective"] <= then["objective"]:
            return None
        return (
            f"{name}, which is held out, fell by {fallen:.2g} ± {error:.2g} from {then['mean']:.4g} (steps {then['first']} to "
            f"{then['last']}) to {now['mean']:.4g} (steps {now['first']} to {now['last']}), while the objective rose from "
            f"{then['objective']:.4g} to {now['objective']:.4g}: the reward may be hacked, so {REMEDY}"
        )

    def _grad_norm(self, rows: list[dict[str, float]]) -> str | None:
        window, factor = self.settings.window, self.settings.grad_norm_factor
        norms = [row["grad_norm"] for row in rows]
        if len(rows) == window:
            self.state["norm"] = float(np.median(norms))
        if len(rows) < window + IN_A_ROW or not (usual := self.state["norm"]):
            return None
        if factor is None or min(last := norms[-IN_A_ROW:]) <= factor * usual:
            return None
        return (
            f"the gradient's norm was {', '.join(f'{n:.3g}' for n in last)} in the last {IN_A_ROW} steps, over {factor:g} times "
            f"the {usual:.3g} of the first {window}: lower train.learning_rate or set train.max_sample_grad_norm"
        )

    def _diversity(self, diversity: float) -> str | None:
        fraction, first = self.settings.diversity_fraction, self.state["diversity"]
        self.state["diversity"] = first = float(diversity) if first is None else first
        if fraction is None or diversity >= fraction * first:
            return None
        return (
            f"pictures of the same prompt from different seeds are {diversity:.3g} apart, under {fraction:g} times the "
            f"{first:.3g} at the start: the model loses diversity, so {REMEDY}"
        )


def _summary(rows: list[dict[str, float]], name: str) -> dict[str, float]:
    """A window's mean of a metric with its standard error, and the mean objective; the steps are as plain as the rest."""
    values = [row[name] for row in rows]
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    objective = np.mean([row["objective"] for row in rows])
    ends = {"first": rows[0]["step"], "last": rows[-1]["step"]}
    return ends | {"mean": float(np.mean(values)), "error": float(error), "objective": float(objective)}


def diversity(pictures: np.ndarray) -> float:
    """How far apart pictures of the same prompt are: root mean square over pixels and channels, black to white being 1, of each
    pair of seeds, mean over pairs and prompts. uint8 ``(seeds, prompts, H, W, 3)``; ValueError for fewer than two seeds."""
    if len(pictures) < 2:
        raise ValueError("diversity is of at least two seeds: set evaluation.preview_seeds to 2 or more")
    scaled = pictures.astype(np.float32) / 255
    apart = [np.sqrt(np.mean((a - b) ** 2, axis=(1, 2, 3))) for a, b in combinations(scaled, 2)]
    return float(np.mean(apart))
