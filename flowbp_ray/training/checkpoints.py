"""Checkpoints: all that the next step depends on, in safetensors and JSON; read by as many workers as there are then.

Every worker that has a part of the trained state writes three files, numbered by its rank: ``state_0.safetensors`` (raw and
averaged weights, AdamW's moments), ``policies_0.safetensors`` (the versions that samplers may still ask for, byte by byte as
they were published) and ``checkpoint_0.json`` (counts, and the size of each file, by which one that was cut short is found).
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowbp_ray.rollouts.batches import Chunk, Piece
from flowbp_ray.training.weights import checksum, first, local

#: The versions of a policy, each as one worker published its part of it.
Policies = dict[int, list[Chunk]]


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or not this model's."""


class Part(NamedTuple):
    """Rows ``begin …`` of a tensor that has ``rows`` of them in all: what one process has of it."""

    tensor: Tensor
    begin: int
    rows: int

    @classmethod
    def of(cls, parameter: Tensor, tensor: Tensor) -> Self:
        """``tensor`` is shared out as the parameter is; what is own of it, in place."""
        width = max(1, math.prod(parameter.shape[1:]))
        return cls(local(tensor), first(parameter) // width, parameter.shape[0])


#: What a worker has of the trained state, by name.
State = Mapping[str, Part]


@dataclass
class Progress:
    """How far a training is, beside its weights; of plain values."""

    #: Updates that were due, and those of them that were left out because a gradient was not finite; how many of these in a row.
    version: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    #: Of the watch, and its reason if it ended the training.
    watch: dict[str, Any] | None = None
    stopped: str | None = None


def write(folder: Path, rank: int, parts: int, state: State, policies: Policies, progress: Progress) -> None:
    """Write one worker's part, of ``parts`` that there are. Anything else in the folder belongs to it too."""
    save_file({name: part.tensor.cpu().contiguous() for name, part in state.items()}, folder / f"state_{rank}.safetensors")
    published = {
        f"{version}/{number}/{piece.start}/{piece.parameter}": torch.from_numpy(np.array(piece.values))
        for version, chunks in policies.items()
        for number, chunk in enumerate(chunks)
        for piece in chunk.pieces
    }
    save_file(published, folder / f"policies_{rank}.safetensors")
    # Other workers may be writing to the same folder: what has a number is that one's, and all else the first one's.
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file() and _owner(f) == rank}
    note = {"parts": parts, "progress": asdict(progress), "files": files}
    (folder / f"checkpoint_{rank}.json").write_text(json.dumps(note) + "\n", encoding="utf-8")


def _owner(file: Path) -> int:
    numbered = re.search(r"_(\d+)(_\d+)?\.(safetensors|json|npz)$", file.name)
    return int(numbered[1]) if numbered else 0


def check(folder: Path) -> tuple[Progress, int]:
    """How far the training was, and the number of the checkpoint's parts. CheckpointError if any of it is missing."""
    parts, progress, rank = 1, Progress(), 0
    while rank < parts:
        note_file = folder / f"checkpoint_{rank}.json"
        try:
            note = json.loads(note_file.read_text("utf-8"))
            sizes = {name: (folder / name).stat().st_size for name in note["files"]}
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"the checkpoint {folder} is not whole: {error}") from error
        if other := [name for name, size in note["files"].items() if sizes[name] != size]:
            raise CheckpointError(
                f"the checkpoint {folder} is not whole: {other[0]} has {sizes[other[0]]} bytes of {note['files'][other[0]]}"
            )
        if rank == 0:
            parts, progress = note["parts"], Progress(**note["progress"])
        rank += 1
    return progress, parts


def read(folder: Path, parts: int, state: State) -> None:
    """Fill a worker's ``state`` from all ``parts`` of a checkpoint. CheckpointError where names or shapes differ."""
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(folder / f"state_{rank}.safetensors", "pt")) for rank in range(parts)]
        if odd := sorted(set(files[0].keys()) ^ set(state)):
            raise CheckpointError(f"the checkpoint {folder} is another model's: {odd[0]} is in one of the two alone")
        for name, (own, begin, whole) in state.items():
            at, rows = 0, []
            for file in files:
                there = file.get_slice(name)
                number, *width = there.get_shape()
                start, stop = max(begin - at, 0), min(begin + len(own) - at, number)
                if start < stop:
                    rows.append(there[start:stop])
                at += number
            if at != whole or width != list(own.shape[1:]):
                raise CheckpointError(f"the checkpoint {folder} is another model's: {name} has another shape")
            if rows:
                own.copy_(torch.cat(rows))


def read_policies(folder: Path, parts: int, rank: int, workers: int) -> Policies:
    """What one of ``workers`` is to publish again, so that all of them together publish what there was."""
    policies: Policies = defaultdict(list)
    for part in range(rank, parts, workers):
        with safe_open(folder / f"policies_{part}.safetensors", "np") as file:
            groups: dict[tuple[int, int], list[Piece]] = defaultdict(list)
            for key in file.keys():  # noqa: SIM118 - no dict
                version, number, start, parameter = key.split("/", 3)
                groups[int(version), int(number)].append(Piece(parameter, int(start), file.get_tensor(key)))
        for (version, _), pieces in sorted(groups.items()):
            policies[version].append(Chunk(tuple(pieces), checksum(pieces)))
    return policies
