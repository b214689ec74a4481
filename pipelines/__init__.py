"""What a person runs: ``python -m pipelines.NAME --help``."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from flowbp_ray.config import ConfigError


def files_and_overrides(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """A command line's YAML files, and its ``section.setting=value``, in their orders."""
    return [Path(g) for g in given if "=" not in g], [g for g in given if "=" in g]


def job_environment() -> dict[str, Any]:
    """The runtime environment of the Ray job that this process is the driver of; of none it is empty."""
    found: dict[str, Any] = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    return found


def check_lasts(setting: str, folder: Path) -> None:
    """ConfigError for a folder in the temporary copy of the working directory that a submitted job has: it would be lost."""
    if "working_dir" in job_environment() and folder.is_relative_to(Path.cwd()):
        raise ConfigError(
            f"{setting} is {folder}, in the temporary copy of the working directory that a submitted job has: give the whole "
            "path of a folder elsewhere, which all machines see"
        )


def refuse(error: Exception) -> NoReturn:
    """End with what is wrong with the input, and the exit code of a command line that is wrong."""
    print(error, file=sys.stderr)
    sys.exit(2)


def quiet_libraries() -> None:
    """Keep the libraries' loading bars and notices (truncated T5 prompts, optional packages) out of a command's output."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
