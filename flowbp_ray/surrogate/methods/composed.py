"""A plan composed from the four choices of the design space, without naming a method (arXiv 2606.11075).

A posterior mean at s is the sampler that stops at s by one step straight to 0, so it only changes the grid;
active set, weights and bridge are then the same rules whatever the reward sees.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np

from flowbp_ray.surrogate.checks import count, not_negative, one_of, positive, require, share
from flowbp_ray.surrogate.draws import PairDraw, evenly_spaced, late_biased, one_of_the_last, window_start
from flowbp_ray.surrogate.methods.bridge import split_indices
from flowbp_ray.surrogate.methods.lagrange import leg
from flowbp_ray.surrogate.plan import Active, Bridge, Connector, Plan, RewardInput, SampleWeight
from flowbp_ray.surrogate.quadrature import Grid, checked_grid, lagrange_weights, rescale_factor, stopped_grid, supports

#: Which active sets go with which weights.
ACTIVE = {
    "euler": ("all", "last", "late_biased", "evenly_spaced"),
    "leap": ("start",),
    "lagrange": ("start", "midpoint", "all"),
    "lagrange_last_leg": ("late_biased",),
}
#: How many supports of a leg carry gradient; all of them where it is not said.
ACTIVE_SUPPORTS = {"start": 1, "midpoint": 2}


@dataclass(frozen=True)
class Settings:
    """The four choices, then what some of them need; a value that no choice uses, or a missing one, is refused."""

    #: The sampled latent, or a posterior mean at an index drawn from the last ``stop_within``.
    reward_input: Literal["sampled", "posterior_mean"]
    #: With euler: all indices, the last, late-biased or evenly spaced ones; with leap and lagrange: of each leg the
    #: start, the first two supports, or all.
    active: Literal["all", "last", "late_biased", "evenly_spaced", "start", "midpoint"]
    #: Each step's own difference of sigmas, one leap a leg, or an interpolant's integral over a leg: over every leg, or over
    #: the last one alone, from the drawn j on, of the interpolant through all active indices there (euler before j).
    weights: Literal["euler", "leap", "lagrange", "lagrange_last_leg"]
    #: None, one at the drawn j (which also divides leap and lagrange into two legs), or every active index after the first.
    bridge: Literal["none", "drawn", "every"]
    #: For posterior_mean: how many last indices it is drawn from.
    stop_within: int | None = None
    #: For last, late_biased and evenly_spaced: how many indices.
    active_steps: int | None = None
    #: For late_biased: the exponent of the odds.
    late_bias: float | None = None
    #: For lagrange: supports a leg, at most.
    order: int | None = None
    #: For lagrange with midpoint or all, of order 2 at least: factor on the gradient of supports other than a leg's start.
    support_scale: float | None = None
    #: For drawn and every: how much of the gradient at a bridge's latent crosses it.
    alpha: float | None = None
    #: For drawn bridges, leap and lagrange: how (k, j) is drawn; without a bridge, leap and lagrange start at k.
    pair: PairDraw | None = None
    #: For leap and lagrange to the sampled latent, optional: weigh samples with this smallest connector error.
    weight_floor: float | None = None
    #: How far active gradients are scaled up to stand in for inactive ones, where there are any.
    rescale: float = 0.0
    #: Share of the steps, counted from the end, that late_biased and (k, j) are drawn from; null is all.
    tail: float | None = None

    def __post_init__(self) -> None:
        one_of("reward_input", self.reward_input, ("sampled", "posterior_mean"))
        one_of("weights", self.weights, tuple(ACTIVE))
        one_of("bridge", self.bridge, ("none", "drawn", "every"))
        one_of(f"active (with weights {self.weights})", self.active, ACTIVE[self.weights])
        self._check_bridge()
        for name in ("stop_within", "active_steps", "order"):
            if (value := self.__dict__[name]) is not None:
                count(name, value, least=2 if name == "active_steps" and self.bridge != "none" else 1)
        self._check_details()
        for name in ("late_bias", "support_scale", "alpha", "rescale"):
            if (value := self.__dict__[name]) is not None:
                not_negative(name, value)
        if self.weight_floor is not None:
            positive("weight_floor", self.weight_floor)
        share("tail", self.tail)

    def _check_bridge(self) -> None:
        if self.weights == "lagrange_last_leg" and self.bridge != "drawn":
            raise ValueError(
                f"weights 'lagrange_last_leg' contradicts bridge {self.bridge!r}: the last leg is what follows the drawn "
                "split j; use bridge 'drawn', or other weights"
            )
        if self.bridge == "every" and self.weights != "euler":
            raise ValueError(
                f"bridge 'every' contradicts weights {self.weights!r}: a leg is predicted from its start's latent alone, so "
                "only the split j between two legs can be bridged; use bridge 'drawn' or weights 'euler'"
            )
        if self.bridge == "drawn" and self.active in ("last", "evenly_spaced"):
            raise ValueError(
                f"bridge 'drawn' contradicts active {self.active!r}: the bridge j must itself be active, and these indices "
                "are chosen without it; use active 'late_biased' or 'all', or bridge 'every'"
            )

    def _check_details(self) -> None:
        legs = self.weights in ("leap", "lagrange")
        counted, drawn = self.active in ("last", "late_biased", "evenly_spaced"), self.bridge == "drawn"
        order = self.order or 1
        inactive = counted or ACTIVE_SUPPORTS.get(self.active, order) < order
        for name, used, where in (
            ("stop_within", self.reward_input == "posterior_mean", "reward_input is 'posterior_mean'"),
            ("active_steps", counted, "active is 'last', 'late_biased' or 'evenly_spaced'"),
            ("late_bias", self.active == "late_biased", "active is 'late_biased'"),
            ("order", self.weights == "lagrange", "weights is 'lagrange'"),
            (
                "support_scale",
                self.weights == "lagrange" and self.active != "start" and order > 1,
                "weights is 'lagrange', active 'midpoint' or 'all', and order at least 2",
            ),
            ("alpha", self.bridge != "none", "bridge is 'drawn' or 'every'"),
            ("pair", legs or drawn, "bridge is 'drawn' or weights is 'leap' or 'lagrange'"),
        ):
            given = self.__dict__[name] is not None
            if given != used:
                verb = "is needed" if used else "has nothing to act on and must be left out"
                raise ValueError(f"{name} is {self.__dict__[name]!r}: it {verb}, as it belongs exactly where {where}")
        if self.rescale and not inactive:
            raise ValueError(
                f"rescale is {self.rescale!r}, but with weights {self.weights!r}, active {self.active!r} and order {self.order} "
                "no velocity is inactive, so there is none to stand in for: leave it at 0"
            )
        if self.tail is not None and self.active != "late_biased" and self.pair is None:
            raise ValueError(f"tail is {self.tail!r}, but active {self.active!r} draws nothing from a window: leave it out")
        if self.weight_floor is not None and not (legs and self.reward_input == "sampled"):
            raise ValueError(
                f"weight_floor is {self.weight_floor!r}, but samples are weighed by how far leaps or interpolants are from the "
                "cached latents: it needs weights 'leap' or 'lagrange' and reward_input 'sampled'"
            )


def plan(settings: Settings, sigmas: Grid, generator: np.random.Generator) -> Plan:
    """The composed plan. ValueError where the grid is too short for the settings, whatever would be drawn."""
    grid = checked_grid(sigmas)
    steps = len(grid) - 1
    reward_input = RewardInput("sampled", steps)
    _check_length(settings, steps)
    if settings.stop_within is not None:
        stop = one_of_the_last(settings.stop_within, steps, generator)
        reward_input, grid = RewardInput("posterior_mean", stop), stopped_grid(grid, stop)
    build = _legs if settings.weights in ("leap", "lagrange") else _steps
    return replace(build(settings, grid, reward_input, generator), steps=steps)


def _check_length(settings: Settings, steps: int) -> None:
    """Whatever the stop, the shortest trajectory to the reward input must have room for what is drawn from it."""
    shortest = steps
    if settings.stop_within is not None:
        require(settings.stop_within <= steps, "stop_within", settings.stop_within, f"at most {steps}, the number of steps")
        shortest = steps - settings.stop_within + 1
    if settings.pair is not None:
        settings.pair.bounds(shortest, settings.tail)
    least = 1 if settings.pair is None else 3
    if settings.active_steps is not None:
        room = shortest - window_start(shortest, settings.tail, least)
        require(settings.active_steps <= room, "active_steps", settings.active_steps, f"at most {room}, the indices to draw from")
    if settings.active == "all" and settings.bridge != "none":
        require(shortest >= 2, "bridge", settings.bridge, "'none' where the trajectory may be a single step")


T = TypeVar("T")


def _given(value: T | None) -> T:
    """A value that the settings' own checks have made sure of."""
    assert value is not None
    return value


