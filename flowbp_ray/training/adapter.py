"""Low-rank adapters on a backbone: bind, read, merge, export as diffusers loads them.

PEFT does the work; what is added is that nothing fails silently. A target that binds no module, a state
that does not fit, and an export without its alpha are errors or cannot happen.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from flowbp_ray.backbones.backbone import Backbone
from flowbp_ray.config import AlignConfig
from flowbp_ray.config.models import adapter_file, bound, check_start
from flowbp_ray.config.surrogates import Surrogate
from flowbp_ray.randomness import seed_of
from flowbp_ray.rollouts.embeds import backbone_of
from flowbp_ray.surrogate.backward import Guidance
from flowbp_ray.training import EXPORT_FILE, NOTE_FILE
from flowbp_ray.training.weights import State, whole


def matching(transformer: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear modules that end in one of ``targets``; ValueError if one of these binds nothing."""
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return bound(linears, targets, type(transformer).__name__)


def trainable(config: AlignConfig, device: str) -> Backbone:
    """The model of a configuration, of train workers and samplers, with what is trained requiring gradients: an adapter, or the
    whole transformer."""
    if config.adapter:
        backbone = adapted(config, device)
    else:
        backbone = backbone_of(config, device)
        backbone.check_guidance(config.sampling.guidance_scale)
        backbone.transformer.requires_grad_(True)
    if config.train.gradient_checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
    if config.cluster.attention:
        backbone.attend(config.cluster.attention)
    if config.cluster.compile:
        backbone.compile()
    return backbone


def adapted(config: AlignConfig, device: str) -> Backbone:
    """The model of a configuration with its trainable adapter: fresh, or the one to start from (with the configured alpha).

    Errors as `config.models.check_start` and `load_export` have them.
    """
    check_start(config)
    backbone = backbone_of(config, device)
    backbone.check_guidance(config.sampling.guidance_scale)
    adapter = config.adapter
    assert adapter is not None
    if adapter.init_from is None:
        targets = backbone.lora_targets(backbone.transformer) if adapter.targets is None else adapter.targets
        seed = seed_of(config.train.seed, 0, 0, "adapter")
        add_adapter(backbone, rank=adapter.rank, alpha=adapter.alpha, targets=targets, seed=seed)
        return backbone
    load_export(backbone, adapter.init_from, alpha=adapter.alpha)
    return backbone


def add_adapter(backbone: Backbone, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> list[str]:
    """Put a fresh adapter on the transformer and make it the only thing that trains; returns the bound modules.

    B starts at zero, so the first rollout is the base's; A is drawn from ``seed``, the same on every worker.
    """
    names = matching(backbone.transformer, targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=names)
        backbone.transformer.add_adapter(config)
    _only_it_trains(backbone.transformer)
    return names


class Factor(nn.Linear):
    """One of an adapter's two matrices: kept in float32, computed in the dtype of what it is given.

    PEFT casts what it is given instead: each activation is copied, kept for the backward in float32, once for every module that
    reads it, and multiplied without tensor cores.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - its name in torch
        """``(…, in)`` to ``(…, out)``."""
        return F.linear(input, self.weight.to(input.dtype))


def _only_it_trains(transformer: nn.Module) -> None:
    """Nothing but the adapter, and that in float32 whatever the base's dtype, which it was made in: bfloat16 would round AdamW's
    steps away. It computes as the base does."""
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _compute_as_given(transformer)


def _compute_as_given(transformer: nn.Module) -> None:
    """Have the adapter's matrices compute as `Factor` does; ValueError for one that is no plain LoRA of linear modules."""
    for name, layer in layers(transformer):
        layer.cast_input_dtype_enabled = False
        for factors in (layer.lora_A, layer.lora_B):
            for adapter, linear in factors.items():
                if type(linear) is not nn.Linear or linear.bias is not None or adapter in layer.lora_variant:
                    raise ValueError(
                        f"the adapter of {name} is no plain LoRA (a convolution, a bias, DoRA): only linear modules with two "
                        "matrices each are trained here"
                    )
                factors[adapter] = factor = Factor(linear.in_features, linear.out_features, bias=False, device="meta")
                factor.weight = linear.weight


def guidance_of(guidance_scale: float, surrogate: Surrogate, backbone: Backbone) -> Guidance:
    """How the backward sees a surrogate's guidance: embedded guidance is inside of the one velocity that there is.

    ValueError for compensating embedded guidance.
    """
    if not backbone.embedded_guidance:
        return Guidance(guidance_scale, surrogate.detach_negative, surrogate.compensate_guidance)
    if surrogate.compensate_guidance:
        raise ValueError(
            f"surrogate.compensate_guidance is true, but guidance is an input of {type(backbone.transformer).__name__} and no "
            "factor of its velocity: set it to false"
        )
    return Guidance()


def parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The adapter's trainable parameters, in a fixed order."""
    return [p for _, p in sorted(transformer.named_parameters()) if p.requires_grad]


def read(transformer: nn.Module) -> State:
    """The adapter's weights, a float32 copy on the CPU, by PEFT's names; of a sharded one every worker has to ask."""
    state = get_peft_model_state_dict(transformer)
    return {k: whole(state[k]).to(torch.float32, copy=True) for k in sorted(state)}


def plain_weights(transformer: nn.Module) -> State | None:
    """A copy of what the adapted modules weigh without the adapter, by module: what `merge` starts from.

    None for a model that is not float32: in its weights small updates would be rounded away.
    """
    if transformer.dtype != torch.float32:
        return None
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers(transformer)}


