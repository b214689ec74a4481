"""The folders of runs: which one a command goes on with, how far that is, and that only one process works in it."""

import contextlib
import fcntl
import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pyarrow import fs

from flowbp_ray.config import AlignConfig, ConfigError, dump
from flowbp_ray.files import replace_text, sampled_digest
from flowbp_ray.rollouts.prompts import pictured, read_prompts
from flowbp_ray.tracking.store import masked

#: In a run's folder: its configuration, and what else it began with.
CONFIG, BEGAN = "config.yaml", "run.json"
#: Ray Train's list of a run's checkpoints. On a disk it is rewritten in place, so there is a copy of the last whole one.
LIST, COPY = "checkpoint_manager_snapshot.json", "checkpoint_manager_snapshot.copy.json"
#: What does not change what is learned, and so may be other when a run goes on; of files of prompts the contents count.
MAY_DIFFER = (
    "prompts.path",
    "evaluation.prompts",
    "cluster",
    "sampling.batched_branches",
    "train.workers",
    "train.micro_batch",
    "train.gradient_checkpointing",
    "train.unsharded_gradients",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.retries",
    "train.max_skipped",
    "watch.stop",
    "reward.application",
    "evaluation.unified_reward.url",
    "evaluation.unified_reward.key_variable",
    "evaluation.judge_cpus",
    "evaluation.judge_gpus",
    "output",
)


def new_folder(config: AlignConfig) -> Path:
    """A folder that no other run has."""
    return config.output / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.surrogate.method}-{secrets.token_hex(2)}"


def unfinished(config: AlignConfig, folders: Iterable[Path]) -> Path | None:
    """The newest of the folders with a run that was not finished and is the configuration's, as it was asked for."""
    for folder in sorted(folders, reverse=True):
        if not (folder / BEGAN).exists():
            continue
        began = _began(folder)
        if (
            not began["finished"]
            and began["revision"] == config.model.revision
            and all(began.get(name) == value for name, value in _contents(config).items())
            and not differing(config, folder, "model.revision")
        ):
            return folder
    return None


def as_begun(config: AlignConfig, folder: Path) -> AlignConfig:
    """The configuration with the commit of the model that the folder's run has; ConfigError if it asks for another one."""
    if (theirs := _began(folder)["revision"]) != config.model.revision:
        raise ConfigError(f"model.revision is {config.model.revision!r}, and {theirs!r} of the run in {folder}: give it its own")
    its = yaml.safe_load((folder / CONFIG).read_text("utf-8"))["model"]["revision"]
    return config.model_copy(update={"model": config.model.model_copy(update={"revision": its})})


def differing(config: AlignConfig, folder: Path, *but: str) -> dict[str, tuple[Any, Any]]:
    """The settings that are others than the run's, theirs and ours, but for those that may differ; passwords aside."""
    theirs, ours = (_leaves(yaml.safe_load(masked(t))) for t in ((folder / CONFIG).read_text("utf-8"), dump(config)))
    return {
        key: (theirs.get(key), ours.get(key))
        for key in [*ours, *(k for k in theirs if k not in ours)]
        if theirs.get(key) != ours.get(key)
        and not any(f"{key}.".startswith(f"{name}.") for name in (*MAY_DIFFER, *but))
        # A reward's processes.
        and not (key.startswith("reward.components.") and ".deployment" in key)
    }


def check(config: AlignConfig, folder: Path) -> None:
    """ConfigError unless the configuration can go on with the run of the folder, which may get more steps."""
    if not (folder / BEGAN).exists():
        raise ConfigError(f"{folder} has no run that could go on: it has no {BEGAN}")
    if other := differing(config, folder, "train.steps"):
        lines = [f"the run in {folder} has other settings, so it cannot go on with these:"]
        lines += [f"  {key} is {ours!r}, there {theirs!r}" for key, (theirs, ours) in other.items()]
        raise ConfigError("\n".join([*lines, "give it its own, or start a new run"]))
    for name, value in _contents(config).items():
        if _began(folder).get(name) != value:
            what = {"prompts": f"the prompts of {config.prompts.path}", "weights": f"the weights in {config.model.source}"}[name]
            raise ConfigError(f"{what} are others than when the run in {folder} began: start a new run")
    reached = Kept(config, folder).steps
    if config.train.steps < reached:
        raise ConfigError(f"the run in {folder} has {reached} steps, more than train.steps, which is {config.train.steps}")


