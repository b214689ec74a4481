"""The published backbones' transformer configurations, so that full-size models can be built without their checkpoints."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flowbp_ray.backbones.backbone import Backbone
from flowbp_ray.backbones.flux1 import FluxBackbone
from flowbp_ray.backbones.flux2 import Flux2KleinBackbone
from flowbp_ray.backbones.sd3 import SD3Backbone


@dataclass(frozen=True)
class Published:
    """A checkpoint's id, its family, its transformer class in diffusers with configuration, and the transformer's parameters;
    then what the transformer is given, and the configurations of the parts around it."""

    id: str
    family: type[Backbone]
    transformer: str
    config: dict[str, Any]
    parameters: int
    #: By diffusers' names, shapes of one prompt's embeddings.
    text: dict[str, tuple[int, ...]]
    guidance_scale: float
    scheduler: dict[str, Any]
    vae: dict[str, Any]

    def build(self) -> nn.Module:
        """The transformer, with random weights on the current default device; on ``meta`` it costs nothing."""
        import diffusers

        made: nn.Module = getattr(diffusers, self.transformer)(**self.config)
        return made

    def backbone(self, device: str, dtype: torch.dtype) -> Backbone:
        """The transformer in its family, with random weights and without gradients; no text encoders, no VAE."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # in float32 first, a model might not fit
        try:
            with torch.device(device):
                transformer = self.build().to(dtype).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(before)
        absent = dict.fromkeys(("vae", *self.family.text_parts()))
        scheduler = FlowMatchEulerDiscreteScheduler(**self.scheduler)
        return self.family(self.family.pipeline_class(transformer=transformer, scheduler=scheduler, **absent))


#: The autoencoder of both Stable Diffusion 3.5 and FLUX.1, but for the spread of latents; FLUX.2's is its class's default.
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

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
        {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)},
        3.5,
        {"shift": 3.0},
        VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    ),
    "flux1": Published(
        "black-forest-labs/FLUX.1-dev",
        FluxBackbone,
        "FluxTransformer2DModel",
        {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "guidance_embeds": True},
        11_901_408_320,
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
        4.0,
        {"shift": 3.0, "use_dynamic_shifting": True},
        VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
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
        {"prompt_embeds": (512, 12288)},
        4.0,
        {"shift": 3.0, "use_dynamic_shifting": True},
        {},
    ),
}
