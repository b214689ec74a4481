"""Prompts that were encoded once: a folder of Parquet files, and ``encoder.json``, which says whose embeddings they are.

A row group is one prompt, so that it is read without its neighbours: a column of raw bytes for each of the conditioning's
tensors (Parquet knows no bfloat16), whose types and shapes are in the file's metadata.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from flowbp_ray import backbones
from flowbp_ray.backbones.backbone import DTYPES, Backbone, Conditioning
from flowbp_ray.config import AlignConfig
from flowbp_ray.files import digest, replace_text
from flowbp_ray.rollouts.prompts import read_prompts

ENCODER_FILE = "encoder.json"
COMMAND = "python -m pipelines.encode_prompts"
#: The weights that are loaded, where a folder has other formats and variants of them too.
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")

#: What makes embeddings what they are: pipeline class, dtype, maximal sequence length, and the SHA-256 of files by their path.
Identity = dict[str, str]


class Embeds:
    """The embeddings in ``folder``; a call gives those of some prompts, in their order and on the CPU.

    ValueError if ``encoder.json`` is not there or broken; from a call for a prompt that is not among them, or a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: By prompt, its file and row group there.
        self.places: dict[str, tuple[Path, int]] = {}
        #: Files that are not whole: nothing of them is taken.
        self.torn: list[Path] = []
        try:
            self.encoder: Identity = json.loads((folder / ENCODER_FILE).read_text(encoding="utf-8"))["encoder"]
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} has no {ENCODER_FILE} that can be read, so no embeddings: name a folder that {COMMAND} made, or give "
                "it a new one to make"
            ) from error
        for file in sorted(folder.glob("*.parquet")):
            if (prompts := prompts_of(file)) is None:
                self.torn.append(file)
            else:
                self.places |= {prompt: (file, row) for row, prompt in enumerate(prompts)}

    def __call__(self, prompts: list[str]) -> Conditioning:
        """Read from the disk at every call: embeddings of many prompts are more than memory."""
        rows = [self._row(prompt) for prompt in prompts]
        return Conditioning({name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those that are not among them."""
        return [p for p in prompts if p not in self.places]

    def lacking(self, missing: list[str]) -> str:
        """The sentence about prompts that are not among them."""
        more = f", nor are {len(missing) - 1:,} others" if len(missing) > 1 else ""
        return (
            f"the prompt {missing[0]!r} is not among the {len(self.places):,} in {self.folder}{more}: add what is missing with "
            f"{COMMAND}, this configuration and --output {self.folder}"
        )

    def check(self, encoder: Identity) -> None:
        """ValueError unless these embeddings were made by this encoder. Files are compared only if ``encoder`` names any."""
        made = {k: v for k, v in self.encoder.items() if "/" not in k or any("/" in name for name in encoder)}
        for name in sorted(made | encoder, key=lambda name: "/" in name):
            if made.get(name) != encoder.get(name):
                what = f"{name} is {made.get(name)} there and {encoder.get(name)} here"
                if "/" in name:
                    what = f"the file {name} is not the same"
                raise ValueError(
                    f"the embeddings in {self.folder} are of another encoder than this configuration's: {what}. Set "
                    f"prompts.embeds to null, or let {COMMAND} fill another folder"
                )

    def _row(self, prompt: str) -> dict[str, Tensor]:
        import pyarrow as pa
        from pyarrow import parquet

        if prompt not in self.places:
            raise ValueError(self.lacking([prompt]))
        file, row = self.places[prompt]
        try:
            with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
                kinds = json.loads(opened.schema_arrow.metadata[b"tensors"])
                (values,) = opened.read_row_group(row, columns=list(kinds)).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}; remove it, and let {COMMAND} make it again") from error
        return {
            name: torch.frombuffer(bytearray(values[name]), dtype=getattr(torch, kind["dtype"])).reshape(kind["shape"])
            for name, kind in kinds.items()
        }


def prompts_of(file: Path) -> list[str] | None:
    """The prompts of a whole file, in their order; None of a torn one. OSError if it cannot be read."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            prompts: list[str] = opened.read(columns=["prompt"])["prompt"].to_pylist()
    except pa.ArrowInvalid:
        return None
    except OSError as error:
        if error.errno is not None:  # the system's, and not Arrow's: no permission, no such disk
            raise
        return None
    return prompts


def write(folder: Path, prompts: list[str], conditioning: Conditioning) -> None:
    """Add a file with these prompts; whenever this is interrupted, it is there whole or not at all."""
    import pyarrow as pa
    from pyarrow import parquet

    tensors = {name: tensor.cpu().contiguous() for name, tensor in conditioning.tensors.items()}
    columns = {k: [row.reshape(-1).view(torch.uint8).numpy().tobytes() for row in v] for k, v in tensors.items()}
    kinds = {k: {"dtype": str(v.dtype).removeprefix("torch."), "shape": v.shape[1:]} for k, v in tensors.items()}
    table = pa.table({"prompt": prompts, **columns}).replace_schema_metadata({"tensors": json.dumps(kinds)})
    # The same prompts have the same name: whoever is killed and starts again leaves nothing behind.
    file = folder / f"{hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]}.parquet"
    unfinished = file.with_suffix(".tmp")
    parquet.write_table(table, unfinished, row_group_size=1, use_dictionary=False, write_page_checksum=True)
    unfinished.replace(file)


def wanted(config: AlignConfig) -> list[str]:
    """All prompts that an alignment asks for, each once: training's, the evaluation's and previews', and the negative one."""
    from flowbp_ray.rollouts.prompts import pictured

    settings = config.evaluation
    asked = [pictured(config), pictured(config, settings.preview_prompts)]  # previews are of the first of a task
    rows = [row["prompt"] for tasks in asked for task in tasks.values() for row in task]
    return list(dict.fromkeys([*read_prompts(config.prompts), *rows, ""]))


def encoder_of(config: AlignConfig) -> Identity:
    """What the configured model says of its encoder, without its files."""
    family = backbones.family_of(config.model.source, config.model.revision)
    length = str(family.max_sequence_length)
    return {"pipeline": family.pipeline_class.__name__, "dtype": config.model.dtype, "max_sequence_length": length}


def whole_encoder_of(config: AlignConfig) -> Identity:
    """With all that text encoders and tokenizers are made of: the files are read, and of a hub id got first."""
    model, family = config.model, backbones.family_of(config.model.source, config.model.revision)
    folder, encoder = Path(model.source), encoder_of(config)
    if not folder.is_dir():
        folder = Path(family.pipeline_class.download(model.source, revision=model.revision, transformer=None, vae=None))
    for part in family.text_parts():
        files = sorted(f for f in (folder / part).glob("*") if f.is_file())
        if any(WEIGHTS.fullmatch(f.name) for f in files):
            files = [f for f in files if f.name == "config.json" or WEIGHTS.fullmatch(f.name)]
        for file in files:
            encoder[f"{part}/{file.name}"] = _sha256(file, file.stat().st_size, file.stat().st_mtime_ns)
    return encoder


@functools.lru_cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """Of a file's bytes, which are read once a process while size and time of change are the same."""
    return digest(file)


def start(config: AlignConfig, folder: Path) -> Embeds:
    """Make ``folder`` ready for this configuration's embeddings: new, or begun by the same encoder, without torn files.

    ValueError if it is another encoder's, or has files that are no embeddings.
    """
    encoder, file = whole_encoder_of(config), folder / ENCODER_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if all(f.suffix == ".tmp" for f in folder.iterdir()):
        about = {"encoder": encoder, "source": config.model.source, "revision": config.model.revision}
        replace_text(file, json.dumps(about, indent=1) + "\n")
    embeds = Embeds(folder)
    embeds.check(encoder)
    for torn in embeds.torn:
        torn.unlink()
    return embeds


def check(config: AlignConfig) -> None:
    """ValueError unless ``prompts.embeds``, if that is set, are of the model's text encoders, whose files are read, and have all
    prompts of the configuration."""
    if (embeds := opened(config)) is None:
        return
    embeds.check(whole_encoder_of(config))
    if missing := embeds.missing(wanted(config)):
        raise ValueError(embeds.lacking(missing))


def opened(config: AlignConfig) -> Embeds | None:
    """The configured embeddings, if there are any. ValueError as `Embeds` has it, or if a file is torn, or if they are of another
    encoder, as far as that shows without its files: these need not be here, and `check` reads them once a run."""
    if config.prompts.embeds is None:
        return None
    embeds = Embeds(config.prompts.embeds)
    embeds.check(encoder_of(config))
    if embeds.torn:
        raise ValueError(f"{embeds.torn[0]} is not whole: let {COMMAND} make it again, with --output {embeds.folder}")
    return embeds


def backbone_of(config: AlignConfig, device: str, exported: Path | None = None) -> Backbone:
    """The model of a configuration, or a pipeline that was made of it, without gradients anywhere; with ``prompts.embeds`` it has
    no text encoders."""
    source, revision = (config.model.source, config.model.revision) if exported is None else (exported, None)
    backbone = backbones.load(source, DTYPES[config.model.dtype], device, revision, opened(config))
    backbone.batched_branches = config.sampling.batched_branches
    return backbone
