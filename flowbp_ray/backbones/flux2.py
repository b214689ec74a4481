"""FLUX.2-Klein-base (`Flux2KleinPipeline`, `Flux2Transformer2DModel`): real guidance, Qwen3 as text encoder."""

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from flowbp_ray.backbones.backbone import Backbone, Conditioning, pictures
from flowbp_ray.backbones.grids import GridKind, dynamic_grid

#: Attention and feed-forwards of the double blocks; the single blocks have one input and one output matrix for both.
LORA_TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{name}.{part}" for name in ("ff", "ff_context") for part in ("linear_in", "linear_out")),
)
SINGLE_BLOCKS = ("attn.to_qkv_mlp_proj", "attn.to_out")


class Flux2KleinBackbone(Backbone):
    """Latents are 2×2 patches of the decoder's, normalised by its batch-norm statistics: ``(B, 128, height/16, width/16)``."""

    pipeline_class, vae_class = Flux2KleinPipeline, AutoencoderKLFlux2
    text_encoders = ("text_encoder",)
    max_sequence_length = 512

    def check_guidance(self, guidance_scale: float) -> None:
        """Distilled checkpoints take none."""
        if guidance_scale > 1 and self.pipeline.config.is_distilled:
            raise ValueError(
                f"sampling.guidance_scale is {guidance_scale:g}, but this checkpoint is distilled to a few steps and takes no "
                "guidance: take the base checkpoint (FLUX.2-klein-base-4B or -9B), or set the scale to 1"
            )

    @torch.no_grad()
    def encode_texts(self, prompts: list[str]) -> Conditioning:
        """``prompt_embeds (B, L, D)``: three of Qwen3's hidden states, joined; padding reaches the transformer unmasked."""
        length = min(self.pipeline.tokenizer.model_max_length, self.max_sequence_length)
        # Hidden states 9, 18 and 27 of Qwen3's, as published; of a shorter encoder as many, evenly.
        number = self.pipeline.text_encoder.config.num_hidden_layers
        layers = (9, 18, 27) if number >= 27 else tuple(round(number * part / 3) for part in (1, 2, 3))
        embeds, _ = self.pipeline.encode_prompt(prompts, max_sequence_length=length, text_encoder_out_layers=layers)
        return Conditioning({"prompt_embeds": embeds})

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The transformer's own channels, a latent a token."""
        factor = 2 * self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels, height // factor, width // factor

    def grid(self, steps: int, height: int, width: int, kind: GridKind = "training") -> Tensor:
        """Shifted by size and number of steps; the stock pipeline's and the training grid are one."""
        _, rows, columns = self.latent_shape(height, width)
        return dynamic_grid(self.pipeline.scheduler, steps, compute_empirical_mu(rows * columns, steps))

    def branch(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        """One branch; position ids are (time, row, column, text place)."""
        number, _, rows, columns = latents.shape
        embeds, device = conditioning.tensors["prompt_embeds"], latents.device

        def ids(*numbers: int) -> Tensor:  # made on the device: a copy to it would wait for all that it has still to do
            places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in numbers))
            return places.expand(number, -1, -1)

        output = self.transformer(
            hidden_states=latents.flatten(2).transpose(1, 2).to(self.dtype),
            timestep=sigma.to(device, torch.float32).expand(number),
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=ids(1, 1, 1, embeds.shape[1]),
            img_ids=ids(1, rows, columns, 1),
            return_dict=False,
        )[0].float()
        return output.transpose(1, 2).unflatten(2, (rows, columns))

    @staticmethod
    def lora_targets(transformer: nn.Module) -> tuple[str, ...]:
        """All that this model has; `attn.to_out` of the single blocks is named one by one, as the double blocks' is a list."""
        numbers = range(transformer.config.num_single_layers)
        return (*LORA_TARGETS, *(f"single_transformer_blocks.{i}.{name}" for i in numbers for name in SINGLE_BLOCKS))

    @staticmethod
    def blocks(transformer: nn.Module) -> list[nn.Module]:
        """Double blocks, then single ones."""
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    @staticmethod
    def latent_channels(vae: Any) -> int:
        """Four of the autoencoder's, of 2×2 patches."""
        return 4 * vae.config.latent_channels

    @staticmethod
    def decode_latents(vae: Any, latents: Tensor) -> Tensor:
        """By the batch norm's statistics, then the patches taken apart."""
        spread = torch.sqrt(vae.bn.running_var.float() + vae.config.batch_norm_eps).view(1, -1, 1, 1)
        return pictures(vae, pixel_shuffle(latents * spread + vae.bn.running_mean.float().view(1, -1, 1, 1), 2))