def begin(config: AlignConfig, folder: Path, asked: str | None) -> None:
    """Make the folder what a run begins or goes on with; ``asked`` is the model's revision before it was pinned.

    Errors as `check`'s and `alone`'s; ConfigError too where the storage has another run's checkpoints by the folder's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):  # else a command that is refused would have changed what a run that is going on is
        if (folder / BEGAN).exists():
            check(config, folder)
            began = _began(folder) | {"finished": False}
        elif there := Kept(config, folder).newest:
            raise ConfigError(f"{there.path} is another run's: give this one another train.storage, or its folder another name")
        else:
            began = {**_contents(config), "revision": asked, "finished": False}
        replace_text(folder / CONFIG, masked(dump(config)))
        _note(folder, **began)


def finished(folder: Path) -> None:
    """The run has nothing left to do."""
    _note(folder, **_began(folder) | {"finished": True})


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """ConfigError if another process works in the folder. It may end in any way: then nobody does."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"what is in {folder} is going on in another process: wait for it or stop it (--new starts another run)"
            ) from error
        yield


class Newest(NamedTuple):
    """A checkpoint's folder, as a person reads it, and its number of steps."""

    path: str
    steps: int


class Kept:
    """Ray Train's checkpoints of a run, where its storage is."""

    def __init__(self, config: AlignConfig, folder: Path) -> None:
        if config.train.storage is None:
            self.storage, self.path = str(folder.parent), str(folder)
            self.filesystem, self.root = fs.LocalFileSystem(), str(folder)
            return
        self.storage = config.train.storage
        at, question, options = self.storage.partition("?")  # as of s3://bucket/folder?endpoint_override=…
        self.path = f"{at.rstrip('/')}/{folder.name}"
        try:
            self.filesystem, self.root = fs.FileSystem.from_uri(f"{self.path}{question}{options}")
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(masked(f"train.storage, {self.storage}, cannot be used: {error}")) from error

    @property
    def newest(self) -> Newest | None:
        """The last checkpoint that is whole. Ray Train lists it when all of it is there."""
        listed = self._read(LIST) or self._read(COPY)
        latest = None if listed is None else listed["latest_checkpoint_result"]
        if latest is None:
            return None
        return Newest(masked(f"{self.path}/{latest['checkpoint_dir_name']}"), latest["metrics"]["version"])

    @property
    def steps(self) -> int:
        """Those of the newest checkpoint."""
        return self.newest.steps if self.newest else 0

    def copy(self) -> None:
        """Have a copy of the list, if it is on a disk and whole."""
        if isinstance(self.filesystem, fs.LocalFileSystem) and (listed := self._read(LIST)) is not None:
            replace_text(Path(self.root) / COPY, json.dumps(listed))

    def mend(self) -> None:
        """Put the copy in place of a list that was being rewritten when its writer ended, which Ray Train would not read."""
        there = self.filesystem.get_file_info(f"{self.root}/{LIST}").type != fs.FileType.NotFound
        if there and self._read(LIST) is None:
            if (copied := self._read(COPY)) is not None:
                replace_text(Path(self.root) / LIST, json.dumps(copied))
            else:
                self.filesystem.delete_file(f"{self.root}/{LIST}")

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            with self.filesystem.open_input_stream(f"{self.root}/{name}") as file:
                listed: dict[str, Any] = json.loads(file.read())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        except OSError as error:
            raise OSError(masked(f"the checkpoints in {self.path} cannot be read: {error}")) from error
        return listed


def _note(folder: Path, **began: Any) -> None:
    replace_text(folder / BEGAN, json.dumps(began) + "\n")


def _began(folder: Path) -> dict[str, Any]:
    began: dict[str, Any] = json.loads((folder / BEGAN).read_text("utf-8"))
    return began


def _contents(config: AlignConfig) -> dict[str, str | None]:
    """What files have that the configuration only names: digests of all prompts, and of a local model's weights."""
    source = Path(config.model.source)
    return {
        "prompts": hashlib.sha256(json.dumps([read_prompts(config.prompts), pictured(config)]).encode()).hexdigest(),
        "weights": sampled_digest(source) if source.is_absolute() else None,
    }


def _leaves(node: Any, name: str = "") -> dict[str, Any]:
    items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    if not items:
        return {name: node}
    return {k: v for key, value in items for k, v in _leaves(value, f"{name}.{key}" if name else str(key)).items()}
