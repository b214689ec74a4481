"""What travels: micro-batches, and the weights that make them. Without torch, so that what only passes them on starts fast."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from flowbp_ray.config import AlignConfig

#: Columns of a micro-batch: numpy arrays whose first axis is the sample.
Block = dict[str, np.ndarray]


@dataclass(frozen=True)
class Piece:
    """Bytes of one parameter as they lie in its memory, from its ``start``-th value on."""

    parameter: str
    start: int
    values: np.ndarray


@dataclass(frozen=True)
class Chunk:
    """A part of the weights of one policy version, and the checksum of its bytes where they were made."""

    pieces: tuple[Piece, ...]
    checksum: str

    @property
    def bytes(self) -> int:
        """Of all pieces."""
        return sum(piece.values.nbytes for piece in self.pieces)


@dataclass(frozen=True)
class MicroBatch:
    """Samples ``part · size … (part + 1) · size`` of one step, made by policy ``version``."""

    step: int
    part: int
    version: int
    samples: tuple[int, ...]

    @classmethod
    def of(cls, config: AlignConfig, number: int) -> Self:
        """The ``number``-th of the run: steps one after the other, each in ``batch / micro_batch`` parts."""
        train = config.train
        step, part = divmod(number, train.batch // train.micro_batch)
        samples = tuple(range(part * train.micro_batch, (part + 1) * train.micro_batch))
        return cls(step, part, policy_version(config, step), samples)


def policy_version(config: AlignConfig, step: int) -> int:
    """The version that samples a step: exactly ``policy_lag`` behind the newest there could be, but for the first steps."""
    return max(0, step - config.train.policy_lag)
