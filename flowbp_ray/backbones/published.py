"""The published backbones' transformer configurations, so that full-size models can be built without their checkpoints."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from flowbp_ray.backbones.backbone import Backbone
from flowbp_ray.backbones.flux1 import FluxBackbone
from flowbp_ray.backbones.flux2 import Flux2KleinBackbone
from flowbp_ray.backbones.sd3 import SD3Backbone


@dataclass(frozen=True)
class Published:
    """A checkpoint's id, its family, its transformer class in diffusers with configuration, and the transformer's parameters."""

    id: str
    family: type[Backbone]
    transformer: str
    config: dict[str, Any]
    parameters: int

    def build(self) -> nn.Module:
        """The transformer, with random weights on the current default device; on ``meta`` it costs nothing."""
        import diffusers

        made: nn.Module = getattr(diffusers, self.transformer)(**self.config)
        return made


#: By the names of their recipes' folders; configurations and sizes from the checkpoints' own files.
PUBLISHED = {
    "sd35": Published(
        "stabilityai/stable-diffusion-3.5-medium",
        SD3Backbone,
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        2_243_171_520,
    ),
    "flux1": Published(
        "black-forest-labs/FLUX.1-dev",
        FluxBackbone,
        "FluxTransformer2DModel",
        {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "guidance_embeds": True},
        11_901_408_320,
    ),
    "flux2": Published(
        "black-forest-labs/FLUX.2-klein-base-9B",
        Flux2KleinBackbone,
        "Flux2Transformer2DModel",
        {
            "in_channels": 128,
            "num_layers": 8,
            "num_single_layers": 24,
            "attention_head_dim": 128,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
        9_078_581_248,
    ),
}
