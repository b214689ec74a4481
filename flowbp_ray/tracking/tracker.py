"""The tracker: the one actor beside the driver that holds the MLflow run, and knows how far the training is.

Whatever it is given is in the run's folder before it goes to MLflow, so nothing is lost with this process, or while a server
does not answer: what MLflow has not got is sent later.
"""

import json
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from mlflow import MlflowException
from PIL import Image

from flowbp_ray.files import replace_text
from flowbp_ray.tracking.run import TrackedRun, check_finite
from flowbp_ray.tracking.store import masked, wait_less

if TYPE_CHECKING:
    from flowbp_ray.tracking.registry import Exported

#: In a run's folder: its MLflow run, all metrics, one JSON object a line, and the pictures of the fixed prompts by version.
RUN_FILE, METRICS, PREVIEWS, WARNINGS = "mlflow_run.json", "metrics.jsonl", "previews", "warnings.txt"

#: Beside these pictures, of whose names a file system may not take everything.
PROMPTS = "prompts.json"

GONE = "RESOURCE_DOES_NOT_EXIST"  # a run that was deleted never takes anything
AGAIN = 30.0  # seconds until a server that did not answer is asked again, at least
RESTS, LONGEST = 10, 600.0  # times as long as it took to find that out, so that one that is silent holds little up; seconds
AT_THE_END = 60.0  # seconds that the end of a run waits for it


def preview_files(folder: Path) -> list[Path]:
    """The pictures of the fixed prompts after some steps, in the prompts' order, whose number each name begins with."""
    return sorted(folder.glob("*.png"), key=lambda file: int(file.name.partition(" ")[0]))


