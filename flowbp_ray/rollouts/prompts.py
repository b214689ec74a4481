"""The prompts that pictures are asked for in training."""

import json
from pathlib import Path

from flowbp_ray.config.schema import Prompts
from flowbp_ray.shapes.captions import training_prompts


def read_prompts(prompts: Prompts) -> list[str]:
    """All prompts of a configuration, in order; ValueError says which line of the file is none."""
    if prompts.file is None:
        return training_prompts()
    texts = [_prompt(prompts.file, number, line) for number, line in enumerate(prompts.file.read_text("utf-8").splitlines(), 1)]
    if not any(texts):
        raise ValueError(f"there are no prompts in {prompts.file}")
    return [t for t in texts if t]


def _prompt(file: Path, number: int, line: str) -> str:
    if file.suffix != ".jsonl" or not line.strip():
        return line.strip()
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{file}, line {number}: write an object with "prompt", not {line[:60]!r}') from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{file}, line {number}: the prompt is {prompt!r}, not text")
    return prompt.strip()
