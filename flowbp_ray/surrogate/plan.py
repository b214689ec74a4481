"""A plan is data: which velocities carry gradient, with what coefficient, to which reward input.

Indices run forward in time on a grid ``σ_0 > … > σ_T = 0``: 0 is pure noise, ``T`` the finished latent.
A plan holds numbers only, so it can be printed, logged, sent to another machine and compared.
Source of the design space and its names: arXiv 2606.11075; the published defaults of the methods are its code's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class RewardInput:
    """What the reward sees: the sampled latent ``x_T``, a posterior mean ``x_i − σ_i v_i``, or that of a noised copy."""

    kind: Literal["sampled", "posterior_mean", "copy"]
    #: The grid index it belongs to: ``T`` for the sampled latent, ``T − 1`` for copies.
    index: int
    #: Which noised copy, from 0; None unless ``kind`` is ``copy``.
    copy: int | None = None

    def __str__(self) -> str:
        match self.kind:
            case "sampled":
                return f"x_{self.index}"
            case "posterior_mean":
                return f"posterior mean at {self.index}"
            case "copy":
                return f"posterior mean of copy {self.copy} at {self.index}"


@dataclass(frozen=True)
class Active:
    """A velocity that is evaluated again with gradient, at the cached latent of ``index``, or at a noised copy."""

    index: int
    #: Weight × rescale × support scale, a difference of sigmas; guidance is not included.
    coefficient: float
    #: Position in ``Plan.reward_inputs`` of the reward input that it moves; for a copy its model input is that copy.
    reward_input: int = 0


@dataclass(frozen=True)
class Bridge:
    """An active index whose latent keeps the gradient path to earlier active velocities, scaled by ``alpha``."""

    index: int
    alpha: float


@dataclass(frozen=True)
class Connector:
    """A leg from ``start`` to ``target``, predicted by the Lagrange interpolant of the velocities at ``supports``.

    One support is a single leap.
    """

    start: int
    target: int
    supports: tuple[int, ...]


@dataclass(frozen=True)
class SampleWeight:
    """Weight ``1 / Σ_connectors max(error, floor)`` of each sample in the loss (LeapAlign, FlowBP-Lagrange)."""

    connectors: tuple[Connector, ...]
    floor: float


@dataclass(frozen=True)
class Plan:
    """One surrogate of one step, the same for the whole global batch. ValueError where it contradicts itself."""

    method: str
    #: T, the number of sampling steps.
    steps: int
    reward_inputs: tuple[RewardInput, ...]
    #: Ordered by index.
    active: tuple[Active, ...]
    #: Ordered by index; none, one, or many.
    bridges: tuple[Bridge, ...] = ()
    #: None: every sample weighs 1.
    sample_weight: SampleWeight | None = None
    #: The negative branch carries gradient whatever `Guidance.detach_negative` says (exact full backpropagation).
    attach_negative: bool = False

    def __post_init__(self) -> None:
        for wrong, sentence in self._contradictions():
            if wrong:
                raise ValueError(f"the {self.method} plan {sentence}")

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        """What may be wrong and a sentence on it, in turn: a later check relies on the earlier ones."""
        inputs, places = self.reward_inputs, [(a.index, a.reward_input) for a in self.active]
        yield not places or not inputs, "has no active index or no reward input: it needs one of each"
        for m, r in enumerate(inputs):
            low, high = {"sampled": (self.steps, self.steps), "copy": (self.steps - 1,) * 2}.get(r.kind, (0, self.steps - 1))
            where = f"{low}" if low == high else f"{low} to {high}"
            yield (
                not low <= r.index <= high,
                f"has reward input {m} ({r}), but of its {self.steps} steps a {r.kind} one needs {where}",
            )
        copies = [r.copy for r in inputs if r.kind == "copy" or r.copy is not None]
        yield (
            copies != list(range(self.copies)),
            f"numbers its copies {copies}: number them 0, 1, … in order, and nothing but copies",
        )
        yield (
            any(one >= two for one, two in pairwise(places)),
            f"has active indices {places} that are not in order, or one is there twice",
        )
        yield (
            not all(0 <= i < self.steps and 0 <= m < len(inputs) for i, m in places),
            f"has active (index, reward input) {places} that leave its {self.steps} steps or its {len(inputs)} reward inputs",
        )
        for i, m in places:
            yield i > inputs[m].index, f"has the active index {i} after its reward input ({inputs[m]}), which it cannot move"
            yield (
                inputs[m].kind == "copy" and i != inputs[m].index,
                f"has the active index {i} for a noised copy ({inputs[m]}): its velocity is taken at the copy's own index",
            )
        yield from self._wrong_bridges()
        yield from self._wrong_numbers()

    def _wrong_bridges(self) -> Iterator[tuple[bool, str]]:
        bridges, first = [b.index for b in self.bridges], {a.reward_input: a.index for a in reversed(self.active)}
        crossed = {a.index for a in self.active if a.index > first[a.reward_input]}
        yield (
            any(one >= two for one, two in pairwise(bridges)) or not set(bridges) <= crossed,
            f"has bridges {bridges}: they must be in order and at active indices after the first of their reward input, "
            f"here of {sorted(crossed)}, as elsewhere no gradient would cross them",
        )
        copied = {a.index for a in self.active if self.reward_inputs[a.reward_input].kind == "copy"}
        yield (
            bool(copied.intersection(bridges)),
            f"has bridges {bridges}, but at {sorted(copied)} a velocity is taken at a noised copy, to which no path leads: "
            "put the bridges elsewhere",
        )

    def _wrong_numbers(self) -> Iterator[tuple[bool, str]]:
        numbers = [*(a.coefficient for a in self.active), *(b.alpha for b in self.bridges)]
        yield not all(map(math.isfinite, numbers)), f"has coefficients and alphas {numbers}: all must be finite"
        if self.sample_weight is None:
            return
        floor = self.sample_weight.floor
        yield not self._connectors, "weighs samples by no connector: give one, or no sample weight"
        yield not 0 < floor < math.inf, f"has the sample weights' floor {floor}: it must be a finite number above 0"
        for c in self._connectors:
            yield (
                not 0 <= c.start < c.target <= self.steps,
                f"has a connector from {c.start} to {c.target}: it must go forward within its {self.steps} steps",
            )
            yield (
                not c.supports or list(c.supports) != sorted(set(c.supports) & set(range(c.start, c.target))),
                f"has a connector from {c.start} to {c.target} with supports {c.supports}: they must be in order and before the "
                "target, from the start on",
            )

    @property
    def latents_needed(self) -> tuple[int, ...]:
        """Indices whose cached latents the backward, the reward inputs or the sample weights need."""
        indices = {a.index for a in self.active if self.reward_inputs[a.reward_input].kind != "copy"}
        indices |= {r.index for r in self.reward_inputs}
        indices |= {i for c in self._connectors for i in (c.start, c.target)}
        return tuple(sorted(indices))

    @property
    def velocities_needed(self) -> tuple[int, ...]:
        """Indices whose cached (guided) velocities posterior means, noised copies and connector errors need."""
        indices = {r.index for r in self.reward_inputs if r.kind != "sampled"}
        return tuple(sorted(indices.union(*(c.supports for c in self._connectors))))

    @property
    def last_index(self) -> int:
        """The last latent that the rollout has to reach; its velocity too where `velocities_needed` names it."""
        return self.latents_needed[-1]

    @property
    def copies(self) -> int:
        """How many noised copies there are."""
        return sum(r.kind == "copy" for r in self.reward_inputs)

    @property
    def _connectors(self) -> tuple[Connector, ...]:
        return () if self.sample_weight is None else self.sample_weight.connectors

    def table(self) -> str:
        """The plan for a reader: one row an active velocity."""
        lines = [f"{self.method}, {self.steps} steps", "index  coefficient  bridge  reward input"]
        alphas = {b.index: f"{b.alpha:g}" for b in self.bridges}
        for a in self.active:
            bridge, target = alphas.get(a.index, "-"), self.reward_inputs[a.reward_input]
            lines.append(f"{a.index:5d}  {a.coefficient:11.6f}  {bridge:>6}  {target}")
        if self.sample_weight is not None:
            errors = (f"max(d_{c.target}, {self.sample_weight.floor:g})" for c in self.sample_weight.connectors)
            lines.append(f"sample weight 1 / ({' + '.join(errors)})")
        return "\n".join(lines)
