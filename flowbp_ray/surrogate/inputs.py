"""What the loss needs beside the gradient walk, from cached values alone: reward inputs, noised copies, sample weights.

Latents and velocities are maps from grid index to ``(B, …)`` tensors (guided velocities), ``sigmas`` is ``(T + 1,)``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowbp_ray.surrogate.plan import Plan, RewardInput
from flowbp_ray.surrogate.quadrature import checked_grid, lagrange_weights


def reward_inputs(
    plan: Plan,
    latents: Mapping[int, Tensor],
    velocities: Mapping[int, Tensor],
    sigmas: Tensor,
    copies: Sequence[Tensor] = (),
    copy_velocities: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The values that the reward sees, ``(B, …)`` each, in the plan's order.

    ``copies`` are `noised_copies`' and ``copy_velocities`` the guided velocities at them; ValueError unless there
    is one for each of the plan's copies.
    """
    if not len(copies) == len(copy_velocities) == plan.copies:
        raise ValueError(
            f"the {plan.method} plan has {plan.copies} noised copies, "
            f"but was given {len(copies)} copies and {len(copy_velocities)} velocities at copies"
        )

    def value(reward_input: RewardInput) -> Tensor:
        i = reward_input.index
        if reward_input.copy is not None:
            return copies[reward_input.copy] - sigmas[i] * copy_velocities[reward_input.copy]
        return latents[i] if reward_input.kind == "sampled" else latents[i] - sigmas[i] * velocities[i]

    return [value(r) for r in plan.reward_inputs]


def noised_copies(
    plan: Plan, latents: Mapping[int, Tensor], velocities: Mapping[int, Tensor], sigmas: Tensor, noises: Sequence[Tensor]
) -> list[Tensor]:
    """DRaFT-LV's model inputs ``(1 − σ)·x̂ + σ·ε`` at σ = σ_{T−1}, from one standard normal noise ``(B, …)`` a copy.

    ``x̂`` is the posterior mean at ``T − 1``. ValueError unless there is one noise for each of the plan's copies.
    """
    if len(noises) != plan.copies:
        raise ValueError(f"the {plan.method} plan has {plan.copies} noised copies, but was given {len(noises)} noises")
    sigma = sigmas[plan.steps - 1]
    return [(1 - sigma) * (latents[plan.steps - 1] - sigma * velocities[plan.steps - 1]) + sigma * noise for noise in noises]


def connector_errors(plan: Plan, latents: Mapping[int, Tensor], velocities: Mapping[int, Tensor], sigmas: Tensor) -> list[Tensor]:
    """Each connector's ``d = mean|x_target − predicted|`` per sample, ``(B,)``; none where the plan weighs nothing."""
    if plan.sample_weight is None:
        return []
    grid, errors = checked_grid(sigmas), []
    for connector in plan.sample_weight.connectors:
        weights = lagrange_weights(grid, connector.start, connector.target, connector.supports)
        predicted = latents[connector.start]
        for index, weight in zip(connector.supports, weights, strict=True):
            predicted = predicted + weight * velocities[index]
        errors.append((latents[connector.target] - predicted).abs().flatten(1).mean(1))
    return errors


def sample_weights(plan: Plan, latents: Mapping[int, Tensor], velocities: Mapping[int, Tensor], sigmas: Tensor) -> Tensor:
    """Each sample's weight in the loss, ``(B,)``: ones where the method has none (LeapAlign, FlowBP-Lagrange)."""
    if plan.sample_weight is None:
        latent = latents[plan.reward_inputs[0].index]
        return torch.ones(len(latent), dtype=latent.dtype, device=latent.device)
    errors = connector_errors(plan, latents, velocities, sigmas)
    return 1 / torch.stack([e.clamp(min=plan.sample_weight.floor) for e in errors]).sum(0)
