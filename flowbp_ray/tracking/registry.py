"""MLflow's registry: what a run exports becomes a version of a registered model, and versions, aliases and runs are found again.

A version has all that pictures depend on beside the base: the adapter in diffusers' format, the configuration, the
evaluation, the before and after. Of a whole model there is a reference: where it is, and what its files are.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from flowbp_ray.config import AlignConfig, ConfigError
from flowbp_ray.files import digest
from flowbp_ray.tracking.store import is_there, masked
from flowbp_ray.training import EXPORT_FILE

#: Of a version: what it is, and what became of it when it stood against the champion.
CHECKSUM, PROMOTION = "checksum", "promotion"
#: In a version's files: the configuration, and of whole models where these are.
CONFIG, REFERENCE = "resolved_config.yaml", "reference.json"


@dataclass(frozen=True)
class Exported:
    """What a run exported, for the registry."""

    #: The folder of an adapter, or of a whole pipeline.
    folder: Path
    config: AlignConfig
    #: The configuration as text, without passwords.
    text: str
    #: Steps it was trained.
    version: int
    #: The evaluation, as Markdown.
    table: str
    #: Sample pictures.
    pictures: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The registered model's."""
        return registered_name(self.config)


def checksum_of(folder: Path) -> str:
    """SHA-256 of the adapter in a folder, or of what was trained of a pipeline, its transformer."""
    if (folder / EXPORT_FILE).exists():
        return digest(folder / EXPORT_FILE)
    files = sorted((folder / "transformer").glob("*.safetensors"))
    return hashlib.sha256("".join(map(digest, files)).encode()).hexdigest()


def registered_name(config: AlignConfig) -> str:
    """The registered model of a configuration: ``tracking.registered_model``, else named by the base, ``shapes-aligned``."""
    return config.tracking.registered_model or f"{config.model.path.rstrip('/').rpartition('/')[2]}-aligned"


def register(uri: str, run_id: str, exported: Exported) -> str:
    """Make a version of what a run exported, unless it has one; its URI, ``models:/NAME/VERSION``.

    mlflow.MlflowException if the store fails.
    """
    client, checksum, name = MlflowClient(uri), checksum_of(exported.folder), exported.name
    for version in client.search_model_versions(f"run_id='{run_id}'"):
        if version.name == name and version.tags.get(CHECKSUM) == checksum:
            return f"models:/{name}/{version.version}"
    model = exported.config.model
    tags = {
        CHECKSUM: checksum,
        "base_model": model.path,
        "method": exported.config.surrogate.method,
        "steps": str(exported.version),
    } | ({"base_model_revision": model.revision} if model.revision else {})
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) / "files"
        files.mkdir()
        (files / CONFIG).write_text(exported.text, encoding="utf-8")
        (files / "evaluation.md").write_text(exported.table, encoding="utf-8")
        for picture in exported.pictures:
            shutil.copy(picture, files)
        make = _adapter if (exported.folder / EXPORT_FILE).exists() else _whole
        version = make(client, uri, run_id, exported, files, tags)
    client.update_model_version(name, version, description=exported.table)
    return f"models:/{name}/{version}"


class _Pinned:
    """``mlflow.diffusers`` with the base's revision as trained on: by itself it notes the hub's newest."""

    __name__ = "mlflow.diffusers"

    def __init__(self, revision: str | None) -> None:
        self.revision = revision

    def save_model(self, path: str, mlflow_model: Model, **settings: Any) -> None:
        import mlflow.diffusers

        mlflow.diffusers.save_model(path=path, mlflow_model=mlflow_model, **settings)
        flavor = mlflow_model.flavors[mlflow.diffusers.FLAVOR_NAME]
        flavor.pop("base_model_revision", None)
        if self.revision:
            flavor["base_model_revision"] = self.revision
        mlflow_model.save(str(Path(path) / "MLmodel"))


