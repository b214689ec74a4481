"""Stable Diffusion 3 and 3.5 (`StableDiffusion3Pipeline`, `SD3Transformer2DModel`): real guidance, two branches."""

import copy

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn

from flowbp_ray.backbones.backbone import Backbone, Conditioning
from flowbp_ray.backbones.grids import GridKind, shifted_grid

#: The linear modules of every model's joint blocks that a LoRA means: attention and both feed-forwards.
LORA_TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{name}.{part}" for name in ("ff", "ff_context") for part in ("net.0.proj", "net.2")),
)
#: Those of the second attention, which only some models have (Stable Diffusion 3.5 medium, in its first blocks).
SECOND_ATTENTION = tuple(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))


class SD3Backbone(Backbone):
    """Latents are the decoder's, ``(B, 16, height/8, width/8)`` (÷4 and 4 channels for the embedded default)."""

    pipeline_class, vae_class = StableDiffusion3Pipeline, AutoencoderKL
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    max_sequence_length = 256

    @torch.no_grad()
    def encode_texts(self, prompts: list[str]) -> Conditioning:
        """``prompt_embeds (B, L, D)`` of all encoders and ``pooled_prompt_embeds (B, P)`` of the CLIPs."""
        t5 = self.pipeline.tokenizer_3
        length = min(t5.model_max_length, self.max_sequence_length) if t5 else self.max_sequence_length
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return Conditioning({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The transformer's own channels."""
        factor = self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels, height // factor, width // factor

    def grid(self, steps: int, height: int, width: int, kind: GridKind = "training") -> Tensor:
        """``linspace(1, 1/steps)`` by the scheduler's static shift, whatever the size.

        The stock pipeline shifts an already shifted minimum and ends elsewhere; give it ``sigmas=linspace(1, 1/steps, steps)``
        for the training grid.
        """
        if kind == "training":
            return shifted_grid(steps, self.pipeline.scheduler.config.shift)
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(steps)
        return scheduler.sigmas.float()

    def branch(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        """One branch; the timestep is 1000·sigma."""
        return self.transformer(
            hidden_states=latents.to(self.dtype),
            encoder_hidden_states=conditioning.tensors["prompt_embeds"],
            pooled_projections=conditioning.tensors["pooled_prompt_embeds"],
            timestep=(sigma * 1000).to(latents.device, torch.float32).expand(len(latents)),
            return_dict=False,
        )[0].float()

    @staticmethod
    def lora_targets(transformer: nn.Module) -> tuple[str, ...]:
        """All that this model has."""
        return LORA_TARGETS + (SECOND_ATTENTION if transformer.config.dual_attention_layers else ())

    @staticmethod
    def blocks(transformer: nn.Module) -> list[nn.Module]:
        """The joint blocks."""
        return list(transformer.transformer_blocks)
