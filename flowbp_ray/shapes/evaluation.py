"""The six tasks, judged by the exact checker, with standard errors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flowbp_ray.pictures import to_uint8
from flowbp_ray.shapes.captions import TASKS
from flowbp_ray.shapes.checker import check

MOST = 1_000_000  # pictures of a task in an evaluation


@dataclass(frozen=True)
class Score:
    """A share of pictures (0…1), a mean reward, or a difference of two, and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f} %"


def average(values: Sequence[float] | np.ndarray, groups: Sequence[str] | np.ndarray | None = None) -> Score:
    """Mean (of booleans the share that is true) and its standard error. Values count as independent; with ``groups``, a name for
    each value, groups do if there are several."""
    array = np.asarray(values, np.float64)
    apart = array - array.mean()
    if groups is not None and len(set(groups)) > 1:
        _, group = np.unique(groups, return_inverse=True)
        apart = np.bincount(group, apart)
    return Score(float(array.mean()), float(np.linalg.norm(apart) / len(array)))


def six_tasks(values: Mapping[str, Sequence[float] | np.ndarray]) -> dict[str, Score]:
    """Each task's average, of right pictures or of differences, and ``mean`` over the six tasks."""
    missing = [t for t in TASKS if t not in values or not len(values[t])]
    if missing:
        raise ValueError(f"no pictures were judged for {', '.join(missing)}: the mean needs all six tasks")
    scores = {task: average(values[task]) for task in TASKS}
    errors = np.array([scores[t].error for t in TASKS])
    mean = float(np.mean([scores[t].value for t in TASKS]))
    return scores | {"mean": Score(mean, float(np.sqrt((errors**2).sum()) / len(TASKS)))}


def seeds(place: int, start: int, number: int, evaluation: int = 0) -> list[int]:
    """Noise seeds of ``number`` pictures of a task, from its picture ``start`` on; ``place`` is the task's number, 0 to 5.

    No two pictures share a seed, whatever their task or ``evaluation``, the evaluation's own seed.
    """
    first = (evaluation * len(TASKS) + place) * MOST + start
    return list(range(first, first + number))


def judge(
    sample: Callable[[list[str], list[int]], Tensor], prompts: Mapping[str, Sequence[str]], batch: int = 50
) -> dict[str, list[bool]]:
    """Sample every prompt and say task by task which pictures are right."""
    rights = {}
    for place, (task, texts) in enumerate(prompts.items()):
        pictures: list[np.ndarray] = []
        for start in range(0, len(texts), batch):
            some = list(texts[start : start + batch])
            pictures.extend(to_uint8(sample(some, seeds(place, start, len(some)))))
        rights[task] = [check(p, t).right for p, t in zip(pictures, texts, strict=True)]
    return rights
