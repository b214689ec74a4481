"""One adapter per model family over diffusers' own classes: encode, grid, velocity, decode.

A checkpoint's own ``model_index.json`` says which family it is of.
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from flowbp_ray.backbones.backbone import Backbone, Encode
from flowbp_ray.backbones.flux1 import FluxBackbone
from flowbp_ray.backbones.flux2 import Flux2KleinBackbone
from flowbp_ray.backbones.sd3 import SD3Backbone
from flowbp_ray.backbones.z_image import ZImageBackbone

FAMILIES: dict[str, type[Backbone]] = {
    family.pipeline_class.__name__: family for family in (SD3Backbone, FluxBackbone, Flux2KleinBackbone, ZImageBackbone)
}


def family_of(source: str | Path, revision: str | None = None) -> type[Backbone]:
    """The family of a pipeline folder or hub id; ValueError if there is no adapter for it."""
    name = DiffusionPipeline.load_config(source, revision=revision)["_class_name"]
    if name not in FAMILIES:
        raise ValueError(f"{source} is a {name}: the families that can be aligned are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def load(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    revision: str | None = None,
    embeds: Encode | None = None,
) -> Backbone:
    """A model with the adapter of its family, without gradients anywhere.

    With ``embeds`` it looks prompts up there and has no text encoders.
    """
    family = family_of(source, revision)
    backbone = family.from_pretrained(source, dtype, device, revision, without=() if embeds is None else family.text_parts())
    backbone.embeds = embeds
    return backbone
