"""What every model family gives to rollouts and surrogates; a family's own file fills in what differs.

Latents, sigmas and sums stay float32 whatever the model's dtype: bfloat16 would round timesteps (750 → 752), which FLUX's
transformers do inside, whoever samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from flowbp_ray.backbones.grids import GridKind

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: tensors by diffusers' names (``prompt_embeds (B, L, D)``, …); the first axis of each is the prompt."""

    tensors: dict[str, Tensor]

    def __getitem__(self, rows: slice) -> "Conditioning":
        return Conditioning({k: v[rows] for k, v in self.tensors.items()})

    def expand(self, number: int) -> "Conditioning":
        """The one row of this conditioning, ``number`` times (without a copy)."""
        return Conditioning({k: v.expand(number, *v.shape[1:]) for k, v in self.tensors.items()})

    def to(self, device: torch.device) -> "Conditioning":
        """There, but for lengths of texts: they stay on the host, which reads them."""
        return Conditioning({k: v.to(device) if v.is_floating_point() else v for k, v in self.tensors.items()})

    def join(self, other: "Conditioning") -> "Conditioning":
        """These prompts, then the other ones."""
        return Conditioning({k: torch.cat([v, other.tensors[k]]) for k, v in self.tensors.items()})


Encode = Callable[[list[str]], Conditioning]