def _steps(settings: Settings, grid: np.ndarray, reward_input: RewardInput, generator: np.random.Generator) -> Plan:
    steps, deltas, j = len(grid) - 1, np.diff(grid), None
    if settings.pair is not None:
        _, j = settings.pair.draw(steps, settings.tail, generator)
    start = window_start(steps, settings.tail, 1 if j is None else 3)
    match settings.active:
        case "last":
            indices = list(range(steps - _given(settings.active_steps), steps))
        case "evenly_spaced":
            indices = evenly_spaced(steps, _given(settings.active_steps), generator)
        case "late_biased":
            number, bias = _given(settings.active_steps), _given(settings.late_bias)
            if j is None:
                indices = late_biased(start, steps, number, bias, 0, generator)
            else:
                indices = split_indices(start, j, steps, number, bias, generator)
        case _:
            indices = list(range(steps))
    # Euler's until here; the interpolant of the last leg already stands for all of that leg.
    end = _given(j) if settings.weights == "lagrange_last_leg" else steps
    stepped, supported = [i for i in indices if i < end], [i for i in indices if i >= end]
    coefficients = rescale_factor(settings.rescale, deltas[start:end], deltas[stepped]) * deltas[stepped]
    weights = [*coefficients, *(lagrange_weights(grid, end, steps, supported) if supported else ())]
    active = tuple(Active(i, float(w)) for i, w in zip(indices, weights, strict=True))
    bridged = indices[1:] if settings.bridge == "every" else [] if j is None else [j]
    return Plan("composed", steps, (reward_input,), active, tuple(Bridge(i, _given(settings.alpha)) for i in bridged))


def _legs(settings: Settings, grid: np.ndarray, reward_input: RewardInput, generator: np.random.Generator) -> Plan:
    steps = len(grid) - 1
    order = 1 if settings.weights == "leap" else _given(settings.order)  # a leap is an interpolant of one velocity
    k, j = _given(settings.pair).draw(steps, settings.tail, generator)
    ends = [k, steps] if settings.bridge == "none" else [k, j, steps]
    connectors = tuple(Connector(a, b, supports(a, b, order)) for a, b in pairwise(ends))
    active: list[Active] = []
    for connector in connectors:
        number = ACTIVE_SUPPORTS.get(settings.active, order)
        scale = 1.0 if settings.support_scale is None else settings.support_scale
        active += leg(grid, connector, number, scale, settings.rescale)
    bridges = (Bridge(j, _given(settings.alpha)),) if settings.bridge == "drawn" else ()
    weight = None if settings.weight_floor is None else SampleWeight(connectors, settings.weight_floor)
    return Plan("composed", steps, (reward_input,), tuple(active), bridges, weight)
