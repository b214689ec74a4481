"""Which adapters there are, by the names that requests have, and by the names that processes give each other."""

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastapi import HTTPException
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from pydantic import Field

from flowbp_ray.config import paths
from flowbp_ray.config.section import Section, Text
from flowbp_ray.tracking import registry
from flowbp_ray.tracking.store import tracking_uri
from flowbp_ray.training import EXPORT_FILE

T = TypeVar("T")

#: How adapters are named between processes: behind a folder's name or a run's id stands which of its states is meant.
FOLDER, VERSION, RUN, STATE = "folder:", "models:/", "run:", "#"
KNOWN_FOR = 2.0  # seconds for which an alias, the newest version or a run is not looked up again
#: What MLflow says of what is not there, or cannot be.
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")


class Named(Section):
    """Which adapters may be asked for."""

    registered: list[Text] = Field(default_factory=list)
    """Registered models, all versions of which may be asked for."""
    runs: bool = False
    """Whether the adapter of any MLflow run may be asked for by the run's id."""
    adapters: paths.Folder | None = None
    """A folder with adapters' folders, each of which may be asked for by its name; what is put there later counts too."""
    tracking_uri: Text | None = None
    """MLflow's tracking URI; null takes MLFLOW_TRACKING_URI, else a database under ~/.flowbp_ray."""


def label(name: str) -> str:
    """What people are told of a name between processes: no path of the service's; empty for the base."""
    if name.startswith(FOLDER):
        return Path(name.rpartition(STATE)[0]).name
    if name.startswith(RUN):
        return name.removeprefix(RUN).partition(STATE)[0]
    return name.removeprefix(VERSION)


def state_of(file: Path) -> str:
    """Which state of a file this is. OSError if it is gone."""
    stat = file.stat()
    return f"{stat.st_mtime_ns}-{stat.st_size}"


class Catalogue:
    """Looks names up; some of it asks MLflow, which may take its time."""

    def __init__(self, settings: Named, base: str) -> None:
        self.settings, self.base, self.uri = settings, base, tracking_uri(settings.tracking_uri)
        self.known: dict[str, tuple[float, str]] = {}

    def resolve(self, model: str | None) -> str:
        """A request's model as the name that replicas know it by, the same for the same weights; empty for the base. 404 if
        there is none, 503 while MLflow does not answer."""
        if model in (None, "", self.base):
            return ""
        name = re.split("[/@]", model, maxsplit=1)[0]
        if name in self.settings.registered:
            return self._lately(model, self._version)
        if folder := self._folder(model):
            try:  # other weights by the same name are another adapter
                return f"{FOLDER}{folder}{STATE}{state_of(folder / EXPORT_FILE)}"
            except OSError as error:
                raise absent(model) from error
        if self.settings.runs and re.fullmatch(r"[0-9a-f]{32}", model):
            return self._lately(model, self._run)
        raise absent(model)

    def names(self) -> list[str]:
        """All that can be asked for by name, the base first; of runs, which are many, none. 503 while MLflow does not answer."""
        names = [self.base]
        for name in self.settings.registered:
            aliases, versions = self._asked(name, functools.partial(listed, name=name))
            names += [f"{name}@{alias}" for alias in sorted(aliases)]
            names += [f"{name}/{version}" for version in sorted(versions, reverse=True)]
        if self.settings.adapters:
            found = sorted(f.parent.name for f in self.settings.adapters.glob(f"*/{EXPORT_FILE}"))
            names += [name for name in found if self._folder(name)]
        return names

    def _folder(self, name: str) -> Path | None:
        within = self.settings.adapters
        try:
            if within is None or not re.fullmatch(r"[\w-][\w.-]*", name) or not (within / name / EXPORT_FILE).is_file():
                return None
        except OSError:  # a name longer than a file system has
            return None
        return within / name

    def _version(self, client: MlflowClient, model: str) -> str:
        if "/" in model or "@" in model:
            version: ModelVersion = registry.version_of(client, model)
        else:
            version = max(client.search_model_versions(f"name = '{model}'"), key=lambda v: int(v.version))
        return f"{VERSION}{version.name}/{version.version}"

    def _run(self, client: MlflowClient, model: str) -> str:
        run = client.get_run(model)  # a run that went on ended again
        return f"{RUN}{model}{STATE}{run.info.end_time}"

    def _lately(self, model: str, look: Callable[[MlflowClient, str], str]) -> str:
        then, found = self.known.get(model, (-KNOWN_FOR, ""))
        if time.monotonic() - then > KNOWN_FOR:
            found = self._asked(model, lambda client: look(client, model))
            self.known[model] = time.monotonic(), found
        return found

    def _asked(self, model: str, look: Callable[[MlflowClient], T]) -> T:
        try:
            return look(MlflowClient(self.uri))
        except MlflowException as error:
            if error.error_code in ABSENT:
                raise absent(model) from error
            raise HTTPException(503, f"MLflow does not answer, so nobody knows what {model!r} is: ask later") from error
        except (TypeError, ValueError) as error:  # no version, or a name that can be none
            raise absent(model) from error


def listed(client: MlflowClient, name: str) -> tuple[list[str], list[int]]:
    """Aliases and versions of a registered model; none of one that is not there."""
    aliases = [alias for model in client.search_registered_models(f"name = '{name}'") for alias in model.aliases]
    return aliases, [int(version.version) for version in client.search_model_versions(f"name = '{name}'")]


def absent(model: str) -> HTTPException:
    """That nothing has the name."""
    return HTTPException(404, f"there is no model {model!r}: GET /v1/models has a list")
