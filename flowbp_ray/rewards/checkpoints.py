"""Published checkpoints that are one file: read without running what is in them, renamed, and loaded whole or not at all."""

import pickle
import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


class Weights(dict[str, Tensor]):
    """Float32 tensors by name. One that is asked for and not there is a ValueError that names the file."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        super().__init__({name: tensor.float() for name, tensor in tensors.items()})
        self.path = path

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"{self.path} is another reward's checkpoint, or none: it has no {name}")

    def under(self, prefix: str, *renamed: tuple[str, str]) -> "Weights":
        """Those whose names begin with ``prefix``, without it, and with every old part of a name changed to the new one."""
        tensors = {}
        for name, tensor in self.items():
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                for old, new in renamed:
                    name = name.replace(old, new)
                tensors[name] = tensor
        return Weights(self.path, tensors)

    def count(self, ending: str) -> int:
        """How many names have this ending: the layers, where each has one."""
        return sum(name.endswith(ending) for name in self)


def read(path: Path, key: str | None = None) -> Weights:
    """The tensors of a file, or those under a ``key`` of it; ValueError if it holds anything else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no file of weights: {str(error).splitlines()[0]}") from error
    if key is not None and isinstance(found, dict):
        found = found.get(key)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} is another reward's checkpoint, or none: it has no {key or 'tensors by name'}")
    return Weights(path, found)


def fill(module: nn.Module, weights: Weights) -> None:
    """Load all weights into all of the module, and freeze it; ValueError where a name or a shape differs."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        what = textwrap.shorten(str(error).partition("\n")[2], 200)
        raise ValueError(f"{weights.path} is another reward's checkpoint, or none: {what}") from error
    module.requires_grad_(False).eval()
