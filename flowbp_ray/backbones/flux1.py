"""FLUX.1-dev (`FluxPipeline`, `FluxTransformer2DModel`): guidance is an input of the transformer, one branch."""

from typing import ClassVar

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from flowbp_ray.backbones.backbone import Backbone, Conditioning
from flowbp_ray.backbones.grids import GridKind, dynamic_grid, shift_by_tokens

#: Attention and feed-forwards of the double blocks, then those of the single blocks, whose feed-forward is `proj_mlp` and, with
#: the attention's output in one, `proj_out`.
LORA_TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{name}.{part}" for name in ("ff", "ff_context") for part in ("net.0.proj", "net.2")),
)
SINGLE_BLOCKS = ("proj_mlp", "proj_out")


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """Ids ``(height · width, 3)`` of the tokens of a picture of so many rows and columns of tokens.

    They are made on the device: a copy to it, in each velocity, would wait for all that it has still to do.
    """
    return torch.cartesian_prod(*(torch.arange(number, device=device) for number in (1, height, width))).float()


class FluxBackbone(Backbone):
    """Latents are the decoder's, ``(B, 16, height/8, width/8)``; they are packed for the transformer here alone."""

    pipeline_class, vae_class = FluxPipeline, AutoencoderKL
    text_encoders = ("text_encoder", "text_encoder_2")
    max_sequence_length = 512
    lora_loading: ClassVar = {"network_alphas": None}

    @property
    def embedded_guidance(self) -> bool:
        """There is no second branch."""
        return True

    def check_guidance(self, guidance_scale: float) -> None:
        """FLUX.1-schnell has no guidance, not even as an input."""
        if guidance_scale > 1 and not self.transformer.config.guidance_embeds:
            raise ValueError(
                f"sampling.guidance_scale is {guidance_scale:g}, but this model was distilled to a few steps without guidance "
                "(its transformer has no guidance_embeds): set it to 1, or take FLUX.1-dev"
            )

    @torch.no_grad()
    def encode_texts(self, prompts: list[str]) -> Conditioning:
        """``prompt_embeds (B, L, D)`` of T5 and ``pooled_prompt_embeds (B, P)`` of CLIP."""
        length = min(self.pipeline.tokenizer_2.model_max_length, self.max_sequence_length)
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, None, max_sequence_length=length)
        return Conditioning({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """A quarter of the transformer's channels, which are of 2×2 packed latents."""
        factor = 2 * self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels // 4, 2 * (height // factor), 2 * (width // factor)

    def grid(self, steps: int, height: int, width: int, kind: GridKind = "training") -> Tensor:
        """Shifted by the size; the stock pipeline's and the training grid are one."""
        _, rows, columns = self.latent_shape(height, width)
        scheduler = self.pipeline.scheduler
        return dynamic_grid(scheduler, steps, shift_by_tokens(scheduler, rows * columns // 4))

    def branch(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        """The one branch, at the embedded guidance."""
        number, rows, columns = len(latents), latents.shape[2] // 2, latents.shape[3] // 2
        embeds, device = conditioning.tensors["prompt_embeds"], latents.device
        guidance = torch.full([number], guidance_scale, device=device) if self.transformer.config.guidance_embeds else None
        output = self.transformer(
            hidden_states=pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).to(self.dtype),
            timestep=sigma.to(device, torch.float32).expand(number),
            guidance=guidance,
            pooled_projections=conditioning.tensors["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device),
            img_ids=positions(rows, columns, device),
            return_dict=False,
        )[0].float()
        return pixel_shuffle(output.transpose(1, 2).unflatten(2, (rows, columns)), 2)

    @staticmethod
    def lora_targets(transformer: nn.Module) -> tuple[str, ...]:
        """All that this model has."""
        numbers = range(transformer.config.num_single_layers)
        return (*LORA_TARGETS, *(f"single_transformer_blocks.{i}.{name}" for i in numbers for name in SINGLE_BLOCKS))

    @staticmethod
    def blocks(transformer: nn.Module) -> list[nn.Module]:
        """Double blocks, then single ones."""
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
