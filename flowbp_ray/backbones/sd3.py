"""Stable Diffusion 3 and 3.5 (`StableDiffusion3Pipeline`, `SD3Transformer2DModel`): real guidance, two branches."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

#: The linear modules of every model's joint blocks that a LoRA means: attention and both feed-forwards.
LORA_TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{name}.{part}" for name in ("ff", "ff_context") for part in ("net.0.proj", "net.2")),
)
#: Those of the second attention, which only some models have (Stable Diffusion 3.5 medium, in its first blocks).
SECOND_ATTENTION = tuple(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
T5_TOKENS = 256  # the stock pipeline's default; a tokenizer that is shorter says so itself


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: ``prompt_embeds (B, L, D)`` and ``pooled_prompt_embeds (B, P)``."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor

    def expand(self, number: int) -> Self:
        """The one row of this conditioning, ``number`` times (without a copy)."""
        return type(self)(self.prompt_embeds.expand(number, -1, -1), self.pooled_prompt_embeds.expand(number, -1))


def shifted_grid(steps: int, shift: float) -> Tensor:
    """``linspace(1, 1/steps)`` shifted by a static shift, then 0: float32 ``(steps + 1,)``."""
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    return torch.cat([shift * sigmas / (1 + (shift - 1) * sigmas), torch.zeros(1)]).float()


def lora_targets(transformer: SD3Transformer2DModel) -> tuple[str, ...]:
    """Endings of the names of the modules that an adapter binds unless told otherwise: all that this model has."""
    return LORA_TARGETS + (SECOND_ATTENTION if transformer.config.dual_attention_layers else ())


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures ``(B, 3, height, width)`` in 0…1, differentiable (the clamp's gradient is 0 where it saturates)."""
    scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(scaled.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)


class SD3Backbone:
    """A pipeline's parts behind the few functions that rollouts and surrogates need.

    Latents, sigmas and sums stay float32 whatever the model's dtype: bf16 would round timesteps (750 → 752).
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline) -> None:
        self.pipeline = pipeline
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.max_sequence_length = min(pipeline.tokenizer_3.model_max_length, T5_TOKENS) if pipeline.tokenizer_3 else T5_TOKENS

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu", revision: str | None = None
    ) -> Self:
        """Load a pipeline folder or hub id, without gradients anywhere."""
        pipeline = StableDiffusion3Pipeline.from_pretrained(path, dtype=dtype, revision=revision).to(device)
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            if (part := getattr(pipeline, name)) is not None:
                part.requires_grad_(False).eval()
        return cls(pipeline)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.device

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts with all text encoders; the empty prompt is the negative one."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return Conditioning(embeds, pooled)

    def initial_latents(self, generators: list[torch.Generator], height: int, width: int) -> Tensor:
        """Pure noise, one generator a sample as diffusers draws it: float32 ``(B, C, height/8, width/8)``
        (÷4 for the embedded default; the pipeline knows its factor)."""
        factor = self.pipeline.vae_scale_factor
        shape = (len(generators), self.transformer.config.in_channels, height // factor, width // factor)
        return randn_tensor(shape, generator=generators, device=self.device, dtype=torch.float32)

    def grid(self, steps: int) -> Tensor:
        """Sigmas ``(steps + 1,)`` from 1 to 0: ``linspace(1, 1/steps)``, shifted by the scheduler's static shift.

        The published training grid. The stock pipeline without ``sigmas`` shifts an already shifted minimum
        and ends elsewhere; give it ``sigmas=linspace(1, 1/steps, steps)`` for this one.
        """
        return shifted_grid(steps, self.pipeline.scheduler.config.shift)

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        negative: Conditioning | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Velocity (noise minus data) at ``latents (B, C, H, W)`` and ``sigma`` (a scalar): float32, same shape.

        With a negative conditioning (one row) and ``guidance_scale`` above 1 both branches run as one batch.
        """
        embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
        inputs = latents
        guided = negative is not None and guidance_scale > 1
        if negative is not None and guidance_scale > 1:
            inputs = torch.cat([latents, latents])
            both = negative.expand(len(latents))
            embeds = torch.cat([both.prompt_embeds, embeds])
            pooled = torch.cat([both.pooled_prompt_embeds, pooled])
        output = self.transformer(
            hidden_states=inputs.to(self.transformer.dtype),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=(sigma * 1000).to(latents.device, torch.float32).expand(len(inputs)),
            return_dict=False,
        )[0].float()
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents, as the function `decode`."""
        return decode(self.vae, latents)

    @torch.no_grad()
    def sample_latents(
        self, prompts: list[str], seeds: list[int], *, steps: int, guidance_scale: float, height: int, width: int
    ) -> Tensor:
        """Finished latents ``(B, C, h, w)`` by Euler's method on this grid, one seed a picture."""
        conditioning, negative = self.encode(prompts), self.encode([""])
        latents = self.initial_latents([torch.Generator("cpu").manual_seed(s) for s in seeds], height, width)
        sigmas = self.grid(steps).to(self.device)
        for sigma, following in pairwise(sigmas):
            latents = latents + (following - sigma) * self.velocity(latents, sigma, conditioning, negative, guidance_scale)
        return latents

    @torch.no_grad()
    def sample(
        self, prompts: list[str], seeds: list[int], *, steps: int, guidance_scale: float, height: int, width: int
    ) -> Tensor:
        """Pictures ``(B, 3, height, width)`` in 0…1, decoded from `sample_latents`."""
        return self.decode(
            self.sample_latents(prompts, seeds, steps=steps, guidance_scale=guidance_scale, height=height, width=width)
        )