class Backbone(ABC):
    """A pipeline's parts behind the few functions that rollouts and surrogates need."""

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    vae_class: ClassVar[type[Any]]
    #: The pipeline's parts that encode prompts; each has a tokenizer.
    text_encoders: ClassVar[tuple[str, ...]]
    #: Tokens of a text: the stock pipeline's default. A tokenizer that is shorter says so itself.
    max_sequence_length: ClassVar[int]
    #: What this pipeline's `load_lora_into_transformer` wants beside what all of them do.
    lora_loading: ClassVar[dict[str, Any]] = {}
    #: What looks prompts up that were encoded before; None encodes them here.
    embeds: Encode | None = None
    #: What the transformer computes in, where that is not what its weights are kept in.
    compute: torch.dtype | None = None
    #: Whether `velocity` evaluates guidance's two branches in one batch.
    batched_branches: bool = True

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.transformer, self.vae = pipeline.transformer, pipeline.vae

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        revision: str | None = None,
        without: Sequence[str] = (),
    ) -> Self:
        """Load a pipeline folder or hub id, without gradients anywhere, and ``without`` these of its parts."""
        parts = dict.fromkeys(without)
        # Without this, a folder that has no safetensors would have its pickles run.
        pipeline = cls.pipeline_class.from_pretrained(path, dtype=dtype, revision=revision, use_safetensors=True, **parts)
        pipeline = pipeline.to(device)
        for name in ("transformer", "vae", *cls.text_encoders):
            if (part := getattr(pipeline, name)) is not None:
                part.requires_grad_(False).eval()
        return cls(pipeline)

    @classmethod
    def text_parts(cls) -> tuple[str, ...]:
        """The text encoders and their tokenizers."""
        return (*cls.text_encoders, *(name.replace("text_encoder", "tokenizer") for name in cls.text_encoders))

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        # Its own `dtype`, and `device`, walk through all modules, every velocity anew: 3 % of the embedded default's time.
        return self.compute or next(self.transformer.parameters()).dtype

    @property
    def embedded_guidance(self) -> bool:
        """Whether guidance is an input of the transformer, and there is one branch alone (FLUX.1)."""
        return False

    def check_guidance(self, guidance_scale: float) -> None:  # noqa: B027 - most families take any scale
        """ValueError where the checkpoint cannot be guided so."""

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts, without gradient; the empty prompt is the negative one. Errors as `embeds` has, if that is set."""
        if self.embeds is None:
            return self.encode_texts(prompts)
        return self.embeds(prompts).to(self.device)

    @abstractmethod
    def encode_texts(self, prompts: list[str]) -> Conditioning:
        """Encode prompts with all text encoders."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """``(C, h, w)`` of a picture's latent; height and width in pixels."""

    @abstractmethod
    def grid(self, steps: int, height: int, width: int, kind: GridKind = "training") -> Tensor:
        """Sigmas ``(steps + 1,)`` from 1 to 0, float32."""

    @abstractmethod
    def branch(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        """One evaluation of the transformer: the velocity (noise minus data) at ``latents (B, C, h, w)`` and ``sigma`` (a
        scalar), float32, same shape. ``guidance_scale`` matters to embedded guidance alone."""

    @staticmethod
    @abstractmethod
    def lora_targets(transformer: nn.Module) -> tuple[str, ...]:
        """Endings of the names of the modules that an adapter binds unless told otherwise: every attention and feed-forward."""

    @staticmethod
    @abstractmethod
    def blocks(transformer: nn.Module) -> list[nn.Module]:
        """The transformer's stacked blocks in their order: the units of sharding and of gradient checkpointing."""

    def compile(self) -> None:
        """Have torch.compile make kernels of each stacked block when it is first called; blocks of a kind share theirs.

        Each size of a batch has its own, with and without gradient, with and without the adapter: what a process did before,
        such as previews, does not matter to them.
        """
        for block in self.blocks(self.transformer):
            block.compile(backend=_kernels, dynamic=False, recompile_limit=64)

    def attend(self, backend: str) -> None:
        """Have attention computed by one of diffusers' backends. ValueError for a name that it has not, and for a transformer
        whose attention it does not dispatch; RuntimeError for a backend that is not installed."""
        processors = [module.processor for module in self.transformer.modules() if hasattr(module, "processor")]
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            name = type(self.transformer).__name__
            raise ValueError(f"attention {backend}: diffusers has no choice of backends for {name}, so leave it out")
        self.transformer.set_attention_backend(backend)

    @staticmethod
    def latent_channels(vae: Any) -> int:
        """The C of latents that `decode_latents` takes: the decoder's own, unless a family packs them."""
        return vae.config.latent_channels

    @staticmethod
    def decode_latents(vae: Any, latents: Tensor) -> Tensor:
        """Pictures ``(B, 3, height, width)`` in 0…1, differentiable (the clamp's gradient is 0 where it saturates)."""
        return pictures(vae, latents / vae.config.scaling_factor + vae.config.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents, as `decode_latents`."""
        return self.decode_latents(self.vae, latents)

    def initial_latents(self, generators: list[torch.Generator], height: int, width: int) -> Tensor:
        """Pure noise, one generator a sample as diffusers draws it: float32 ``(B, C, h, w)``.

        ValueError for a size that is no whole number of tokens, of 2×2 latents each in every family.
        """
        token = 2 * self.pipeline.vae_scale_factor
        if height % token or width % token:
            raise ValueError(f"pictures of {height}×{width} pixels: this model makes sizes that are multiples of {token}")
        shape = (len(generators), *self.latent_shape(height, width))
        return randn_tensor(shape, generator=generators, device=self.device, dtype=torch.float32)

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        negative: Conditioning | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The guided velocity ``v_neg + guidance_scale·(v_cond − v_neg)`` (or embedded guidance's): float32, as ``latents``.

        With a negative conditioning (one row) and ``guidance_scale`` above 1 there are two branches.
        """
        if negative is None or guidance_scale <= 1 or self.embedded_guidance:
            return self.branch(latents, sigma, conditioning, guidance_scale)
        negatives = negative.expand(len(latents))
        if self.batched_branches:
            both = self.branch(torch.cat([latents, latents]), sigma, negatives.join(conditioning), guidance_scale)
            unconditional, conditional = both.chunk(2)
        else:
            unconditional = self.branch(latents, sigma, negatives, guidance_scale)
            conditional = self.branch(latents, sigma, conditioning, guidance_scale)
        return unconditional + guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def sample_latents(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        steps: int,
        guidance_scale: float,
        height: int,
        width: int,
        kind: GridKind = "training",
    ) -> Tensor:
        """Finished latents ``(B, C, h, w)`` by Euler's method on this grid, one seed a picture; errors as `check_guidance`'s."""
        self.check_guidance(guidance_scale)
        conditioning, negative = self.encode(prompts), self.encode([""])
        latents = self.initial_latents([torch.Generator("cpu").manual_seed(s) for s in seeds], height, width)
        sigmas = self.grid(steps, height, width, kind).to(self.device)
        for sigma, following in pairwise(sigmas):
            latents = latents + (following - sigma) * self.velocity(latents, sigma, conditioning, negative, guidance_scale)
        return latents

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        steps: int,
        guidance_scale: float,
        height: int,
        width: int,
        kind: GridKind = "training",
    ) -> Tensor:
        """Pictures ``(B, 3, height, width)`` in 0…1, decoded from `sample_latents`."""
        size = {"height": height, "width": width}
        return self.decode(self.sample_latents(prompts, seeds, steps=steps, guidance_scale=guidance_scale, kind=kind, **size))


def _kernels(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor's, for blocks that are differentiated twice, as bridged velocities are.

    Backward kernels may write over what they have read unless told not to, and those of one kind that lie on a disk are taken
    for the other's (gradients were wrong by 15 %), so none come from there. torch's settings are each thread's own, hence here.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(donated_buffer=False):
        return compile_fx(graph, inputs, config_patches={"fx_graph_cache": False})


def pictures(vae: Any, latents: Tensor) -> Tensor:
    """The decoder's pictures, from −1…1 to 0…1."""
    return (vae.decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
