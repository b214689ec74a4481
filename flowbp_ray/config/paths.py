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

#: The files that a pipeline's, a reward model's and a tokenizer's folder begin with.
MODEL_INDEX, REWARD_INDEX, TOKENIZER_INDEX = "model_index.json", "config.json", "tokenizer_config.json"

#: Files that would be read as prompts one a line, and are none.
NO_PROMPTS = (".csv", ".tsv", ".parquet", ".arrow", ".xls", ".xlsx", ".ods", ".yaml", ".yml", ".gz", ".zip")

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
    if path.suffix.lower() in NO_PROMPTS:
        raise ValueError(f"prompts are not read from {path.suffix} files such as {path}: name a .txt, .jsonl or .json file")
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
    if hub_id(text):
        return text
    if close := get_close_matches(text, embedded, n=1):
        raise ValueError(f"there is no model folder {path}: did you mean {close[0]!r}?")
    words = f", or {' or '.join(embedded)}" if embedded else ""
    raise ValueError(f"there is no model folder {path}: give a folder, a Hugging Face id (owner/name){words}")


def file(text: str, name: str) -> str:
    """The absolute path of a file that is there (in a folder, the one of that ``name``), or a Hugging Face id."""
    path = absolute(text)
    if path.is_dir():
        if not (path / name).is_file():
            raise ValueError(f"the folder {path} has no {name}: name a folder that has it")
        return str(path / name)
    if path.is_file():
        return str(path)
    if hub_id(text):
        return text
    raise ValueError(f"there is no file {path}: give {name}, a folder that has it, or a Hugging Face id (owner/name)")


def import_path(text: str) -> str:
    """The text, if it can be an import path ``package.module:name``."""
    module, _, name = text.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ValueError(f"{text!r} is no import path: write package.module:name")
    return text


def hub_id(text: str) -> bool:
    """Whether the text can be a Hugging Face id; the embedded models' words look like one."""
    return HUB_ID.fullmatch(text) is not None and not text.startswith("shapes/")


def _path(value: object) -> object:
    return absolute(value) if isinstance(value, str | Path) else value  # of anything else pydantic says what is wrong


AbsolutePath = Annotated[Path, BeforeValidator(_path)]
Folder = Annotated[AbsolutePath, AfterValidator(folder_to_be)]
ExistingFolder = Annotated[AbsolutePath, AfterValidator(existing)]
PromptsPath = Annotated[str, AfterValidator(prompts)]
ModelPath = Annotated[str, AfterValidator(lambda text: model(text, MODELS, MODEL_INDEX))]
