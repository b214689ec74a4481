"""How near each method's expected gradient is to the exact one, on a real model and reward.

Everything is measured on the samples that training starts with: their whole trajectories are kept, each method's plans are
drawn as training draws them, and each sample's gradient is taken by the engine that trains. Samples go through it one at a
time: a few of them can outweigh all others, which only their own gradients show, and memory stays that of one sample.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flowbp_ray.backbones.backbone import Conditioning
from flowbp_ray.config import AlignConfig
from flowbp_ray.config.surrogates import SECTIONS, Surrogate
from flowbp_ray.randomness import generator_of, prompt_indices, seed_of
from flowbp_ray.rollouts.prompts import read_prompts
from flowbp_ray.rollouts.rollout import roll_out
from flowbp_ray.surrogate.inputs import connector_errors, noised_copies, reward_inputs, sample_weights
from flowbp_ray.surrogate.plan import Connector, Plan, RewardInput, SampleWeight
from flowbp_ray.surrogate.quadrature import Grid, supports
from flowbp_ray.training.adapter import guidance_of, parameters, trainable
from flowbp_ray.training.moments import Comparison, Drawn, Moments, compare
from flowbp_ray.training.update import accumulate

#: ``score(latents (B, C, h, w), prompts)``: the objective's gradient at the latents.
Score = Callable[[Tensor, list[str]], Tensor]
#: Told how many draws are done since the last call.
Advance = Callable[[int], object]

#: The seven published methods, with their settings for Stable Diffusion 3.5: the engine's defaults, and this of guidance.
PUBLISHED: dict[str, dict[str, Any]] = {
    "refl": {},
    "draft_lv": {},
    "drtune": {},
    "leapalign": {"detach_negative": False},
    "sparse": {},
    "bridge": {},
    "lagrange": {},
}
EXACT = SECTIONS["full"].model_validate({"method": "full"})
ORDERS = (1, 2, 3, 4)


def methods_of(config: AlignConfig) -> tuple[dict[str, Surrogate], list[str]]:
    """The methods to study by name, the exact one last, and why others cannot be, a sentence each.

    The configured settings take the place of the published ones of their method. Truncation has none for flow models: it is
    studied at its shortest, at 4 steps and, to see what detaching guidance's negative branch alone does, at all steps.
    """
    lengths = sorted({1, min(4, config.sampling.steps), config.sampling.steps})
    truncated = [("truncated", {"active_steps": k}) for k in lengths]
    given = [*PUBLISHED.items(), *truncated, ("randomised_truncation", {})]
    sections = [SECTIONS[name].model_validate({"method": name, **settings}) for name, settings in given]
    rows, wrong = {_name(s): s for s in [*sections, config.surrogate]}, []
    for name, section in list(rows.items()):
        if section.method == "full" or (reasons := section.contradictions(config.sampling.steps)):
            del rows[name]
            wrong += [] if section.method == "full" else [f"{name} is left out: {r}" for r in reasons]
    return rows | {"full": EXACT}, wrong


def _name(section: Surrogate) -> str:
    return f"truncated_{section.settings().active_steps}" if section.method == "truncated" else section.method


def leaps(sigmas: Grid) -> dict[tuple[int, int], list[Connector]]:
    """All connectors of at least two steps on a grid, by order and length."""
    steps = len(sigmas) - 1
    return {
        (order, length): [Connector(i, i + length, supports(i, i + length, order)) for i in range(steps - length + 1)]
        for order in ORDERS
        for length in range(2, steps + 1)
    }


def everything(sigmas: Grid) -> Plan:
    """The exact plan, made to need every latent and every velocity of the trajectory by single steps to be weighed."""
    plan = EXACT.plan(sigmas, generator_of(0, 0, "plan"))
    return replace(plan, sample_weight=SampleWeight(tuple(Connector(i, i + 1, (i,)) for i in range(plan.steps)), 1.0))


@dataclass(frozen=True)
class Trajectory:
    """N samples on one grid: all latents and guided velocities ``(N, C, h, w)`` by index, and reward gradients once known."""

    sigmas: Tensor
    latents: dict[int, Tensor]
    velocities: dict[int, Tensor]
    gradients: dict[RewardInput, Tensor] = field(default_factory=dict)

    def connector_errors(self) -> dict[tuple[int, int], float]:
        """By order and leap length in steps: ``mean|x_target − predicted|`` over samples, starts and latent values.

        The target is the sampler's own latent, so a leap of one step has no error, whatever the order.
        """
        plan, errors = everything(self.sigmas), {}
        for key, connectors in leaps(self.sigmas).items():
            weighed = replace(plan, sample_weight=SampleWeight(tuple(connectors), 1.0))
            errors[key] = torch.stack(connector_errors(weighed, self.latents, self.velocities, self.sigmas)).mean().item()
        return errors


@dataclass(frozen=True)
class Growth:
    """Gradients on a grid of ``steps``."""

    steps: int
    #: By method: root mean square over draws of the norm of the mean over samples; then the median of the samples' own.
    norms: dict[str, float]
    sample_norms: dict[str, float]
    #: ``|∂J/∂x_0| / |∂J/∂x_T|`` of each sample along the exact chain.
    chain: list[float]


class Study:
    """A model with its adapter, and the first ``samples`` of training with the noise that they start from."""

    def __init__(self, config: AlignConfig, samples: int, score: Score) -> None:
        torch.set_num_threads(config.cluster.threads)
        self.config, self.score, prompts = config, score, read_prompts(config.prompts)
        self.backbone = trainable(config, "cuda" if config.cluster.trainer_gpus else "cpu")
        self.parameters = parameters(self.backbone.transformer)
        self.prompts = [prompts[i] for i in prompt_indices(config.train.seed, 0, samples, len(prompts))]
        self.text, self.negative = self.backbone.encode(self.prompts), self.backbone.encode([""])
        size = config.train.micro_batch
        self.parts = [slice(start, start + size) for start in range(0, samples, size)]

    def trajectory(self, steps: int) -> Trajectory:
        """Sample all of it on the model's grid of ``steps``."""
        sampling = self.config.sampling
        sigmas = self.backbone.grid(steps, sampling.height, sampling.width, sampling.grid).to(self.backbone.device)
        rollout = roll_out(self._noise(0, "noise"), sigmas, self._velocity, everything(sigmas))
        return Trajectory(sigmas, rollout.latents, rollout.velocities)

    def gradients(self, trajectory: Trajectory, section: Surrogate, plan: Plan, draw: int) -> Tensor:
        """Each sample's gradient of the plan's loss, ``(N, P)`` in float64; ``draw`` seeds the noise of noised copies."""
        cached = plan, trajectory.latents, trajectory.velocities, trajectory.sigmas
        copies = noised_copies(*cached, [self._noise(draw, f"copy {m}") for m in range(plan.copies)])
        with torch.no_grad():
            inputs = reward_inputs(*cached, copies, [self._velocity(c, trajectory.sigmas[plan.steps - 1]) for c in copies])
        received = [self._scored(trajectory, r, value) for r, value in zip(plan.reward_inputs, inputs, strict=True)]
        weights, rows = sample_weights(*cached), []
        for number in range(len(self.prompts)):
            one = slice(number, number + 1)
            accumulate(
                self.backbone,
                plan,
                trajectory.sigmas,
                {i: x[one] for i, x in trajectory.latents.items()},
                [g[one] for g in received],
                weights[one],
                self._text(one),
                self.negative,
                guidance=guidance_of(self.config.sampling.guidance_scale, section, self.backbone),
                guidance_scale=self.config.sampling.guidance_scale,
                batch=1,
                copies=[c[one] for c in copies],
            )
            rows.append(torch.cat([p.grad.flatten() for p in self.parameters]).double())
            for parameter in self.parameters:
                parameter.grad = None
        return torch.stack(rows)

    def drawn(self, trajectory: Trajectory, section: Surrogate, draws: int, advance: Advance) -> Drawn:
        """Over the plans of the first ``draws`` steps of training."""
        seed = self.config.train.seed
        plans = [section.plan(trajectory.sigmas, generator_of(seed, draw, "plan")) for draw in range(draws)]
        # A plan that comes again gives the same gradient again, unless it has copies, whose noise is another.
        times = Counter((plan, draw if plan.copies else 0) for draw, plan in enumerate(plans))
        mean, squares, means = 0.0, 0.0, []
        for (plan, draw), number in times.items():
            rows = self.gradients(trajectory, section, plan, draw)
            rows = torch.cat([rows, rows.mean(0, keepdim=True)])
            mean, squares = mean + number / draws * rows, squares + number / draws * rows.square().sum(1)
            means.append(rows[-1])
            advance(number)
        return Drawn(Moments(mean, squares, draws), torch.stack(means), list(times.values()))

    def compared(
        self, trajectory: Trajectory, methods: dict[str, Surrogate], draws: int, advance: Advance
    ) -> dict[str, Comparison]:
        """Every method's gradient beside the exact one."""
        exact = self.drawn(trajectory, EXACT, 1, lambda _: None).moments.mean
        return {name: compare(self.drawn(trajectory, s, draws, advance), exact) for name, s in methods.items()}

    def growth(self, steps: int, methods: dict[str, Surrogate], draws: int, advance: Advance) -> Growth:
        """Norms on another grid; methods whose settings do not go with so few steps are left out."""
        trajectory, norms, sample_norms = self.trajectory(steps), {}, {}
        for name, section in methods.items():
            if section.contradictions(steps):
                advance(draws)
                continue
            *own, norms[name] = self.drawn(trajectory, section, draws, advance).moments.squares.sqrt().tolist()
            sample_norms[name] = median(own)
        return Growth(steps, norms, sample_norms, self.chain(trajectory).tolist())

    def chain(self, trajectory: Trajectory) -> Tensor:
        """How much longer the objective's gradient at the initial noise is than at the finished latent, ``(N,)``."""
        steps = len(trajectory.sigmas) - 1
        last = self._scored(trajectory, RewardInput("sampled", steps), trajectory.latents[steps])
        ratios = []
        for rows in self.parts:
            gradient = last[rows]
            for i in reversed(range(steps)):
                inputs = trajectory.latents[i][rows].detach().requires_grad_()
                with torch.enable_grad():
                    velocity = self._guided(inputs, trajectory.sigmas[i], rows)
                delta = trajectory.sigmas[i + 1] - trajectory.sigmas[i]
                gradient = gradient + torch.autograd.grad(velocity, inputs, delta * gradient)[0]
            ratios.append(gradient.flatten(1).norm(dim=1) / last[rows].flatten(1).norm(dim=1))
        return torch.cat(ratios)

    def _noise(self, draw: int, purpose: str) -> Tensor:
        """What a sampler draws for step ``draw`` of training."""
        seeds = [seed_of(self.config.train.seed, draw, sample, purpose) for sample in range(len(self.prompts))]
        sampling, generators = self.config.sampling, [torch.Generator().manual_seed(s) for s in seeds]
        return self.backbone.initial_latents(generators, sampling.height, sampling.width)

    def _text(self, rows: slice) -> Conditioning:
        return self.text[rows]

    def _guided(self, latents: Tensor, sigma: Tensor, rows: slice) -> Tensor:
        scale = self.config.sampling.guidance_scale
        return self.backbone.velocity(latents, sigma, self._text(rows), self.negative, scale)

    def _velocity(self, latents: Tensor, sigma: Tensor) -> Tensor:
        return torch.cat([self._guided(latents[rows], sigma, rows) for rows in self.parts])

    def _scored(self, trajectory: Trajectory, reward_input: RewardInput, value: Tensor) -> Tensor:
        """The objective's gradient at a reward input; that of a latent or posterior mean is kept, as many plans share it."""
        if (known := trajectory.gradients.get(reward_input)) is not None:
            return known
        gradient = torch.cat([self.score(value[rows], self.prompts[rows]) for rows in self.parts])
        if dead := (gradient.flatten(1).norm(dim=1) == 0).nonzero().flatten().tolist():
            raise ValueError(
                f"the objective of sample {dead[0]} ({self.prompts[dead[0]]!r}) does not change with its picture, so it has no "
                "gradient to compare: study a reward that is never flat"
            )
        if reward_input.copy is None:
            trajectory.gradients[reward_input] = gradient
        return gradient
