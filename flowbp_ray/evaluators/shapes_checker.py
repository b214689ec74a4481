"""The embedded default's exact checker as an evaluator."""

from collections.abc import Sequence

import numpy as np

from flowbp_ray.evaluators import Row, paired
from flowbp_ray.shapes.checker import check
from flowbp_ray.shapes.preferences import watermarked


class ShapesChecker:
    """Whether pictures of the shapes world show what their captions say and nothing else, and are watermarked."""

    def __call__(self, pictures: np.ndarray, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """``right``, ``reason`` and ``watermarked``, ``(B,)`` each, of pictures ``(B, 64, 64, 3)``.

        ValueError for another size, and for a prompt that is no caption of that world.
        """
        paired(pictures, rows)
        verdicts = [check(picture, row["prompt"]) for picture, row in zip(pictures, rows, strict=True)]
        return {
            "right": np.array([verdict.right for verdict in verdicts], bool),
            "reason": np.array([verdict.reason for verdict in verdicts], str),
            "watermarked": np.array([watermarked(picture) for picture in pictures], bool),
        }
