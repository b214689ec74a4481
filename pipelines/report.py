"""Results of evaluations, side by side: with intervals, as a Markdown table, and as a page with the pictures."""

import html as markup
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowbp_ray.config import ConfigError
from flowbp_ray.files import replace_text
from flowbp_ray.rollouts.evaluation import TEXTS, Pictures, differences, scores
from flowbp_ray.rollouts.pictures import picture_file
from flowbp_ray.shapes.captions import TASKS
from flowbp_ray.shapes.evaluation import Score

SHOWN = 12  # pictures of a task on the page
NORMAL = 1.959964  # standard errors to either side, for 95 %


@dataclass(frozen=True)
class Result:
    """One evaluation: its folder, what was judged and how, and what came out."""

    name: str
    folder: Path
    protocol: dict[str, Any]
    pictures: Pictures
    scores: dict[str, Score]


def write(folder: Path, pictures: Pictures) -> Result:
    """The result, kept in the folder: ``result.json``, and ``pictures.json`` with one row a picture."""
    averages = scores(pictures)
    kept = {n: asdict(score) | {"interval": interval(n, score, independent(pictures, n))} for n, score in averages.items()}
    replace_text(folder / "result.json", json.dumps(kept, indent=1) + "\n")
    replace_text(folder / "pictures.json", json.dumps({k: v.tolist() for k, v in pictures.items()}) + "\n")
    return read(folder)


def read(folder: Path) -> Result:
    """A finished evaluation's folder; ConfigError if it is none."""
    folder = folder.expanduser().absolute()
    try:
        about = json.loads((folder / "protocol.json").read_text("utf-8"))
        pictures = {k: np.array(v) for k, v in json.loads((folder / "pictures.json").read_text("utf-8")).items()}
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} has no finished evaluation: {error.filename} is missing; run its command again") from error
    return Result(about["name"], folder, about["protocol"], pictures, scores(pictures))


def interval(name: str, score: Score, number: float) -> tuple[float, float]:
    """The 95 % interval: Wilson's for a share, which is right near none and all too, else 1.96 standard errors to either side.

    ``number`` is of independent pictures, where it does not show in the error: with none or all of them right.
    """
    if not share(name):
        return score.value - NORMAL * score.error, score.value + NORMAL * score.error
    return wilson(score.value, score.value * (1 - score.value) / score.error**2 if score.error else number)


