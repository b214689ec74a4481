"""What pictures are asked for: prompts, and what else a prompt file says of each."""

import json
import textwrap
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from flowbp_ray.config import AlignConfig
from flowbp_ray.config.schema import Prompts
from flowbp_ray.evaluators import Row
from flowbp_ray.shapes.captions import evaluation_prompts, training_prompts

LONGEST = 10_000  # characters; text encoders read some hundred words


def read_prompts(prompts: Prompts) -> list[str]:
    """All prompts to train with, in order. Errors as `read_rows`'s; ValueError too for one that is there twice, since an epoch
    uses each once."""
    if prompts.file is None:
        return training_prompts()
    found = [row["prompt"] for row in read_rows(prompts.file)]
    first: dict[str, int] = {}
    for number, prompt in enumerate(found, 1):
        if prompt in first:
            raise ValueError(
                f"{prompts.file}: prompt {number} is prompt {first[prompt]} again, {textwrap.shorten(prompt, 60)!r}: remove one"
            )
        first[prompt] = number
    return found


def pictured(config: AlignConfig, number: int | None = None) -> dict[str, list[Row]]:
    """The prompts of each task of the evaluation, with what else their file says of them, one a picture, or the first ``number``
    of each task; a file's are one task, those of GenEval's format its six."""
    settings = config.evaluation
    if settings.checked:
        tasks = evaluation_prompts(number or settings.per_task, settings.seed)
        return {task: [{"prompt": prompt} for prompt in prompts] for task, prompts in tasks.items()}
    file, groups = Path(settings.prompts), dict[str, list[Row]]()
    if settings.geneval:
        from flowbp_ray.evaluators import geneval_rules

        for row in geneval_rules.read(file):
            groups.setdefault(row["tag"], []).append(row)
        if missing := [tag for tag in geneval_rules.TAGS if tag not in groups]:
            raise ValueError(f"{file} has no prompts of {', '.join(missing)}: GenEval's score is the mean of all six tasks")
    else:
        groups = {"prompts": read_rows(file)}
    if settings.per_prompt and number is None:
        return {task: [row for row in rows for _ in range(settings.per_prompt)] for task, rows in groups.items()}
    return {task: list(islice(cycle(rows), number or settings.per_task)) for task, rows in groups.items()}


def read_rows(file: Path) -> list[Row]:
    """All entries of a prompt file, ``prompt`` and what else there is: of text one a line, of .jsonl an object a line, of .json
    a list of prompts (as HPDv2's) or of objects. ValueError says which line or entry is none."""
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8") from error
    if file.suffix == ".json":
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {error.lineno}: invalid JSON: {error.msg}") from error
        if not isinstance(entries, list):
            raise ValueError(f'{file} has to be a list of prompts, or of objects with "prompt"')
        rows = [_row(file, f"entry {n}", {"prompt": e} if isinstance(e, str) else e) for n, e in enumerate(entries, 1)]
    elif file.suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        rows = [_row(file, f"line {n}", _object(file, n, line)) for n, line in lines]
    else:
        rows = [_row(file, f"line {n}", {"prompt": line}) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise ValueError(f"there are no prompts in {file}")
    return rows


def _object(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f'{file}, line {number}: write an object with "prompt", not {line[:60]!r}') from error


def _row(file: Path, where: str, entry: Any) -> Row:
    if not isinstance(entry, dict) or "prompt" not in entry:
        raise ValueError(f'{file}, {where}: write an object with "prompt", not {json.dumps(entry, ensure_ascii=False)[:60]!r}')
    prompt = entry["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{file}, {where}: the prompt is {prompt!r}, not text")
    if len(prompt) > LONGEST:
        raise ValueError(
            f"{file}, {where}: the prompt has {len(prompt):,} characters, and no model reads {LONGEST:,}: shorten it"
        )
    return entry | {"prompt": prompt.strip()}