def _adapter(client: MlflowClient, uri: str, run_id: str, exported: Exported, files: Path, tags: dict[str, str]) -> str:
    """A version that `mlflow.diffusers.load_model` takes."""
    for file in exported.folder.iterdir():
        shutil.copy(file, files)
    run = client.get_run(run_id)
    # Left to itself, Model.log takes the Default experiment, whose artifacts are in whatever directory this process is in.
    model = client.create_logged_model(
        run.info.experiment_id, name="adapter", source_run_id=run_id, tags=tags, params=run.data.params
    )
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)  # Model.log has no client
    try:
        logged = Model.log(
            artifact_path=None,
            model_id=model.model_id,
            flavor=_Pinned(exported.config.model.revision),
            run_id=run_id,
            step=exported.version,  # with it go the run's metrics of that step, the evaluation's
            registered_model_name=exported.name,
            adapter_path=str(files),
            base_model=exported.config.model.source,
            metadata={"sampling": exported.config.sampling.model_dump(mode="json")},
            tags=tags,
        )
    finally:
        mlflow.set_tracking_uri(before)  # it is an environment variable too, which child processes would take
    return str(logged.registered_model_version)


def _whole(client: MlflowClient, uri: str, run_id: str, exported: Exported, files: Path, tags: dict[str, str]) -> str:
    """A version that says where a pipeline is: gigabytes stay where they are."""
    reference = {"path": str(exported.folder), "steps": exported.version, CHECKSUM: tags[CHECKSUM]}
    (files / REFERENCE).write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")
    place = f"reference/{tags[CHECKSUM][:16]}"  # a run that goes on writes its model to the same folder
    client.log_artifacts(run_id, str(files), place)
    try:
        client.create_registered_model(exported.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
    return str(client.create_model_version(exported.name, source, run_id, tags=tags).version)


@dataclass(frozen=True)
class Found:
    """What the tracking store has under a run's id or a version's URI."""

    run_id: str
    #: A registered model and its version; None for a run.
    version: ModelVersion | None
    #: Get the configuration's file, and the folder of the adapter, into a folder; of a whole model the folder where it is.
    fetch: Callable[[Path], tuple[Path, Path]]


def find(uri: str, what: str) -> Found:
    """Look a run's id, ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS`` up. ConfigError if there is none."""
    if not is_there(uri):  # MLflow would make it
        raise nothing(uri, what, FileNotFoundError("the database does not exist"))
    client = MlflowClient(uri)
    try:
        if what.startswith("models:/"):
            version = version_of(client, what)
            run_id, artifacts = version.run_id, client.get_model_version_download_uri(version.name, version.version)
        else:
            version, run = None, client.get_run(what).info
            run_id, there = run.run_id, {file.path for file in client.list_artifacts(run.run_id)}
            # Not as runs:/…: of that name is the run's logged model too, which MLflow asks the process's default store for.
            artifacts = f"{run.artifact_uri}/{'reference' if 'reference' in there else 'adapter'}"
    except (MlflowException, TypeError) as error:
        raise nothing(uri, what, error) from error

    def fetch(place: Path) -> tuple[Path, Path]:
        try:
            config = Path(client.download_artifacts(run_id, CONFIG, str(place)))
            got = Path(mlflow.artifacts.download_artifacts(artifacts, dst_path=str(place), tracking_uri=uri))
        except (MlflowException, OSError) as error:
            raise nothing(uri, what, error) from error
        if found := [*got.rglob(EXPORT_FILE)]:
            return config, found[0].parent
        if found := [*got.rglob(REFERENCE)]:
            references = [json.loads(f.read_text("utf-8")) for f in found]
            return config, whole(what, max(references, key=lambda r: r["steps"]))
        raise ConfigError(f"{what} has neither an adapter ({EXPORT_FILE}) nor a reference to a whole model ({REFERENCE})")

    return Found(run_id, version, fetch)


def whole(what: str, reference: dict[str, Any]) -> Path:
    """The folder of a whole model; ConfigError if it is not there any more, or another one."""
    folder = Path(reference["path"])
    if not folder.is_dir() or checksum_of(folder) != reference[CHECKSUM]:
        raise ConfigError(
            f"{what} is the whole model in {folder}, which is gone, or has other weights than when it was registered"
        )
    return folder


def version_of(client: MlflowClient, what: str) -> ModelVersion:
    """The version of ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``. TypeError or mlflow.MlflowException if there is none."""
    name, at, alias = what.removeprefix("models:/").partition("@")
    return client.get_model_version_by_alias(name, alias) if at else client.get_model_version(*name.split("/", 1))


def nothing(uri: str, what: str, error: Exception) -> ConfigError:
    """That a store has nothing under a name."""
    why = str(error).splitlines()[0]
    return ConfigError(f"{what} is no folder here, and MLflow ({masked(uri)}) has no such run or model with an adapter: {why}")
