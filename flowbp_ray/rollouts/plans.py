"""The grid and the surrogate of a step, from the configuration."""

from typing import TYPE_CHECKING

from flowbp_ray.config import AlignConfig
from flowbp_ray.randomness import generator_of
from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.surrogate.quadrature import Grid

if TYPE_CHECKING:
    from torch import Tensor

    from flowbp_ray.backbones.backbone import Backbone


def grid_of(config: AlignConfig, backbone: "Backbone") -> "Tensor":
    """The one grid of rollout, training and evaluation: sigmas ``(T + 1,)`` on the model's device."""
    sampling = config.sampling
    return backbone.grid(sampling.steps, sampling.height, sampling.width, sampling.grid).to(backbone.device)


def plan_of(config: AlignConfig, sigmas: Grid, step: int) -> Plan:
    """A function of configuration, seed and step: the same in every process, for the whole global batch."""
    return config.surrogate.plan(sigmas, generator_of(config.train.seed, step, "plan"))
