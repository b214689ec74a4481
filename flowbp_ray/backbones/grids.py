"""Noise levels: sigmas from 1 to 0, shifted by a static shift or, by the scheduler itself, by the picture's size."""

import copy
from typing import Any, Literal

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

#: ``training``: ``linspace(1, 1/steps)`` shifted once, as the models are aligned; ``stock``: what the pipeline does by itself.
GridKind = Literal["training", "stock"]


def shifted_grid(steps: int, shift: float) -> Tensor:
    """``linspace(1, 1/steps)`` shifted by a static shift, then 0: float32 ``(steps + 1,)``."""
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    return torch.cat([shift * sigmas / (1 + (shift - 1) * sigmas), torch.zeros(1)]).float()


def dynamic_grid(scheduler: Any, steps: int, mu: float) -> Tensor:
    """``linspace(1, 1/steps)`` by the scheduler's own dynamic shift ``mu``, then 0: float32 ``(steps + 1,)``."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist(), mu=mu)
    return scheduler.sigmas.float()


def shift_by_tokens(scheduler: Any, tokens: int) -> float:
    """FLUX.1's mu: linear in the number of picture tokens (0.5 at 256 to 1.15 at 4096, unless the scheduler says otherwise)."""
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return calculate_shift(tokens, *(scheduler.config[name] for name in names))
