"""Low-rank adapters on a backbone: bind, read, write, average, export as diffusers loads them.

PEFT does the work; what is added is that nothing fails silently. A target that binds no module, a state
that does not fit, and an export without its alpha are errors or cannot happen.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from flowbp_ray.backbones.sd3 import DTYPES, LORA_TARGETS, SD3Backbone
from flowbp_ray.config import AlignConfig
from flowbp_ray.randomness import seed_of

State = dict[str, Tensor]
EXPORT_FILE = "pytorch_lora_weights.safetensors"


def matching(transformer: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear modules that end in one of ``targets``; ValueError if one of these binds nothing."""
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    bound: set[str] = set()
    for target in targets:
        ending = re.compile(rf"(^|\.){re.escape(target)}$")
        hits = [name for name in linears if ending.search(name)]
        if not hits:
            raise ValueError(
                f"the adapter target {target!r} binds no linear module of {type(transformer).__name__}; "
                f"it has, for example, {', '.join(linears[:3])}"
            )
        bound.update(hits)
    return sorted(bound)


def adapted(config: AlignConfig, device: str) -> SD3Backbone:
    """The model of a configuration with its trainable adapter: fresh, or the one to start from (whose alpha is its own).

    ValueError where the rank of that one is not the configured one.
    """
    backbone = SD3Backbone.from_pretrained(config.model.source, DTYPES[config.model.dtype], device, config.model.revision)
    adapter = config.adapter
    if adapter.init_from is None:
        targets = LORA_TARGETS if adapter.targets is None else adapter.targets
        seed = seed_of(config.train.seed, 0, 0, "adapter")
        add_adapter(backbone, rank=adapter.rank, alpha=adapter.alpha, targets=targets, seed=seed)
        return backbone
    load_export(backbone, adapter.init_from)
    rank = backbone.transformer.peft_config["default"].r
    if rank != adapter.rank:
        raise ValueError(
            f"the adapter in {adapter.init_from} has rank {rank}: set adapter.rank, which is {adapter.rank}, to that"
        )
    return backbone


def add_adapter(backbone: SD3Backbone, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> list[str]:
    """Put a fresh adapter on the transformer and make it the only thing that trains; returns the bound modules.

    B starts at zero, so the first rollout is the base's; A is drawn from ``seed``, the same on every worker.
    """
    names = matching(backbone.transformer, targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=names)
        backbone.transformer.add_adapter(config)
    for name, parameter in backbone.transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return names


def parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The adapter's trainable parameters, in a fixed order."""
    return [p for _, p in sorted(transformer.named_parameters()) if p.requires_grad]


def read(transformer: nn.Module) -> State:
    """The adapter's weights, a float32 copy on the CPU, by PEFT's names."""
    state = get_peft_model_state_dict(transformer)
    return {k: state[k].detach().to("cpu", torch.float32, copy=True) for k in sorted(state)}


def write(transformer: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace the adapter's weights; ValueError if the names are not exactly its own."""
    own = set(get_peft_model_state_dict(transformer))
    if own != set(state):
        odd = sorted(own ^ set(state))[0]
        raise ValueError(f"this adapter does not fit: {odd!r} is on one side only, of {len(own)} here and {len(state)} given")
    set_peft_model_state_dict(transformer, dict(state))


def checksum(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes: equal on both sides of a push, or the push failed."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def average(averaged: State, state: Mapping[str, Tensor], decay: float) -> State:
    """One step of the exponential moving average: ``decay·averaged + (1 − decay)·state``."""
    return {k: torch.lerp(state[k], averaged[k], decay) for k in averaged}


def export(backbone: SD3Backbone, state: Mapping[str, Tensor], folder: Path, *, weights: str, strength: float = 1.0) -> None:
    """Save ``state`` as the folder that ``pipeline.load_lora_weights(folder)`` loads, without this project.

    ``weights`` ("raw" or "ema") is written into the folder's ``adapter.json``. ``strength`` scales what the
    adapter adds: it goes into the alpha, which travels in the file's own metadata (without that, diffusers
    takes the rank for it and the pictures are others).
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = _collate_lora_metadata({"transformer": backbone.transformer})
    adapter = metadata["transformer_lora_adapter_metadata"]
    adapter["lora_alpha"] = strength * adapter["lora_alpha"]
    adapter["target_modules"] = sorted(adapter["target_modules"])
    StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=dict(state), weight_name=EXPORT_FILE, **metadata)
    note = {"weights": weights, "strength": strength, "rank": adapter["r"], "alpha": adapter["lora_alpha"]}
    (folder / "adapter.json").write_text(json.dumps(note | {"checksum": checksum(state)}, indent=1) + "\n")


def load_export(backbone: SD3Backbone, folder: Path) -> State:
    """Load an exported (or any diffusers) adapter folder as the trainable adapter and return its state.

    FileNotFoundError if there is none; ValueError if it binds nothing, which diffusers only logs.
    """
    if not (folder / EXPORT_FILE).exists():
        raise FileNotFoundError(f"no adapter in {folder}: it has no {EXPORT_FILE}")
    backbone.pipeline.load_lora_weights(folder, adapter_name="default")
    if "default" not in backbone.pipeline.get_list_adapters().get("transformer", []):
        raise ValueError(f"the adapter in {folder} binds nothing of {type(backbone.transformer).__name__}: it is another model's")
    for name, parameter in backbone.transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return read(backbone.transformer)
