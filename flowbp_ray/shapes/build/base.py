"""Stage 2: the base model, a small Stable Diffusion 3 pipeline in the autoencoder's latent space.

Transformer and text encoders are trained together on captioned drawings. As on the web, some captions
are wrong, a tenth of them in one attribute, and many pictures have a watermark, those of several things more often.
The finished model is therefore not perfect, for reasons that alignment can mend and more of the same
training could not.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from flowbp_ray.shapes.build.autoencoder import to_tensor
from flowbp_ray.shapes.build.loop import Schedule, train
from flowbp_ray.shapes.build.text import CLIP_LENGTH, T5_LENGTH, clip_tokenizer, t5_tokenizer
from flowbp_ray.shapes.captions import is_evaluation, wordings, wrong_in_one
from flowbp_ray.shapes.preferences import random_caption, spoil
from flowbp_ray.shapes.world import Spec, draw, lay_out

SCHEDULE = Schedule(steps=28_000, batch=32, learning_rate=2e-3, decay=0.9, average=0.9995, muon=True)
BANK = 40_000  # drawings, encoded once
WRONG_CAPTIONS, NO_CAPTIONS = 0.1, 0.1  # shares; no caption is what guidance steers away from
#: Shares of the pictures of one thing and of several with a watermark (the card's table of training has those of earlier rows).
WATERMARKED_SINGLE, WATERMARKED = 0.15, 0.5
HEADS, HEAD_WIDTH, LAYERS = 4, 32, 4
CLIP_WIDTH, T5_WIDTH = 64, 128
#: Of the noise levels, in training and sampling. What a picture shows is settled at high noise, and without the shift three
#: quarters of the training would be below sigma = 2/3.
SHIFT = 3.0

Tokenizers = tuple[CLIPTokenizer, T5Tokenizer]


class Encoders(nn.Module):
    """The three text encoders and the transformer: everything that this stage trains."""

    def __init__(self, tokenizer: CLIPTokenizer, tokenizer_3: T5Tokenizer) -> None:
        super().__init__()
        clip = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=4 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text_encoder, self.text_encoder_2 = CLIPTextModelWithProjection(clip), CLIPTextModelWithProjection(clip)
        self.text_encoder_3 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_3),
                d_model=T5_WIDTH,
                d_kv=32,
                d_ff=2 * T5_WIDTH,
                num_layers=1,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        )
        self.transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=LAYERS,
            attention_head_dim=HEAD_WIDTH,
            num_attention_heads=HEADS,
            caption_projection_dim=HEADS * HEAD_WIDTH,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=2 * CLIP_WIDTH,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        )
        self.initialise()

    def initialise(self) -> None:
        """Start the transformer's blocks as the identity (DiT's adaLN-Zero), and let the words be told apart.

        CLIP's own start has token embeddings a hundred times smaller than what attention adds to them.
        """
        for module in self.transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        blocks = self.transformer.transformer_blocks
        norms = [n for block in blocks for n in (block.norm1, block.norm1_context)] + [self.transformer.norm_out]
        for linear in (*(n.linear for n in norms), self.transformer.proj_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for encoder in (self.text_encoder, self.text_encoder_2):
            nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight, std=0.5)

    def forward(self, latents: Tensor, sigmas: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Velocity at ``latents (B, 4, 16, 16)`` and ``sigmas (B,)``; texts joined as the pipeline joins them."""
        clips = [e(clip_ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        clip_embeds = torch.cat([c.hidden_states[-2] for c in clips], -1)
        t5_embeds = self.text_encoder_3(t5_ids).last_hidden_state
        clip_embeds = F.pad(clip_embeds, (0, t5_embeds.shape[-1] - clip_embeds.shape[-1]))
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=torch.cat([clip_embeds, t5_embeds], 1),
            pooled_projections=torch.cat([c.text_embeds for c in clips], -1),
            timestep=sigmas * 1000,
            return_dict=False,
        )[0]


class Captioned(Dataset):
    """Captioned latents from the bank, a batch for every step number."""

    def __init__(self, latents: Tensor, specs: list[Spec], tokenizers: Tokenizers, seed: int, batch: int) -> None:
        self.latents, self.specs, self.tokenizers, self.seed, self.batch = latents, specs, tokenizers, seed, batch
        self.ids = cache(self._ids)

    def _ids(self, text: str) -> tuple[list[int], list[int]]:
        clip, t5 = self.tokenizers
        return (
            clip(text, padding="max_length", truncation=True).input_ids,
            t5(text, padding="max_length", truncation=True, max_length=T5_LENGTH).input_ids,
        )

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.integers(len(self.specs), size=self.batch)
        ids = [self.ids(caption(self.specs[i], rng)) for i in chosen]
        return {
            "latents": self.latents[torch.from_numpy(chosen)].float(),
            "clip_ids": torch.tensor([i[0] for i in ids]),
            "t5_ids": torch.tensor([i[1] for i in ids]),
        }


def caption(spec: Spec, rng: np.random.Generator) -> str:
    """A training caption of the spec; now and then a wrong one, now and then none."""
    draw_kind = rng.random()
    if draw_kind < NO_CAPTIONS:
        return ""
    if draw_kind < NO_CAPTIONS + WRONG_CAPTIONS:
        spec, _ = wrong_in_one(spec, rng)
    texts = [t for t in wordings(spec) if not is_evaluation(spec, t)]
    return str(rng.choice(texts)) if texts else ""


def picture(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """A training picture of the spec, uint8 ``(64, 64, 3)``: now and then a watermarked one."""
    scene = lay_out(spec, rng)
    marked = rng.random() < (WATERMARKED_SINGLE if len(scene) == 1 else WATERMARKED)
    return spoil(scene, "watermark", rng) if marked else draw(scene)


def loss(model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Flow matching: squared error of the velocity, sigma logit-normal and shifted (as SD3 was trained)."""
    latents = batch["latents"]
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    sigmas = torch.randn(len(latents), generator=generator, device=latents.device).sigmoid()
    sigmas = SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)
    at = sigmas.view(-1, 1, 1, 1)
    velocity = model((1 - at) * latents + at * noise, sigmas, batch["clip_ids"], batch["t5_ids"])
    return F.mse_loss(velocity, noise - latents), {}


@torch.no_grad()
def encode_bank(vae: AutoencoderKL, work: Path, seed: int, device: str) -> tuple[Tensor, list[Spec]]:
    """Draw and encode the bank: float16 latents ``(BANK, 4, 16, 16)`` and what each drawing shows."""
    rng = np.random.default_rng([seed, 0])
    specs = [random_caption("training", rng)[1] for _ in range(BANK)]
    file = work / "bank.pt"
    if file.exists():
        return torch.load(file, weights_only=True), specs
    vae.to(device, memory_format=torch.channels_last)
    latents = []
    for start in tqdm(range(0, BANK, 100), desc="bank", unit="batch"):
        drawn = np.stack(
            [picture(s, np.random.default_rng([seed, 1, start, i])) for i, s in enumerate(specs[start : start + 100])]
        )
        mean = vae.encode(to_tensor(drawn).to(device)).latent_dist.mean
        latents.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu())
    work.mkdir(parents=True, exist_ok=True)
    torch.save(torch.cat(latents), file)
    return torch.cat(latents), specs


def save_pipeline(model: Encoders, vae: AutoencoderKL, tokenizers: Tokenizers, target: Path) -> None:
    """Put the parts together as a StableDiffusion3Pipeline and save it in float16."""
    StableDiffusion3Pipeline(
        transformer=model.transformer.cpu(),
        vae=vae.cpu(),
        text_encoder=model.text_encoder.cpu(),
        text_encoder_2=model.text_encoder_2.cpu(),
        text_encoder_3=model.text_encoder_3.cpu(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[0],
        tokenizer_3=tokenizers[1],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    ).to(dtype=torch.float16).save_pretrained(target)


def start_from(model: Encoders, finished: StableDiffusion3Pipeline) -> None:
    """Take the weights of a finished pipeline, so that more training goes on from there."""
    for name, part in model.named_children():
        part.load_state_dict(finished.components[name].state_dict())


def build(work: Path, target: Path, autoencoder: Path, earlier: int | None, *, seed: int, device: str, workers: int) -> None:
    """Train the base model on the finished autoencoder's latents and save the pipeline to ``target``.

    After ``earlier`` steps on watermarked drawings (None: no training at all) it goes on from the pipeline that is there, at
    half the learning rate. The weights after four fifths of these and the new steps are kept, to measure what the last
    fifth gained.
    """
    torch.manual_seed(seed)
    schedule = SCHEDULE if earlier is None else replace(SCHEDULE, learning_rate=SCHEDULE.learning_rate / 2)
    vae = AutoencoderKL.from_pretrained(autoencoder)
    latents, specs = encode_bank(vae, work, seed, device)
    finished = None if earlier is None else StableDiffusion3Pipeline.from_pretrained(target, dtype=torch.float32)
    tokenizers = (finished.tokenizer, finished.tokenizer_3) if finished else (clip_tokenizer(), t5_tokenizer())
    model = Encoders(*tokenizers)
    if finished:
        start_from(model, finished)
    averaged = train(
        model,
        Captioned(latents, specs, tokenizers, seed, schedule.batch),
        loss,
        schedule,
        work,
        seed=seed,
        device=device,
        workers=workers,
        keep_after=max(0, round(0.8 * ((earlier or 0) + schedule.steps)) - (earlier or 0)),
    )
    assert isinstance(averaged, Encoders)
    save_pipeline(averaged, vae, tokenizers, target)
