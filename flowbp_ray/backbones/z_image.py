"""Z-Image (`ZImagePipeline`, `ZImageTransformer2DModel`): real guidance, Qwen3 as text encoder, texts of any length."""

import torch
from diffusers import AutoencoderKL, ZImagePipeline
from torch import Tensor, nn

from flowbp_ray.backbones.backbone import Backbone, Conditioning
from flowbp_ray.backbones.grids import GridKind, dynamic_grid, shift_by_tokens

LORA_TARGETS = (
    *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
)


class ZImageBackbone(Backbone):
    """Latents are the decoder's, ``(B, 16, height/8, width/8)``.

    Guidance counts as everywhere here, from 1: the stock pipeline's ``guidance_scale`` is this one less 1.
    """

    pipeline_class, vae_class = ZImagePipeline, AutoencoderKL
    text_encoders = ("text_encoder",)
    max_sequence_length = 512

    @torch.no_grad()
    def encode_texts(self, prompts: list[str]) -> Conditioning:
        """``prompt_embeds (B, L, D)``, padded with zeros, and the ``lengths (B,)`` of the texts in them."""
        length = self.max_sequence_length
        texts, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
        padded = torch.zeros(len(texts), length, texts[0].shape[-1], dtype=texts[0].dtype, device=texts[0].device)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = text
        return Conditioning({"prompt_embeds": padded, "lengths": torch.tensor([len(t) for t in texts])})

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The transformer's own channels."""
        factor = 2 * self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels, 2 * (height // factor), 2 * (width // factor)

    def grid(self, steps: int, height: int, width: int, kind: GridKind = "training") -> Tensor:
        """Shifted by the size where the scheduler is dynamic; the stock pipeline's and the training grid are one."""
        _, rows, columns = self.latent_shape(height, width)
        scheduler = self.pipeline.scheduler
        return dynamic_grid(scheduler, steps, shift_by_tokens(scheduler, rows * columns // 4))

    def branch(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        """One branch; the transformer counts time from noise to data, and predicts data minus noise."""
        lengths = conditioning.tensors["lengths"].tolist()
        texts = [row[:length] for row, length in zip(conditioning.tensors["prompt_embeds"], lengths, strict=True)]
        output = self.transformer(
            list(latents.to(self.dtype).unsqueeze(2).unbind()),
            (1 - sigma).to(latents.device, torch.float32).expand(len(latents)),
            texts,
            return_dict=False,
        )[0]
        return -torch.stack([velocity.float() for velocity in output]).squeeze(2)

    @staticmethod
    def lora_targets(transformer: nn.Module) -> tuple[str, ...]:
        """Those of the layers and of both refiners."""
        return LORA_TARGETS

    @staticmethod
    def blocks(transformer: nn.Module) -> list[nn.Module]:
        """Both refiners' layers, then the stacked ones."""
        return [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]
