"""What finished runs have left for people to look at: pictures along the training, the table, what was judged."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from pyarrow import parquet

from flowbp_ray.rollouts.pictures import picture_file
from flowbp_ray.tracking.tracker import PREVIEWS, PROMPTS, preview_files
from pipelines.report import rendered
from pipelines.runs import BEGAN, CONFIG

EACH = 4  # pictures of a task of the evaluation


@dataclass(frozen=True)
class Shown:
    """A picture of the evaluation by base and aligned model: the prompt, and for both a file within the run and a verdict."""

    task: str
    prompt: str
    pictures: list[tuple[str, str, str, bool | None]]


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    folder: Path

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.name

    @cached_property
    def settings(self) -> dict:
        """Its configuration."""
        return yaml.safe_load((self.folder / CONFIG).read_text("utf-8"))

    @property
    def method(self) -> str:
        """By which it was trained."""
        return str(self.settings["surrogate"]["method"])

    @cached_property
    def versions(self) -> list[int]:
        """After how many steps the fixed prompts were pictured."""
        return sorted(int(f.name) for f in (self.folder / PREVIEWS).glob("[0-9]*"))

    @cached_property
    def prompts(self) -> list[tuple[str, str]]:
        """The fixed prompts, and their pictures' file names, which are the same after any number of steps."""
        first = self.folder / PREVIEWS / f"{self.versions[0]:06d}"
        texts = json.loads((first / PROMPTS).read_text("utf-8"))
        return [(text, f.name) for text, f in zip(texts, preview_files(first), strict=True)]

    def frame(self, version: int, name: str) -> str:
        """A picture's path within the run."""
        return f"{PREVIEWS}/{version:06d}/{name}"

    @property
    def table(self) -> str:
        """The evaluation as an HTML table; empty before there is one."""
        file = self.folder / "table.md"
        return rendered(file.read_text("utf-8")) if file.exists() else ""

    def judged(self) -> list[Shown]:
        """Some pictures of each task, by the base (where it was judged) and by the newest aligned model."""
        sides = [*sorted(self.folder.glob("evaluation/base_*"))[-1:], *sorted(self.folder.glob("evaluation/aligned_*"))[-1:]]
        rows = [{row["seed"]: row for row in read(side)} for side in sides]
        shown, counts = [], dict[str, int]()
        for seed, row in sorted(rows[-1].items() if rows else ()):
            counts[row["task"]] = counts.get(row["task"], 0) + 1
            if counts[row["task"]] > EACH or any(seed not in of for of in rows):
                continue
            pictures = []
            for side, of in zip(sides, rows, strict=True):
                file = picture_file(side, seed).relative_to(self.folder).as_posix()
                pictures.append((side.name.partition("_")[0], file, of[seed].get("reason", ""), of[seed].get("right")))
            shown.append(Shown(row["task"].replace("_", " "), row["prompt"], pictures))
        return shown


def read(evaluation: Path) -> list[dict]:
    """All rows of an evaluation's scores."""
    return [row for file in sorted((evaluation / "scores").glob("*.parquet")) for row in parquet.read_table(file).to_pylist()]


def runs(folder: Path) -> list[Run]:
    """All runs with pictures, the newest first."""
    found = [Run(f.parent) for f in folder.glob(f"*/{BEGAN}")]
    return sorted((run for run in found if run.versions), key=lambda run: run.name, reverse=True)


def run_of(folder: Path, name: str) -> Run | None:
    """A run by its name; None if there is none with pictures."""
    try:
        if not re.fullmatch(r"[\w-][\w.-]*", name) or not (folder / name / BEGAN).is_file():
            return None
    except OSError:  # a name longer than a file system has
        return None
    run = Run(folder / name)
    return run if run.versions else None


def picture_of(run: Run, path: str) -> Path | None:
    """The PNG at a path within a run; None if there is none, or it is outside of it."""
    try:
        file = (run.folder / path).resolve()
        return file if file.suffix == ".png" and file.is_relative_to(run.folder.resolve()) and file.is_file() else None
    except (OSError, ValueError):  # longer than a file system has, or with a character that no path has
        return None
