"""Paths in a configuration: absolute once it is read, and there when they have to be.

Relative ones are taken from the working directory, in a file as on the command line.
"""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from flowbp_ray import shapes

#: The words for the embedded default's models.
MODELS = {"shapes": shapes.BASE}
REWARD_MODELS = {"shapes/reward": shapes.REWARD, "shapes/judge": shapes.JUDGE}
#: The word for the embedded world's training prompts.
TRAINING_PROMPTS = "shapes"

#: The files that a pipeline's and a reward model's folder begin with.
MODEL_INDEX, REWARD_INDEX = "model_index.json", "config.json"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def absolute(text: str | Path) -> Path:
    """The absolute path of a local file or folder (ValueError if the text names none)."""
    if not str(text).strip() or "://" in str(text):
        raise ValueError(f"{str(text)!r} is no local path: name a file or folder on this machine")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{str(text)!r}: there is no such home folder") from error


def existing(path: Path) -> Path:
    """The path of a folder that is there."""
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    return path


def folder_to_be(path: Path) -> Path:
    """The path of a folder that is there or can be made."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder")
    return path


def prompts(text: str) -> str:
    """The word for the embedded prompts, or the absolute path of a file that is there."""
    if text == TRAINING_PROMPTS:
        return text
    path = absolute(text)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; {TRAINING_PROMPTS!r} means the embedded world's training prompts")
    return str(path)


def model(text: str, embedded: dict[str, Path], index: str) -> str:
    """An embedded model's word, the absolute path of a folder that is there and has the file ``index``, or a Hugging Face id."""
    if text in embedded:
        return text
    path = absolute(text)
    if path.is_dir():
        if not (path / index).is_file():
            raise ValueError(f"the folder {path} has no {index}: name the folder that save_pretrained wrote")
        return str(path)
    if HUB_ID.fullmatch(text) and not text.startswith("shapes/"):
        return text
    close = get_close_matches(text, embedded, n=1)
    hint = (
        f"did you mean {close[0]!r}?" if close else f"give a folder, a Hugging Face id (owner/name), or {' or '.join(embedded)}"
    )
    raise ValueError(f"there is no model folder {path}: {hint}")


def _path(value: object) -> object:
    return absolute(value) if isinstance(value, str | Path) else value  # of anything else pydantic says what is wrong


AbsolutePath = Annotated[Path, BeforeValidator(_path)]
Folder = Annotated[AbsolutePath, AfterValidator(folder_to_be)]
ExistingFolder = Annotated[AbsolutePath, AfterValidator(existing)]
PromptsPath = Annotated[str, AfterValidator(prompts)]
ModelPath = Annotated[str, AfterValidator(lambda text: model(text, MODELS, MODEL_INDEX))]
RewardModelPath = Annotated[str, AfterValidator(lambda text: model(text, REWARD_MODELS, REWARD_INDEX))]
