"""Every surrogate's forward graph, built whole and literally as the paper writes it, and a small world to build it in.

Only the drawn indices are taken from a plan; coefficients, pins, scales and stop-gradients are written out here.
"""

import numpy as np
import torch
from torch import nn

from flowbp_ray.surrogate.backward import Guidance, backward
from flowbp_ray.surrogate.inputs import noised_copies, reward_inputs, sample_weights


def sg(a):
    return a.detach()


def pin(a, b):
    return a + sg(b - a)


def scale(a, s):
    return sg(a) + s * (a - sg(a))


class Field(nn.Module):
    """A small nonlinear velocity on latents (B, 2, 3), its parameters shared by all indices and both branches."""

    def __init__(self, seed, hidden=5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.inward, self.outward, self.sigma, self.branch = (
            random(6, hidden),
            random(hidden, 6),
            random(hidden),
            random(2, hidden),
        )

    def forward(self, x, sigma, branch):
        hidden = x.flatten(1) @ self.inward / 2 + sigma * self.sigma + self.branch[0 if branch == "conditional" else 1]
        return (torch.tanh(hidden) @ self.outward).view_as(x)


class World:
    """A field, a grid, guidance, and the rollout cached under no-grad; calls to the field are counted by branch."""

    def __init__(self, seed, increments, guidance=None, batch=2):
        self.field, self.guidance = Field(seed), guidance or Guidance()
        levels = np.cumsum([0.0, *increments])
        self.sigmas = torch.tensor(levels[::-1] / levels[-1])
        self.steps = len(increments)
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.probe = self.random(2, 3)
        self.calls = []
        x = self.random(batch, 2, 3)
        self.x, self.v = {0: x}, {}
        with torch.no_grad():
            for i in range(self.steps):
                self.v[i] = self.u(self.x[i], i)
                self.x[i + 1] = self.x[i] + (self.sigmas[i + 1] - self.sigmas[i]) * self.v[i]

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def velocity(self, x, index, branch):
        self.calls.append((index, branch))
        return self.field(x, self.sigmas[index], branch)

    def u(self, x, i, attach=False):
        """Guided velocity."""
        w, conditional = self.guidance.scale, self.field(x, self.sigmas[i], "conditional")
        if w <= 1:
            return conditional
        negative = self.field(x, self.sigmas[i], "negative")
        if self.guidance.detach_negative and not attach:
            negative = sg(negative)
        return negative + w * (conditional - negative)

    def delta(self, i, end=None):
        return (0 if i == end else self.sigmas[i + 1]) - self.sigmas[i]

    def loss(self, inputs, weights):
        """Mean over samples and reward inputs of sample weight times a nonlinear score."""
        scores = [torch.sin(x * self.probe).flatten(1).sum(1) for x in inputs]
        return -torch.stack([weights * s for s in scores]).mean()

    def gradient(self):
        parameters = list(self.field.parameters())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        self.field.zero_grad()
        return flat


def engine(world, plan, noises=(), local=None):
    """The parameters' gradient as the trainer computes it: cached values, cotangents, one velocity at a time."""
    latents = {i: world.x[i] for i in plan.latents_needed}
    velocities = {i: world.v[i] for i in plan.velocities_needed}
    with torch.no_grad():
        copies = noised_copies(plan, latents, velocities, world.sigmas, noises)
        copy_velocities = [world.u(c, plan.steps - 1) for c in copies]
    inputs = reward_inputs(plan, latents, velocities, world.sigmas, copies, copy_velocities)
    inputs = [x.detach().requires_grad_() for x in inputs]
    cotangents = torch.autograd.grad(world.loss(inputs, sample_weights(plan, latents, velocities, world.sigmas)), inputs)
    world.calls.clear()
    backward(plan, world.velocity, latents, cotangents, guidance=world.guidance, copies=copies, local=local)
    return world.gradient()


def whole_graph(world, inputs, weights=1.0):
    """The parameters' gradient by plain autograd of the loss at live reward inputs."""
    loss = world.loss(inputs, weights)
    (loss / world.guidance.scale if world.guidance.compensate else loss).backward()
    return world.gradient()


def relative(a, b):
    """Difference relative to b; a b that cancels to nothing (all Lagrange weights 0) counts as 1e-4, others are about 1."""
    return ((a - b).norm() / b.norm().clamp(min=1e-4)).item()


def compose(world, x, start, end, live, factor=1.0, stop=None, at=None, alpha=None):
    """Euler from x over [start, end); ``live`` indices with gradient times ``factor``, each at its cached latent,
    but at index ``at`` at the scaled running latent."""
    first = x
    for i in range(start, end):
        v = world.v[i]
        if i in live:
            v = scale(world.u(scale(first, alpha) if i == at else world.x[i], i), factor)
        x = x + world.delta(i, stop) * v
    return x


def rho_factor(rho, weights, active):
    total = sum(abs(w) for w in active)
    return 1 + rho * (sum(abs(w) for w in weights) / total - 1) if total > 1e-8 else 1.0


def refl(world, tau):
    return [world.x[tau] - world.sigmas[tau] * world.u(world.x[tau], tau)]


def draft_lv(world, noises):
    last = world.steps - 1
    sigma = world.sigmas[last]
    estimate = world.x[last] - sigma * world.u(world.x[last], last)
    copies = [(1 - sigma) * sg(estimate) + sigma * e for e in noises]
    return [estimate, *(c - sigma * world.u(c, last) for c in copies)]


def drtune(world, stop, live):
    x = compose(world, world.x[0], 0, stop, live)
    v = world.u(world.x[stop], stop) if stop in live else world.v[stop]
    return [x - world.sigmas[stop] * v]


def leapalign(world, k, j, alpha, floor):
    s, x = world.sigmas, world.x
    predicted_j = x[k] + (s[j] - s[k]) * world.u(x[k], k)
    x_j = pin(predicted_j, x[j])
    predicted = x_j - s[j] * world.u(scale(x_j, alpha), j)
    return [pin(predicted, x[world.steps])], similarity(world, predicted_j, predicted, j, floor)


def similarity(world, predicted_j, predicted, j, floor):
    d_j = (world.x[j] - sg(predicted_j)).abs().mean((1, 2))
    d_0 = (world.x[world.steps] - sg(predicted)).abs().mean((1, 2))
    return 1 / (d_j.clamp(min=floor) + d_0.clamp(min=floor))


def sparse(world, live, rho, start):
    deltas = [world.delta(i) for i in range(world.steps)]
    factor = rho_factor(rho, deltas[start:], [deltas[i] for i in live])
    return [pin(compose(world, world.x[0], 0, world.steps, live, factor), world.x[world.steps])]


def bridge(world, live, j, rho, alpha, start):
    deltas = [world.delta(i) for i in range(world.steps)]
    factor = rho_factor(rho, deltas[start:], [deltas[i] for i in live])
    x_j = pin(compose(world, world.x[0], 0, j, live, factor), world.x[j])
    return [pin(compose(world, x_j, j, world.steps, live, factor, at=j, alpha=alpha), world.x[world.steps])]


def integrals(sigmas, points, start, target):
    """Lagrange integrals by expanding the polynomials: another way than the engine's."""
    weights = []
    for m in points:
        basis = np.poly1d([1.0])
        for n in points:
            if n != m:
                basis = basis * np.poly1d([1.0, -float(sigmas[n])]) / float(sigmas[m] - sigmas[n])
        whole = np.polyint(basis)
        weights.append(whole(float(sigmas[target])) - whole(float(sigmas[start])))
    return weights


def spread(start, target, order):
    """Supports by the words of the paper, with Python's own rounding (half to even)."""
    length = target - start
    if length <= order:
        return list(range(start, target))
    positions = [0] if order == 1 else [round(m * (length - 1) / (order - 1)) for m in range(order)]
    return [start + p for p in dict.fromkeys(positions)]


def leg(world, x, start, target, order, active, support_scale, rho, at=None, alpha=1.0, stop=None):
    """One interpolated leg from x: value, with gradient through its first ``active`` supports; from ``stop`` straight to 0."""
    points = spread(start, target, order)
    weights = integrals(world.sigmas if stop is None else [*world.sigmas[: stop + 1], 0.0], points, start, target)
    factor = rho_factor(rho, weights, weights[:active])
    total = x
    for m, (i, weight) in enumerate(zip(points, weights, strict=True)):
        v = world.v[i]
        if m < active:
            v = scale(world.u(scale(x, alpha) if i == at else world.x[i], i), factor * (1.0 if m == 0 else support_scale))
        total = total + weight * v
    return total


def lagrange(world, k, j, order, active, support_scale, rho, alpha, floor):
    predicted_j = leg(world, world.x[k], k, j, order, active, support_scale, rho)
    x_j = pin(predicted_j, world.x[j])
    predicted = leg(world, x_j, j, world.steps, order, active, support_scale, rho, at=j, alpha=alpha)
    return [pin(predicted, world.x[world.steps])], similarity(world, predicted_j, predicted, j, floor)


def last_steps(world, number, attach=False):
    """Plain autograd through the sampler's last steps."""
    x = world.x[world.steps - number]
    for i in range(world.steps - number, world.steps):
        x = x + world.delta(i) * world.u(x, i, attach)
    return [x]


def bridged_everywhere(world, live, alpha, factor=1.0, stop=None):
    """Euler over the whole grid, every live index but the first evaluated at the scaled, pinned running latent."""
    end = world.steps if stop is None else stop + 1
    x = world.x[0]
    for i in range(end):
        x = pin(x, world.x[i])
        v = world.v[i] if i not in live else scale(world.u(scale(x, alpha), i), factor)
        x = x + world.delta(i, stop) * v
    return [x]
