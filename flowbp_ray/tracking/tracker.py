"""The tracker: the one actor beside the driver that holds the MLflow run, and knows how far the training is."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flowbp_ray.tracking.run import TrackedRun


class Tracker:
    """A `TrackedRun` for processes elsewhere."""

    def __init__(self, uri: str, experiment: str, run_name: str | None, config: dict[str, Any]) -> None:
        self.run = TrackedRun(uri, experiment, run_name, config=config)
        self.newest: tuple[int, dict[str, float]] | None = None
        self.pictured: dict[int, np.ndarray] = {}
        self.durations: dict[str, list[float]] = defaultdict(list)
        self.warned: list[str] = []

    def info(self) -> dict[str, str]:
        """As `TrackedRun.info`."""
        return self.run.info()

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log a training step's figures."""
        self.run.metrics(values, step)
        self.newest = step, values
        for key in (k for k in values if k.startswith("seconds/")):
            self.durations[key.removeprefix("seconds/")].append(values[key])

    def figures(self, values: dict[str, float], step: int) -> None:
        """Log other figures, such as an evaluation's."""
        self.run.metrics(values, step)

    def progress(self) -> tuple[int, dict[str, float]] | None:
        """The last training step and its figures; None before the first."""
        return self.newest

    def warn(self, sentences: list[str]) -> None:
        """Keep warnings for the driver, who tells a person, and in the MLflow run."""
        self.warned += sentences
        self.run.text("\n".join(self.warned) + "\n", "warnings.txt")

    def warnings(self) -> list[str]:
        """All warnings so far."""
        return self.warned

    def tag(self, key: str, value: str) -> None:
        """As `TrackedRun.tag`."""
        self.run.tag(key, value)

    def seconds(self) -> dict[str, list[float]]:
        """What the steps took so far, by stage."""
        return dict(self.durations)

    def previews(self, prompts: list[str], pictures: np.ndarray, version: int) -> None:
        """Log the pictures uint8 ``(B, H, W, 3)`` of the fixed prompts; the first and the last ones are kept here too."""
        for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
            self.run.picture(f"preview/{number:02d} {re.sub(r'[^A-Za-z0-9 _-]', '', prompt)[:60].strip()}", picture, version)
        first = min(self.pictured, default=version)
        self.pictured = {k: v for k, v in self.pictured.items() if k == first} | {version: pictures}

    def first_and_last(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The first and the last previews, if there were any."""
        return (self.pictured[min(self.pictured)], self.pictured[max(self.pictured)]) if self.pictured else None

    def text(self, text: str, artifact_file: str) -> None:
        """As `TrackedRun.text`."""
        self.run.text(text, artifact_file)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """As `TrackedRun.artifact`."""
        self.run.artifact(path, folder)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """As `TrackedRun.finish`."""
        self.run.finish(status)
