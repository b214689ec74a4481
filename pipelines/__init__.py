"""What a person runs: ``python -m pipelines.NAME --help``."""

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from flowbp_ray.config import ConfigError


def files_and_overrides(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """A command line's YAML files, and its ``section.setting=value``, in their orders."""
    return [Path(g) for g in given if "=" not in g], [g for g in given if "=" in g]


def parsed(parser: argparse.ArgumentParser, given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or what else is ``given``, with the ``files`` and ``overrides`` that its positional ``given`` has."""
    args, unknown = parser.parse_known_intermixed_args(given)
    if unknown:
        dashed = next((u.lstrip("-") for u in unknown if "." in u), None)
        hint = f" (settings have no dashes: {dashed}{'' if '=' in dashed else '=…'})" if dashed else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    args.files, args.overrides = files_and_overrides(args.given)
    return args


def job_environment() -> dict[str, Any]:
    """The runtime environment of the Ray job that this process is the driver of; of none it is empty."""
    found: dict[str, Any] = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    return found


def check_lasts(setting: str, folder: Path) -> None:
    """ConfigError for a folder that cannot be made, or would be lost with the temporary copy of the working directory that a
    submitted job has."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"{setting} is {folder}, but {there} is no folder that can be written to: name another one")
    if "working_dir" in job_environment() and folder.is_relative_to(Path.cwd()):
        raise ConfigError(
            f"{setting} is {folder}, in the temporary copy of the working directory that a submitted job has: give the whole "
            "path of a folder elsewhere, which all machines see"
        )


def interrupt(signum: int, frame: FrameType | None) -> None:
    """End as by Ctrl-C: what SIGTERM, which `ray job stop` sends, does to a command. ray.init takes it for itself."""
    raise KeyboardInterrupt


def refuse(error: Exception) -> NoReturn:
    """End with what is wrong with the input, and the exit code of a command line that is wrong."""
    print(error, file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """How a command ends before it has started anything: by what is wrong with its input, or by Ctrl-C."""
    try:
        yield
    except (ConfigError, ValueError, OSError) as error:
        refuse(error)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: nothing was started")


@contextlib.contextmanager
def ending(again: str, log: Path | None = None) -> Iterator[None]:
    """The boundary to the user: how a command that was started ends early, in one sentence and what to do ``again``. All of an
    error is in ``log``, if there is one."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted: nothing runs any more; {again}")
    except ConfigError as error:  # of what the cluster is, or runs
        refuse(error)
    except Exception as error:  # of models, libraries and other processes, which may raise anything
        from flowbp_ray.tracking.store import masked
        from pipelines.causes import reason

        if log is None:
            sys.exit(f"\nstopped: {reason(error)}\n{again}")
        log.write_text(masked(traceback.format_exc()), encoding="utf-8")
        sys.exit(f"\nstopped: {reason(error)}\n{again}; all of the error is in {log}")


def page_of(info: dict[str, str]) -> str:
    """Where a run's page is in MLflow, and the command that serves it, if it takes one."""
    command = info["command"].removeprefix(f"{Path.cwd()}/")
    return info["page"] + (f"   after: {command}" if command else "")


def quiet_libraries() -> None:
    """Keep the libraries' loading bars and notices (truncated T5 prompts, optional packages) out of a command's output."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
