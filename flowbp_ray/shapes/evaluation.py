"""The six tasks, judged by the exact checker, with standard errors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flowbp_ray.pictures import to_uint8
from flowbp_ray.shapes.captions import TASKS
from flowbp_ray.shapes.checker import check


@dataclass(frozen=True)
class Score:
    """A share of pictures (0…1), or a mean reward, and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f} %"


def share(yes: Sequence[bool]) -> Score:
    """The share that is true, with its binomial standard error."""
    value = float(np.mean(yes))
    return Score(value, float(np.sqrt(value * (1 - value) / len(yes))))


def six_tasks(rights: Mapping[str, Sequence[bool]]) -> dict[str, Score]:
    """Each task's share of right pictures, and ``mean`` over the six tasks."""
    missing = [t for t in TASKS if not rights.get(t)]
    if missing:
        raise ValueError(f"no pictures were judged for {', '.join(missing)}: the mean needs all six tasks")
    scores = {task: share(rights[task]) for task in TASKS}
    errors = np.array([scores[t].error for t in TASKS])
    mean = float(np.mean([scores[t].value for t in TASKS]))
    return scores | {"mean": Score(mean, float(np.sqrt((errors**2).sum()) / len(TASKS)))}


def judge(
    sample: Callable[[list[str], list[int]], Tensor], prompts: Mapping[str, Sequence[str]], batch: int = 50
) -> dict[str, list[bool]]:
    """Sample every prompt (seed: its place in its task's list) and say task by task which pictures are right."""
    rights = {}
    for task, texts in prompts.items():
        pictures: list[np.ndarray] = []
        for start in range(0, len(texts), batch):
            seeds = list(range(start, min(start + batch, len(texts))))
            pictures.extend(to_uint8(sample(list(texts[start : start + batch]), seeds)))
        rights[task] = [check(p, t).right for p, t in zip(pictures, texts, strict=True)]
    return rights
