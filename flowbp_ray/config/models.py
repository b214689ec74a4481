"""What is wrong with a model's folder or an adapter's, found without loading any of it: names, sizes and headers alone.

Everything here raises ValueError or OSError with one sentence; it answers in a second, and needs no torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowbp_ray.config import paths
from flowbp_ray.config.schema import AlignConfig
from flowbp_ray.training import EXPORT_FILE, NOTE_FILE

#: The pipelines that can be aligned: the names in `flowbp_ray.backbones`, which imports torch.
FAMILIES = ("StableDiffusion3Pipeline", "FluxPipeline", "Flux2KleinPipeline", "ZImagePipeline")
#: Files that may run code when they are read.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: Where diffusers keeps an adapter's alpha and more in a file's metadata.
METADATA = "lora_adapter_metadata"
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit


def check_models(config: AlignConfig) -> None:
    """Look at the model and the adapter to start from, as far as they are on this machine."""
    start = config.adapter.init_from if config.adapter else None
    check_model(config, start)
    if start:
        check_start(config)


def check_model(config: AlignConfig, adapter: Path | None) -> None:
    """Look at the model, and whether an adapter is one of it, if the model is on this machine."""
    source = Path(config.model.source)
    if not source.is_absolute():
        return
    check_pipeline(source, texts=config.prompts.embeds is None)
    check_settings(config, source)
    if config.cluster.attention and _json(source / paths.MODEL_INDEX)["_class_name"] == FAMILIES[0]:
        raise ValueError(f"cluster.attention: diffusers has no choice of backends for a {FAMILIES[0]}; set it to null")
    if adapter:
        check_fits(adapter, source)


def check_pipeline(folder: Path, *, texts: bool = True) -> None:
    """ValueError unless a folder has a pipeline of a family that is known, whole and in safetensors; without ``texts``, whatever
    encodes prompts may be missing."""
    index = _json(folder / paths.MODEL_INDEX)
    if (name := index.get("_class_name")) not in FAMILIES:
        raise ValueError(f"{folder} is a {name}: the families that can be aligned are {', '.join(FAMILIES)}")
    for part, found in index.items():
        if part.startswith("_") or not isinstance(found, list) or found[0] is None:
            continue
        if not texts and part.startswith(("text_encoder", "tokenizer")):
            continue
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no {part}, which its {paths.MODEL_INDEX} names: copy the whole model")
        if part.startswith(("transformer", "vae", "text_encoder")):
            headers(folder / part)


def check_settings(config: AlignConfig, model: Path) -> None:
    """ValueError for sizes, guidance or adapter targets that do not go with a pipeline's model."""
    sampling, adapter = config.sampling, config.adapter
    token = 2 ** len(_json(model / "vae" / "config.json").get("block_out_channels", ()))  # 2×2 latents in every family
    if sampling.height % token or sampling.width % token:
        raise ValueError(
            f"sampling.height and sampling.width are {sampling.height} and {sampling.width}: {model} makes sizes that are "
            f"multiples of {token}"
        )
    if config.surrogate.compensate_guidance and _json(model / paths.MODEL_INDEX)["_class_name"] == FAMILIES[1]:
        raise ValueError(
            f"surrogate.compensate_guidance is true, but guidance is an input of the transformer of a {FAMILIES[1]} and no "
            "factor of its velocity: set it to false"
        )
    shapes = headers(model / "transformer")
    linears = [name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]
    if adapter and adapter.targets:
        bound(linears, adapter.targets, str(model))


def bound(linears: Sequence[str], targets: Sequence[str], model: str) -> list[str]:
    """Those of a model's linear modules whose names end in one of ``targets``; ValueError if one of these binds nothing."""
    found: set[str] = set()
    for target in targets:
        hits = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not hits:
            raise ValueError(
                f"the adapter target {target!r} binds no linear module of {model}; it has, for example, {', '.join(linears[:3])}"
            )
        found.update(hits)
    return sorted(found)


def headers(folder: Path) -> dict[str, list[int]]:
    """The shapes of a model's tensors by name. ValueError unless all of its files are there and whole."""
    _json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        named = {folder / name for name in _json(index).get("weight_map", {}).values()}
        if missing := sorted(named - set(files)):
            raise ValueError(f"{folder} has no {missing[0].name}, which {index.name} names: copy the whole model")
    if not files:
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        what = f"{pickled[0]}, which may run code when it is read" if pickled else "none"
        raise ValueError(f"{folder} has to have its weights in .safetensors, and has {what}: save it with save_pretrained")
    return {name: tensor["shape"] for file in files for name, tensor in header(file)[0].items()}


