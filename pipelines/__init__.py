"""What a person runs: ``python -m pipelines.NAME --help``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


def files_and_overrides(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """A command line's YAML files, and its ``section.setting=value``, in their orders."""
    return [Path(g) for g in given if "=" not in g], [g for g in given if "=" in g]


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
