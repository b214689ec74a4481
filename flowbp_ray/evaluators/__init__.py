"""Evaluators: finished pictures and the prompts' entries in, one verdict or score a picture out. Nothing is differentiated.

One that cannot judge a picture raises; no score is made up for it.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from flowbp_ray.config.training import Evaluation

Row = dict[str, Any]
"""An entry of a prompt file: ``prompt``, and what else its format has."""


class Evaluator(Protocol):
    """What every evaluator of this package is, a class made with plain arguments."""

    def __call__(self, pictures: np.ndarray, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Of uint8 pictures ``(B, H, W, 3)`` and as many entries: by name ``(B,)`` each, bool or float64; ``reason`` is text."""


def paired(pictures: np.ndarray, rows: Sequence[Row]) -> None:
    """ValueError unless these are uint8 pictures ``(B, H, W, 3)`` with one entry each."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        what = f"{pictures.dtype} of shape {pictures.shape}"
        raise ValueError(f"an evaluator reads pictures in uint8 of shape (B, H, W, 3), not {what}: convert them with to_uint8")
    if len(pictures) != len(rows):
        raise ValueError(f"{len(pictures)} pictures but {len(rows)} entries: give one entry of the prompt file for each picture")


def load(settings: Evaluation, device: str) -> list[Evaluator]:
    """The evaluators of an evaluation's settings, with their models on the device; libraries are imported for those alone."""
    evaluators: list[Evaluator] = []
    if settings.checked:
        from flowbp_ray.evaluators.shapes_checker import ShapesChecker

        evaluators.append(ShapesChecker())
    if settings.geneval:
        from flowbp_ray.evaluators.geneval import GenEval

        evaluators.append(GenEval(settings.geneval.detector, settings.geneval.clip).to(device))
    if settings.unified_reward:
        from flowbp_ray.evaluators.unified_reward import UnifiedReward

        asked = settings.unified_reward
        evaluators.append(UnifiedReward(asked.url, asked.model, asked.key_variable))
    return evaluators
