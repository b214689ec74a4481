"""The surrogate of a step, from the configuration."""

from flowbp_ray.config import AlignConfig
from flowbp_ray.randomness import generator_of
from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.surrogate.quadrature import Grid


def plan_of(config: AlignConfig, sigmas: Grid, step: int) -> Plan:
    """A function of configuration, seed and step: the same in every process, for the whole global batch."""
    return config.surrogate.plan(sigmas, generator_of(config.train.seed, step, "plan"))
