"""The surrogate of a step, from the configuration."""

from torch import Tensor

from flowbp_ray.config import AlignConfig
from flowbp_ray.randomness import generator_of
from flowbp_ray.surrogate.methods import METHODS
from flowbp_ray.surrogate.plan import Plan

SHARED = {"method", "detach_negative", "compensate_guidance"}  # settings of guidance, not of the method


def plan_of(config: AlignConfig, sigmas: Tensor, step: int) -> Plan:
    """A function of configuration, seed and step: the same in every process, for the whole global batch."""
    method = METHODS[config.surrogate.method]
    settings = method.settings(**config.surrogate.model_dump(exclude=SHARED))
    return method.plan(settings, sigmas, generator_of(config.train.seed, step, "plan"))
