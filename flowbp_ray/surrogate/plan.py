"""A plan is data: which velocities carry gradient, with what coefficient, to which reward input.

Indices run forward in time on a grid ``σ_0 > … > σ_T = 0``: 0 is pure noise, ``T`` the finished latent.
A plan holds numbers only, so it can be printed, logged, sent to another machine and compared.
Source of the design space and its names: arXiv 2606.11075; the published defaults of the methods are its code's.
"""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal


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
        places = [(a.index, a.reward_input) for a in self.active]
        if not places or not self.reward_inputs:
            raise ValueError(f"the {self.method} plan has no active index or no reward input: it needs one of each")
        if any(one >= two for one, two in pairwise(places)):
            raise ValueError(f"the {self.method} plan's active indices {places} are not in order, or one is there twice")
        if not all(0 <= i < self.steps and 0 <= m < len(self.reward_inputs) for i, m in places):
            raise ValueError(
                f"the {self.method} plan's active (index, reward input) {places} leave its {self.steps} steps "
                f"or its {len(self.reward_inputs)} reward inputs"
            )
        bridges = [b.index for b in self.bridges]
        if any(one >= two for one, two in pairwise(bridges)) or not set(bridges) <= {a.index for a in self.active[1:]}:
            raise ValueError(
                f"the {self.method} plan's bridges {bridges} must be in order and at active indices after the first, "
                f"of {[a.index for a in self.active]}: elsewhere no gradient would cross them"
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
        """Indices whose cached (guided) velocities posterior means and connector errors need."""
        indices = {r.index for r in self.reward_inputs if r.kind == "posterior_mean"}
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

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers, strings and tuples, for `json.dumps` and logging."""
        return dataclasses.asdict(self)