def merge(transformer: nn.Module, plain: State | None) -> None:
    """Add the adapter to the ``plain`` weights, so that a velocity costs what the base's does; for sampling only.

    It starts from the plain weights every time: taking an adapter out again leaves rounding behind, and pictures would depend
    on what was held before. Without plain weights the adapter stays beside the model's.
    """
    if plain is None:
        return
    for name, layer in layers(transformer):
        layer.merged_adapters.clear()  # no `unmerge`: the plain weights are written over these
        with torch.no_grad():
            layer.get_base_layer().weight.copy_(plain[name])
        layer.merge()


def layers(transformer: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The adapted modules and their names; it walks through all modules."""
    return [(name, module) for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]


@contextlib.contextmanager
def off(adapted: Sequence[tuple[str, LoraLayer]]) -> Iterator[None]:
    """The model without its adapter for a while, as by diffusers' `disable_adapters`, but without a walk through all modules."""
    for _, layer in adapted:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in adapted:
            layer.enable_adapters(True)


def checksum(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes: which adapter this is."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def export(backbone: Backbone, state: Mapping[str, Tensor], folder: Path, *, weights: str, strength: float = 1.0) -> None:
    """Save ``state`` as the folder that ``pipeline.load_lora_weights(folder)`` loads, without this project.

    ``weights`` ("raw" or "ema") is written into the folder's ``adapter.json``. ``strength`` scales what the
    adapter adds: it goes into the alpha, which travels in the file's own metadata (without that, diffusers
    takes the rank for it and the pictures are others). ``adapter.json`` tells it too, so that a training that starts
    from the folder can take it out again.
    """
    from diffusers.training_utils import _collate_lora_metadata  # takes a second to import, and most processes never export

    folder.mkdir(parents=True, exist_ok=True)
    metadata = _collate_lora_metadata({"transformer": backbone.transformer})
    adapter = metadata["transformer_lora_adapter_metadata"]
    adapter["lora_alpha"] = strength * adapter["lora_alpha"]
    adapter["target_modules"] = sorted(adapter["target_modules"])
    backbone.pipeline.save_lora_weights(folder, transformer_lora_layers=dict(state), weight_name=EXPORT_FILE, **metadata)
    note = {"weights": weights, "strength": strength, "rank": adapter["r"], "alpha": adapter["lora_alpha"]}
    (folder / NOTE_FILE).write_text(json.dumps(note | {"checksum": checksum(state)}, indent=1) + "\n")


def load_export(backbone: Backbone, folder: Path, *, alpha: float | None = None) -> State:
    """Load an exported adapter folder (or another one by PEFT's names) as the trainable adapter and return its state.

    ``alpha`` replaces the file's own, which has the export's strength in it. FileNotFoundError if there is no adapter;
    ValueError if it binds nothing, or only in part, which diffusers at most logs.
    """
    pipeline, transformer = backbone.pipeline, backbone.transformer
    given, metadata = pipeline.lora_state_dict(folder, weight_name=adapter_file(folder).name, return_lora_metadata=True)
    if alpha is not None and metadata is not None:
        metadata["transformer.lora_alpha"] = alpha
    # All that load_lora_weights would do to the transformer, but that one takes no metadata.
    more = {"metadata": metadata, "_pipeline": pipeline, "low_cpu_mem_usage": True, **backbone.lora_loading}
    pipeline.load_lora_into_transformer(given, transformer=transformer, adapter_name="default", **more)
    model = type(transformer).__name__
    if "default" not in pipeline.get_list_adapters().get("transformer", []):
        raise ValueError(f"the adapter in {folder} binds nothing of {model}: it is another model's")
    own = {f"transformer.{k}" for k in get_peft_model_state_dict(transformer)}
    if odd := sorted(set(given) ^ own):
        raise ValueError(
            f"the adapter in {folder} does not fit this {model}: {odd[0]!r} is on one side only, of {len(given)} tensors in the "
            f"file and {len(own)} in the model: give the model that it was trained on"
        )
    _only_it_trains(transformer)
    return read(transformer)