def wilson(share: float, number: float) -> tuple[float, float]:
    """The 95 % interval of a share of so many, by Wilson's formula."""
    middle = (share + NORMAL**2 / (2 * number)) / (1 + NORMAL**2 / number)
    half = NORMAL / (1 + NORMAL**2 / number) * math.sqrt(share * (1 - share) / number + NORMAL**2 / (4 * number**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def independent(pictures: Pictures, name: str) -> int:
    """Pictures that a score is of; of GenEval's tasks prompts, since a prompt's pictures are right or wrong together."""
    of_task = pictures["task"] == name
    if not of_task.any():
        return len(of_task)
    return int(of_task.sum()) if name in TASKS and set(pictures["task"]) <= set(TASKS) else len(set(pictures["prompt"][of_task]))


def share(name: str) -> bool:
    """Whether a score is a share of pictures: the tasks and what else is true or false of a picture, but not their mean."""
    return "/" not in name and name not in ("mean", "alignment", "quality")


def differing(results: list[Result]) -> list[str]:
    """What the protocols of results have not in common."""
    first = results[0].protocol
    return sorted({k for r in results[1:] for k in first.keys() | r.protocol.keys() if first.get(k) != r.protocol.get(k)})


def table(results: list[Result]) -> str:
    """Scores with 95 % intervals, a column for each result, and where the protocols are one the differences from the first."""
    first, others = results[0], results[1:]
    other = differing(results)
    heads = [r.name for r in results] + ([] if other else [f"{r.name} − {first.name}" for r in others])
    lines = [f"| | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    gains = [] if other else [differences(first.pictures, r.pictures) for r in others]
    for name in dict.fromkeys(name for r in results for name in r.scores):
        cells = [
            shown(name, r.scores[name], interval(name, r.scores[name], independent(r.pictures, name))) if name in r.scores else ""
            for r in results
        ]
        for gained in gains:
            if name in gained:
                value, error = gained[name].value, gained[name].error
                cells.append(shown(name, gained[name], (value - NORMAL * error, value + NORMAL * error), "+"))
            else:
                cells.append("")
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    said = f"{len(first.pictures['seed'])} pictures; 95 % intervals; tasks in % of pictures."
    if gains:
        said += " Differences are between pictures of the same prompts and noise."
    if other:
        said += f" **Not comparable**: the protocols differ in {', '.join(other)}."
    return "\n".join([*lines, "", said]) + "\n"


def shown(name: str, score: Score, span: tuple[float, float], sign: str = "") -> str:
    """A value and its interval."""
    scale, (low, high) = 100 if share(name) or name == "mean" else 1, span
    decimals = 1 if scale == 100 else max(2, 1 - math.floor(math.log10(score.error))) if score.error else 2
    return f"{scale * score.value:{sign}.{decimals}f} [{scale * low:{sign}.{decimals}f}, {scale * high:{sign}.{decimals}f}]"


def html(results: list[Result], at: Path) -> str:
    """A page for the folder ``at``: the table, pictures of each task, those of one seed beside each other, and the protocols."""
    tasks = dict.fromkeys(results[0].pictures["task"].tolist())
    sections = []
    for task in tasks:
        of_task = np.flatnonzero(results[0].pictures["task"] == task)
        chosen = of_task[np.linspace(0, len(of_task) - 1, min(SHOWN, len(of_task))).astype(int)]
        cards = "".join(card(results, int(results[0].pictures["seed"][n]), at) for n in chosen)
        sections.append(f"<h2>{markup.escape(task.replace('_', ' '))}</h2><div class=cards>{cards}</div>")
    protocols = "".join(
        f"<h3>{markup.escape(r.name)}</h3><pre>{markup.escape(json.dumps(r.protocol, indent=1))}</pre>" for r in results
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Evaluation</title><style>{STYLE}</style><h1>Evaluation</h1>{rendered(table(results))}{''.join(sections)}"
        f"<details><summary>Protocol</summary>{protocols}</details></html>\n"
    )


def card(results: list[Result], seed: int, at: Path) -> str:
    """One prompt and seed by every result that has it."""
    first = results[0]
    prompt = str(first.pictures["prompt"][first.pictures["seed"] == seed][0])
    figures = []
    for result in results:
        place = np.flatnonzero((result.pictures["seed"] == seed) & (result.pictures["prompt"] == prompt))
        if not len(place):
            continue
        row = {k: v[place[0]].item() for k, v in result.pictures.items()}
        verdict = "" if "right" not in row else f"<b class={'good' if row['right'] else 'bad'}>{markup.escape(row['reason'])}</b>"
        figures_of = [f"{k.removeprefix('reward/')} {v:.3g}" for k, v in row.items() if k not in (*TEXTS, "seed", "right")]
        source = markup.escape(Path(os.path.relpath(picture_file(result.folder, seed), at)).as_posix())
        said, by = markup.escape(", ".join(figures_of)), markup.escape(result.name)
        figures.append(
            f"<figure><img loading=lazy src='{source}' alt='{markup.escape(prompt)}, by {by}'>"
            f"<figcaption>{by} {verdict}<br><small>{said}</small></figcaption></figure>"
        )
    return f"<article><p>{markup.escape(prompt)}</p>{''.join(figures)}</article>"


def rendered(text: str) -> str:
    """The Markdown table and what is below it as HTML."""
    text = markup.escape(text.replace("**", ""))
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head, body = rows[0], rows[2:]
    lines = ["".join(f"<th scope=col>{c}</th>" if c else "<td></td>" for c in head)]
    lines += ["".join(f"<th scope=row>{c}</th>" if n == 0 else f"<td>{c}</td>" for n, c in enumerate(row)) for row in body]
    below = text.strip().splitlines()[-1]
    return f"<div class=wide><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div><p>{below}</p>"


STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c1c1c }
.wide { overflow-x: auto } table { border-collapse: collapse } th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } th { text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
article { border: 1px solid #ddd; border-radius: 6px; padding: .75rem } article p { margin: 0 0 .5rem }
figure { display: inline-block; margin: 0 .5rem .5rem 0; max-width: 100% } img { width: 128px; max-width: 100% }
.good { color: #146c2e } .bad { color: #b3261e } small { color: #555 } pre { overflow-x: auto }
"""
