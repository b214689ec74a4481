"""The surrogates' sections: made from the engine's own settings, so a default and a check are in one place."""

import dataclasses
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import ConfigDict, Field, Strict, create_model, model_validator

from flowbp_ray.config.section import Section
from flowbp_ray.surrogate.methods import METHODS
from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.surrogate.quadrature import Grid


class Engine(Section):
    """A section whose settings are those of a dataclass of the engine, which also checks them."""

    model_config = ConfigDict(use_attribute_docstrings=False)  # a class that is made has no source to read them from

    def settings(self) -> Any:
        """The engine's instance; ValueError for values that it refuses."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _accepted(self) -> "Engine":
        self.settings()
        return self


class Surrogate(Engine):
    """What the methods share: each has settings of its own beside, those of its file in ``flowbp_ray/surrogate/methods``."""

    method: str = Field(description="Which surrogate of the sampler is differentiated.")
    detach_negative: bool = Field(default=True, description="Take no gradient from the negative branch of guidance.")
    compensate_guidance: bool = Field(default=False, description="Divide the gradient by the guidance scale.")

    def plan(self, sigmas: Grid, generator: np.random.Generator) -> Plan:
        """Draw the surrogate of one step on the grid ``(T + 1,)``; ValueError where it does not go with so many steps."""
        return METHODS[self.method].plan(self.settings(), sigmas, generator)

    def contradictions(self, steps: int) -> list[str]:
        """What does not go together with a sampler of so many steps."""
        try:
            self.plan(np.linspace(1, 0, steps + 1), np.random.default_rng(0))
        except ValueError as error:
            return [f"surrogate does not go with sampling.steps = {steps}: {error}"]
        return []


def section(name: str, settings: type, base: type[Engine], **more: Any) -> Any:
    """The section of a dataclass, a class derived from ``base``; ``more`` are fields as `create_model` takes them."""
    hints = get_type_hints(settings)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        default = ... if field.default is dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            default = dataclasses.asdict(default)  # validated into a section, as what a file says is
        fields[field.name] = (_annotation(hints[field.name]), default)
    made: Any = create_model(name, __base__=base, __module__=__name__, __doc__=settings.__doc__, **more, **fields)
    globals()[name] = made  # where pickle looks for it

    def instance(self: Engine) -> Any:
        values = {f: getattr(self, f) for f in fields}
        return settings(**{f: v.settings() if isinstance(v, Engine) else v for f, v in values.items()})

    made.settings = instance
    return made


def _annotation(hint: Any) -> Any:
    """The field's type in YAML: lists stand for tuples, sections for dataclasses."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _inner(hint)
    if get_origin(hint) is tuple:
        return Annotated[hint, Strict(False)]
    if get_origin(hint) is not Literal and (parts := get_args(hint)):
        return Union[tuple(_annotation(p) for p in parts)]  # noqa: UP007 - of a tuple
    return hint


@cache
def _inner(settings: type) -> Any:
    return section(settings.__name__, settings, Engine)


SECTIONS: dict[str, type[Surrogate]] = {
    name: section(name.title().replace("_", ""), of.settings, Surrogate, method=(Literal[name], ...))
    for name, of in METHODS.items()
}

if TYPE_CHECKING:
    AnySurrogate = Surrogate
else:
    AnySurrogate = Annotated[Union[tuple(SECTIONS.values())], Field(discriminator="method")]  # noqa: UP007 - of a tuple
