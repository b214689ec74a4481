"""Stage 1: the autoencoder. 64×64×3 pictures to 16×16×4 latents, diffusers' own AutoencoderKL."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from flowbp_ray.shapes.build.loop import Schedule, train
from flowbp_ray.shapes.preferences import random_caption
from flowbp_ray.shapes.world import draw, lay_out

SCHEDULE = Schedule(steps=3600, batch=8, learning_rate=2e-3, decay=0.5)
KL_WEIGHT = 1e-4  # of the mean divergence per latent, against a mean absolute error: keeps latents smooth


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 pictures ``(B, 64, 64, 3)`` as float32 ``(B, 3, 64, 64)`` in −1…1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


class Pictures(Dataset):
    """Fresh drawings of random training captions, a batch for every step number."""

    def __init__(self, seed: int, batch: int) -> None:
        self.seed, self.batch = seed, batch

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, step])
        drawn = [draw(lay_out(random_caption("training", rng)[1], rng)) for _ in range(self.batch)]
        return {"pictures": to_tensor(np.stack(drawn))}


def new_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder of the embedded default's size."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
    )


def loss(model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Mean absolute plus mean squared error of the round trip, and the latents' divergence from a normal."""
    pictures = batch["pictures"].contiguous(memory_format=torch.channels_last)
    posterior = model.encode(pictures).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(
        posterior.mean.shape, generator=generator, device=posterior.mean.device
    )
    decoded = model.decode(latents).sample
    error, divergence = F.l1_loss(decoded, pictures), posterior.kl().mean() / posterior.mean[0].numel()
    value = error + F.mse_loss(decoded, pictures) + KL_WEIGHT * divergence
    return value, {"error": error.item(), "divergence": divergence.item()}


@torch.no_grad()
def build(work: Path, target: Path, *, seed: int, device: str, workers: int) -> None:
    """Train, measure the latents' mean and spread (the pipeline's shift and scale), save to ``target``."""
    torch.manual_seed(seed)
    model = new_autoencoder().to(memory_format=torch.channels_last)
    with torch.enable_grad():
        averaged = train(model, Pictures(seed, SCHEDULE.batch), loss, SCHEDULE, work, seed=seed, device=device, workers=workers)
    assert isinstance(averaged, AutoencoderKL)
    pictures = Pictures(seed + 1, 512)[0]["pictures"].to(device)
    latents = averaged.encode(pictures).latent_dist.mean
    averaged.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    averaged.to("cpu", memory_format=torch.contiguous_format).save_pretrained(target)
