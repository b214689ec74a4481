"""All weights of a transformer as diffusers saves them, and the whole pipeline around them."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn

from flowbp_ray.training.weights import whole

TRANSFORMER = "transformer"
FILE = "10GB"  # of one file of weights, which the first worker gathers in its memory


def save(transformer: nn.Module, folder: Path, dtype: torch.dtype, rank: int) -> None:
    """Save a transformer, sharded or not, as its class loads it; all workers have to, and the first one writes.

    It gathers one file's worth of weights at a time.
    """
    state = transformer.state_dict()
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in state.items()},
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=FILE,
    )
    if rank == 0:
        transformer.save_config(folder)
    for file, names in plan.filename_to_tensors.items():
        gathered = {}
        for name in names:
            tensor = whole(state[name])
            if rank == 0:
                gathered[name] = tensor.to(dtype).contiguous()
        if rank == 0:
            save_file(gathered, folder / file, metadata={"format": "pt"})
    if rank == 0 and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def complete(source: str, revision: str | None, transformer: Path, folder: Path) -> None:
    """Make ``folder`` a pipeline: all parts of ``source`` (a folder or hub id) but its transformer, which is this one.

    Files are copied as they are, so no part is loaded.
    """
    base = Path(source)
    if not base.is_dir():
        base = Path(DiffusionPipeline.download(source, revision=revision, use_safetensors=True, **{TRANSFORMER: None}))
    shutil.copytree(base, folder, ignore=lambda at, names: {TRANSFORMER} & set(names) if Path(at) == base else set())
    shutil.copytree(transformer, folder / TRANSFORMER)
