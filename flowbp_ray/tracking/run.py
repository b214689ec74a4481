"""One alignment's MLflow run: every MLflow call of it, in the one process that holds this object."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException

from flowbp_ray.tracking.store import SERVERS, artifact_root, make_room, masked

#: The folder that is a git checkout if the package is not an installed copy.
CHECKOUT = Path(__file__).resolve().parents[2]
#: The configuration that the run started with, and the one it was last continued with.
CONFIG, CONTINUED = "resolved_config.yaml", "resolved_config_continued.yaml"
#: Characters of the longest value that is a parameter itself; MLflow would cut at 6000, with only a warning.
LONGEST = 500


class TrackedRun:
    """A run by its id, for one writer: no global MLflow state, nothing asynchronous, arguments that pickle."""

    def __init__(self, uri: str, experiment: str, run_name: str | None, *, config: dict) -> None:
        """Start a run in the experiment (made if it is new) and log its configuration. Errors as `new`'s."""
        self._begin(uri, *self._created(uri, experiment, run_name))
        self.go_on(config)

    @classmethod
    def new(cls, uri: str, experiment: str, run_name: str | None) -> Self:
        """A run in the experiment (made if it is new), of which nothing is logged yet: `go_on` comes first.

        ``uri`` is from ``store.tracking_uri``. ValueError for an experiment that cannot keep it, mlflow.MlflowException if the
        store fails.
        """
        return cls.known(uri, *cls._created(uri, experiment, run_name))

    @classmethod
    def known(cls, uri: str, experiment_id: str, run_id: str) -> Self:
        """A run that is there; MLflow is asked nothing before `go_on`."""
        run = cls.__new__(cls)
        run._begin(uri, experiment_id, run_id)
        return run

    def go_on(self, config: dict) -> None:
        """Log the run's ``config``, the resolved one, of plain values, or go on with a run that has one.

        Passwords in URIs are not kept. A continued run keeps the parameters it started with; the tag
        ``continued_with_other`` names the settings that are different now. mlflow.MlflowException if there is no such run or the
        store fails.
        """
        text = masked(yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
        parameters = flattened(yaml.safe_load(text))
        tags = {"method": config["surrogate"]["method"], "model": config["model"]["path"], **code_version(CHECKOUT)}
        run = self._client.get_run(self.run_id)
        if run.data.params:
            self._client.update_run(self.run_id, status="RUNNING")
            self.text(text, CONTINUED)
            other = sorted(k for k in parameters.keys() | run.data.params.keys() if parameters.get(k) != run.data.params.get(k))
            tags["continued_with_other"] = " ".join(other)
        else:
            self.text(text, CONFIG)
            self._client.log_batch(self.run_id, params=[Param(k, v) for k, v in parameters.items()], synchronous=True)
        for key, value in tags.items():
            self._client.set_tag(self.run_id, key, value, synchronous=True)
        logged = {key: self._client.get_metric_history(self.run_id, key) for key in run.data.metrics}
        self._points = {(key, point.step) for key, history in logged.items() for point in history}
        self._pictures = {_pictured(f.path) for f in self._client.list_artifacts(self.run_id, "images")}

    def _begin(self, uri: str, experiment_id: str, run_id: str) -> None:
        self.uri, self.experiment_id, self.run_id = uri, experiment_id, run_id
        self._client = MlflowClient(uri)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """End the run as the block ended. An error of the block stays the error, also where the store answers no more."""
        if kind is None:
            self.finish("FINISHED")
            return
        with contextlib.suppress(MlflowException):
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def metrics(self, values: dict[str, float], step: int, when: int | None = None) -> None:
        """Log the values at a step, all or none; a metric that has a point there already keeps it. ``when`` they were measured
        is in milliseconds since 1970, None is now.

        ValueError names the metrics that are not finite.
        """
        check_finite(values, step)
        when = time.time_ns() // 1_000_000 if when is None else when
        points = [Metric(k, float(v), when, step) for k, v in values.items() if (k, step) not in self._points]
        if points:
            self._client.log_batch(self.run_id, metrics=points, synchronous=True)
            self._points |= {(p.key, p.step) for p in points}

    def picture(self, key: str, array: np.ndarray, step: int) -> None:
        """Log a uint8 picture ``(H, W, 3)`` for the MLflow UI's slider; a key that has one at the step keeps it.

        ValueError for another array, or a key of other than letters, digits, space and ``_-./``.
        """
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"the picture {key!r} has to be uint8 of shape (H, W, 3), not {array.dtype} {array.shape}")
        if (key, step) not in self._pictures:
            self._client.log_image(self.run_id, array, key=key, step=step, synchronous=True)
            self._pictures.add((key, step))

    def text(self, text: str, artifact_file: str) -> None:
        """Keep a text as an artifact, in place of an earlier one of the name, such as ``evaluation/table.md``."""
        self._client.log_text(self.run_id, text, artifact_file)

    def tag(self, key: str, value: str) -> None:
        """Set a tag, in place of an earlier one of the key."""
        self._client.set_tag(self.run_id, key, value, synchronous=True)

    def prompts(self, name: str, prompts: Sequence[str], context: Literal["training", "evaluation"]) -> None:
        """Log which prompts these are, as a dataset, so that MLflow finds all runs that had them: ``name`` is a file's path,
        or the embedded world's word."""
        digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
        about = json.dumps({"num_rows": len(prompts)})
        dataset = Dataset(Path(name).name, digest, source_type="local", source=json.dumps({"uri": name}), profile=about)
        tag = InputTag("mlflow.data.context", context)
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [tag])])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file, or a folder with all that is in it, under its own name in the run's ``folder`` (or at its top).

        ValueError if the path is relative: the caller's working directory is not this process's. FileNotFoundError.
        """
        if not path.is_absolute():
            raise ValueError(f"the artifact {path} depends on the working directory: give its absolute path")
        if not path.exists():
            raise FileNotFoundError(f"there is no {path} to keep as an artifact")
        self._client.log_artifact(self.run_id, str(path), folder)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the run, now; it can be continued."""
        self._client.set_terminated(self.run_id, status)

    def info(self) -> dict[str, str]:
        """What a person is told: ``run_id``, ``page`` (URL), and ``command``, which serves the page (empty for a server).

        A password is not in it.
        """
        page = f"#/experiments/{self.experiment_id}/runs/{self.run_id}"
        shown = masked(self.uri)
        if self.uri.partition("://")[0] in SERVERS:
            return {"run_id": self.run_id, "page": f"{shown.rstrip('/')}/{page}", "command": ""}
        # By this interpreter, which has MLflow whatever PATH says; its whole path, as an actor's directory is not the person's.
        command = shlex.join([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", shown])
        return {"run_id": self.run_id, "page": f"http://127.0.0.1:5000/{page}", "command": command}

    @staticmethod
    def _created(uri: str, experiment: str, run_name: str | None) -> tuple[str, str]:
        """Ids of the experiment, of which a new one gets an absolute place for its artifacts, and of a new run."""
        make_room(uri)
        client, root = MlflowClient(uri), artifact_root(uri)
        if experiment == "Default" and root is not None:  # made with the database, its artifacts are where that happened to be
            raise ValueError("MLflow's experiment 'Default' keeps artifacts in a working directory: name another one")
        found = client.get_experiment_by_name(experiment)
        number: str = found.experiment_id if found else client.create_experiment(experiment, artifact_location=root)
        return number, client.create_run(number, run_name=run_name).info.run_id


class _Dumper(yaml.SafeDumper):
    """Quotes text that is no plain word: ``config.load``, unlike plain YAML, would read 1e-3 as a number."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isidentifier() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def check_finite(values: dict[str, float], step: int) -> None:
    """ValueError names the values that are not finite, which MLflow would keep as something else."""
    if wrong := {k: float(v) for k, v in values.items() if not math.isfinite(v)}:
        raise ValueError(f"at step {step}, not finite: {', '.join(f'{k} = {v}' for k, v in wrong.items())}")


def flattened(config: dict) -> dict[str, str]:
    """Parameters by the dotted names that overrides have; text as it is, other values as JSON.

    A list of sections is gone into, a list of plain values is one value. Of a value over 500 characters there is the
    length, a digest (equal values still look equal) and where it is.
    """
    values = {}
    for name, value in _leaves(config, ""):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if len(text) > LONGEST:
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            text = f"see {CONFIG} ({len(text)} characters, sha256 {digest})"
        values[name] = text
    return values


def _leaves(node: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        items = list(node.items())
    elif isinstance(node, list | tuple) and any(isinstance(item, dict | list | tuple) for item in node):
        items = list(enumerate(node))
    else:
        return [(name, node)]
    return [leaf for key, value in items for leaf in _leaves(value, f"{name}.{key}" if name else str(key))]


def code_version(checkout: Path) -> dict[str, str]:
    """Tags: the package's version and, of a git checkout, its commit and whether tracked files differ from it.

    Without git (installed, or uploaded with a Ray job) a digest of the package's own sources is part of the version.
    """
    try:
        tags = {"flowbp_ray.version": importlib.metadata.version("flowbp_ray")}
    except importlib.metadata.PackageNotFoundError:
        tags = {"flowbp_ray.version": "not installed"}
    if not (checkout / ".git").exists():  # git itself would go on to a repository around it
        digest = hashlib.sha256()
        for source in sorted((checkout / "flowbp_ray").rglob("*.py")):
            digest.update(f"{source.relative_to(checkout)}\0".encode() + source.read_bytes())
        return {"flowbp_ray.version": f"{tags['flowbp_ray.version']}+sources.{digest.hexdigest()[:12]}"}
    git = ["git", "--no-optional-locks", "-C", str(checkout)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, check=True, capture_output=True, text=True).stdout
    except subprocess.CalledProcessError as error:
        return tags | {"git.commit": f"unknown: {error.stderr.strip()}"}
    except FileNotFoundError:
        return tags | {"git.commit": "unknown: git is not installed"}
    # The first is what the MLflow UI shows as the run's version.
    return tags | {"mlflow.source.git.commit": commit, "git.commit": commit, "git.changed": str(bool(changed)).lower()}


def _pictured(path: str) -> tuple[str, int]:
    """Key and step of a logged image's artifact, ``images/KEY+step+STEP+…`` with ``~`` for the key's ``/``."""
    key, _, step, *_ = Path(path).name.split("+")
    return key.replace("~", "/"), int(step)