class Tracker:
    """The `TrackedRun` of a folder, for processes elsewhere: a new one, or the one that the folder has."""

    def __init__(self, uri: str, experiment: str, run_name: str | None, config: dict[str, Any], folder: Path) -> None:
        wait_less()
        self.folder, noted = folder, folder / RUN_FILE
        self.waiting: deque[Callable[[], object]] = deque()
        self.not_before = 0.0
        if noted.exists():
            self.run = TrackedRun.known(uri, **json.loads(noted.read_text("utf-8")))
        else:
            self.run = TrackedRun.new(uri, experiment, run_name)
            ids = {"experiment_id": self.run.experiment_id, "run_id": self.run.run_id}
            replace_text(noted, json.dumps(ids) + "\n")
        self._later(self.run.go_on, config)
        self.newest: tuple[int, dict[str, float]] | None = None
        self.durations: dict[int, dict[str, float]] = {}
        self.warned = self._lines(WARNINGS)
        if (folder / METRICS).exists() and not (folder / METRICS).read_text("utf-8").endswith("\n"):
            with (folder / METRICS).open("a", encoding="utf-8") as file:
                file.write("\n")
        for line in self._lines(METRICS):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # a process ended while it wrote the line; whoever told it so tells it again
            self._time(entry["values"], entry["step"])
            self._later(self.run.metrics, entry["values"], entry["step"], entry["time"])
        for version in self._versions():
            self._show(version)
        for text in sorted(folder.glob("*.txt")):
            self._later(self.run.text, text.read_text("utf-8"), text.name)
        self._send()

    def info(self) -> dict[str, str]:
        """As `TrackedRun.info`."""
        return self.run.info()

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log a training step's figures."""
        self.figures(values, step)
        self._time(values, step)
        self.newest = step, values

    def figures(self, values: dict[str, float], step: int) -> None:
        """Log other figures, such as an evaluation's. ValueError names those that are not finite."""
        check_finite(values, step)
        entry = {"step": step, "time": time.time_ns() // 1_000_000, "values": {k: float(v) for k, v in values.items()}}
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._later(self.run.metrics, entry["values"], step, entry["time"])
        self._send()

    def progress(self) -> tuple[int, dict[str, float]] | None:
        """The last training step that this process was told of, and its figures; None before the first."""
        return self.newest

    def warn(self, sentences: list[str]) -> None:
        """Keep warnings for the driver, who tells a person, and in the MLflow run; each once."""
        self.warned += [s for s in sentences if s not in self.warned]
        self.text("\n".join(self.warned) + "\n", WARNINGS)

    def warnings(self) -> list[str]:
        """All warnings so far."""
        return self.warned

    def tag(self, key: str, value: str) -> None:
        """As `TrackedRun.tag`."""
        self._later(self.run.tag, key, value)
        self._send()

    def seconds(self) -> dict[str, list[float]]:
        """What the steps took so far, by stage."""
        steps = [self.durations[step] for step in sorted(self.durations)]
        return {stage: [taken[stage] for taken in steps] for stage in (steps[0] if steps else {})}

    def previews(self, prompts: list[str], pictures: np.ndarray, version: int) -> None:
        """Keep and log the pictures uint8 ``(B, H, W, 3)`` of the fixed prompts."""
        final = self._previews(version)
        unfinished = final.with_name(f".{final.name}")
        for folder in (unfinished, final):
            shutil.rmtree(folder, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
            Image.fromarray(picture).save(unfinished / f"{number:02d} {re.sub(r'[^A-Za-z0-9 _-]', '', prompt)[:60].strip()}.png")
        (unfinished / PROMPTS).write_text(json.dumps(prompts), encoding="utf-8")
        unfinished.replace(final)
        self._show(version)
        self._send()

    def first_and_last(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The first and the last previews, if there were any."""
        if not (versions := self._versions()):
            return None
        first, last = (np.stack([p for _, p in self._pictures(v)]) for v in (versions[0], versions[-1]))
        return first, last

    def text(self, text: str, artifact_file: str) -> None:
        """Keep a text, in place of an earlier one of the name, in the folder and as `TrackedRun.text`."""
        replace_text(self.folder / artifact_file, text)
        self._later(self.run.text, text, artifact_file)
        self._send()

    def prompts(self, name: str, prompts: Sequence[str], context: Literal["training", "evaluation"]) -> None:
        """As `TrackedRun.prompts`."""
        self._later(self.run.prompts, name, prompts, context)
        self._send()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """As `TrackedRun.artifact`."""
        self._later(self.run.artifact, path, folder)
        self._send()

    def register(self, exported: "Exported") -> str | None:
        """Make what was exported a version in MLflow's registry; its URI, None while MLflow does not answer."""
        from flowbp_ray.tracking.registry import register  # with MLflow's model classes, which nothing else here needs

        made: list[str] = []
        self.not_before = 0.0  # as at the end: who asked says where it is
        self._later(lambda: made.append(register(self.run.uri, self.run.run_id, exported)))
        self._send()
        return made[0] if made else None

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the run. RuntimeError if MLflow has still not got all of it; it is kept."""
        until, self.not_before = time.monotonic() + AT_THE_END, 0.0
        self._later(self.run.finish, status)
        while self._send() and status == "FINISHED" and time.monotonic() < until:
            time.sleep(1)
            self.not_before = 0.0
        if self.waiting:
            raise RuntimeError(
                f"MLflow at {self.run.info()['page']} does not take {len(self.waiting)} entries, which are in {self.folder} "
                f"alone: the same command sends them, when what it said is mended: {self.problem}"
            )

    def _later(self, send: Callable[..., object], *arguments: Any) -> None:
        self.waiting.append(lambda: send(*arguments))

    def _send(self) -> int:
        """Send what waits, in order, as far as MLflow takes it; how much waits still."""
        while self.waiting and (asked := time.monotonic()) >= self.not_before:
            try:
                self.waiting[0]()
            except Exception as error:  # stores of artifacts have libraries of their own, which raise what they like
                if isinstance(error, MlflowException) and error.error_code == GONE:
                    raise
                now = time.monotonic()
                self.not_before = now + max(AGAIN, min(RESTS * (now - asked), LONGEST))
                self.problem = masked(f"{type(error).__name__}: {error}".splitlines()[0][:300])
                said = f"MLflow takes nothing at the moment; training goes on, and what it is owed is sent later: {self.problem}"
                self.warned += [said] if said not in self.warned else []
                break
            self.waiting.popleft()
        return len(self.waiting)

    def _lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text("utf-8").splitlines() if file.exists() else []

    def _time(self, values: dict[str, float], step: int) -> None:
        taken = {k.removeprefix("seconds/"): v for k, v in values.items() if k.startswith("seconds/")}
        if taken:
            self.durations[step] = taken

    def _previews(self, version: int) -> Path:
        return self.folder / PREVIEWS / f"{version:06d}"

    def _versions(self) -> list[int]:
        return sorted(int(f.name) for f in (self.folder / PREVIEWS).glob("[0-9]*"))

    def _pictures(self, version: int) -> list[tuple[str, np.ndarray]]:
        return [(f.stem, np.asarray(Image.open(f))) for f in preview_files(self._previews(version))]

    def _show(self, version: int) -> None:
        for name, picture in self._pictures(version):
            self._later(self.run.picture, f"preview/{name}", picture, version)