def header(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata. ValueError if it is none, or cut short."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(size, LARGEST_HEADER):
            raise ValueError(f"{file} is no safetensors file, or cut short: copy it again")
        try:
            tensors: dict[str, Any] = json.loads(opened.read(length))
            metadata = tensors.pop("__metadata__", {})
            end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no safetensors file: copy it again") from error
    if size != 8 + length + end:
        raise ValueError(f"{file} has {size:,} bytes of {8 + length + end:,}: copy it again")
    return tensors, metadata


def check_start(config: AlignConfig) -> None:
    """Whether training can start from ``adapter.init_from``, if that is set: reads no tensors, needs no model.

    FileNotFoundError if there is no adapter; ValueError if it cannot be read, or its rank and alpha are not the configured
    ones. The alpha is that before the export's strength, which ``adapter.json`` tells; an adapter of others has none.
    """
    adapter = config.adapter
    if adapter is None or adapter.init_from is None:
        return
    tensors, metadata = header(adapter_file(adapter.init_from))
    note = adapter.init_from / NOTE_FILE
    try:
        its = json.loads(metadata.get(METADATA, "{}"))
        strength = json.loads(note.read_text(encoding="utf-8"))["strength"] if note.exists() else 1.0
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"the adapter in {adapter.init_from} cannot be read: {error}") from error
    ranks = {tensor["shape"][0] for name, tensor in tensors.items() if "lora_A" in name}
    if len(ranks) != 1 or its.get("transformer.alpha_pattern"):
        raise ValueError(
            f"the adapter in {adapter.init_from} has no one rank and alpha for all its modules (ranks {sorted(ranks)}): "
            "start from one that has"
        )
    (rank,) = ranks
    alpha = its.get("transformer.lora_alpha", rank) / strength  # as diffusers takes it where a file does not tell
    for name, theirs, configured in (("rank", rank, adapter.rank), ("alpha", alpha, adapter.alpha)):
        if not math.isclose(theirs, configured):
            raise ValueError(
                f"the adapter in {adapter.init_from} has {name} {theirs:g}: set adapter.{name}, which is {configured}, to that"
            )


def check_fits(adapter: Path, model: Path) -> None:
    """ValueError unless all of an adapter's modules are in the model's transformer, and of the same widths."""
    check_binds(adapter, headers(model / "transformer"), str(model))


def check_binds(adapter: Path, base: Mapping[str, Sequence[int]], model: str) -> None:
    """ValueError unless a transformer with these shapes by name has all of an adapter's modules, each with both matrices."""
    ranks: dict[str, dict[str, int]] = {}
    for name, tensor in header(adapter_file(adapter))[0].items():
        module, _, matrix = name.removeprefix("transformer.").partition(".lora_")
        shape, own = base.get(f"{module}.weight"), tensor["shape"]
        if shape is None:
            raise ValueError(f"the adapter in {adapter} is another model's: {model} has no {module} in its transformer")
        if not len(own) == len(shape) == 2 or ((own[1] != shape[1]) if matrix.startswith("A") else (own[0] != shape[0])):
            raise ValueError(f"the adapter in {adapter} is another model's: of {module} it has {own}, {model} has {shape}")
        ranks.setdefault(module, {})[matrix[:1]] = own[0] if matrix.startswith("A") else own[1]
    for module, found in ranks.items():
        if found.keys() != {"A", "B"} or found["A"] != found["B"]:
            raise ValueError(f"the adapter in {adapter} is not whole: of {module} it has the ranks {found}; export it again")


def adapter_file(folder: Path) -> Path:
    """An adapter's file of tensors; FileNotFoundError if the folder has none."""
    if not (folder / EXPORT_FILE).exists():
        raise FileNotFoundError(f"no adapter in {folder}: it has no {EXPORT_FILE}")
    return folder / EXPORT_FILE


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file.parent} has no {file.name}: copy the whole model") from error
    except ValueError as error:
        raise ValueError(f"{file} is no JSON, or cut short: copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no JSON object: copy it again")
    return found
