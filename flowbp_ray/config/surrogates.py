"""The surrogates' settings, one class a method."""

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from flowbp_ray.config.section import Section


class Surrogate(Section):
    """What the methods share; each is a class of its own with a ``method`` to be known by."""

    detach_negative: bool = True
    """No gradient from guidance's negative branch."""
    compensate_guidance: bool = False
    """Divide the gradient by the guidance scale."""


class Sparse(Surrogate):
    """FlowBP-Sparse: a few steps carry gradient, the later ones more often."""

    method: Literal["sparse"]
    """Which surrogate of the sampler is differentiated: ``sparse``."""
    active_steps: PositiveInt = 4
    """K, how many of the sampler's steps carry gradient."""
    late_bias: NonNegativeFloat = 1.0
    """Step i is drawn with probability proportional to (i + 1) to this power; 0 draws evenly."""
    rescale: NonNegativeFloat = 0.5
    """How much of the inactive steps' share the active ones take over: 0 none, 1 all of it."""
    tail: Annotated[float, Field(gt=0, le=1)] | None = None
    """Ratio of the sampler's steps, the last ones, that may be active; null is all."""

    def contradictions(self, steps: int) -> list[str]:
        """What does not go together with a sampler of so many steps."""
        if self.active_steps > steps:
            return [f"surrogate.active_steps is {self.active_steps} but sampling.steps is {steps}: lower one or raise the other"]
        window = math.ceil((self.tail or 1.0) * steps)
        if self.active_steps > window:
            return [
                f"surrogate.active_steps is {self.active_steps} but surrogate.tail = {self.tail} leaves only the last "
                f"{window} of {steps} sampling.steps to draw from: lower one or raise the other"
            ]
        return []


#: With a second method: ``Annotated[Sparse | Bridge, Field(discriminator="method")]``.
AnySurrogate = Sparse
