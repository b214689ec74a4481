"""The engine on the embedded default's SD3 transformer against plain autograd through the whole surrogate graph."""

import numpy as np
import pytest
import torch

from flowbp_ray.backbones.sd3 import SD3Backbone
from flowbp_ray.rollouts.rollout import roll_out
from flowbp_ray.shapes import BASE
from flowbp_ray.surrogate.backward import Guidance
from flowbp_ray.surrogate.methods import METHODS
from flowbp_ray.training import adapter
from flowbp_ray.training.update import accumulate

PROMPTS, STEPS, SCALE = ["a red ring", "a ring above a cross"], 4, 3.0
METHOD_SETTINGS = {
    "sparse": {"active_steps": 3, "late_bias": 1.0, "rescale": 0.5},
    "bridge": {"active_steps": 3, "alpha": 0.5},
    "lagrange": {"alpha": 0.5, "support_scale": 0.5},
}


@pytest.fixture(scope="module", params=METHOD_SETTINGS)
def scene(request):
    """A backbone with a moved adapter, encoded prompts, and a guided rollout of a plan."""
    backbone = SD3Backbone.from_pretrained(BASE)
    adapter.add_adapter(backbone, rank=4, alpha=4, targets=backbone.lora_targets(backbone.transformer), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters(backbone.transformer):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    text, negative = backbone.encode(PROMPTS), backbone.encode([""])
    sigmas = backbone.grid(STEPS, 64, 64)
    method = METHODS[request.param]
    plan = method.plan(method.settings(**METHOD_SETTINGS[request.param]), sigmas, np.random.default_rng(0))
    noise = backbone.initial_latents([torch.Generator().manual_seed(s) for s in (3, 4)], 64, 64)
    rollout = roll_out(noise, sigmas, lambda x, s: backbone.velocity(x, s, text, negative, SCALE), plan)
    gradient = torch.randn(rollout.latents[STEPS].shape, generator=generator)
    return backbone, text, negative, sigmas, plan, rollout, gradient


def gradients(backbone):
    parameters = adapter.parameters(backbone.transformer)
    taken = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return taken


def engine(scene, guidance, penalty=0.0, rows=slice(None)):
    backbone, text, negative, sigmas, plan, rollout, gradient = scene
    latents = {i: x[rows] for i, x in rollout.latents.items()}
    weights = torch.tensor([1.0, 0.5])[rows]
    accumulate(
        backbone, plan, sigmas, latents, [gradient[rows]], weights, text[rows], negative,
        guidance=guidance, guidance_scale=SCALE, batch=2, velocity_penalty=penalty,
    )  # fmt: skip


def whole_graph(scene, detach_negative, penalty=0.0):
    """The surrogate's graph as method.md writes it: x̂ moves with the active velocities and is pinned, at a bridge too."""
    backbone, text, negative, sigmas, plan, rollout, gradient = scene
    moved, distance = torch.zeros_like(gradient), 0.0
    alphas = {b.index: b.alpha for b in plan.bridges}
    for active in plan.active:
        x = rollout.latents[active.index]
        if active.index in alphas:
            x = x + alphas[active.index] * (moved - moved.detach())
        conditional = backbone.velocity(x, sigmas[active.index], text)
        unconditional = backbone.velocity(x, sigmas[active.index], negative.expand(2))
        if detach_negative:
            unconditional = unconditional.detach()
        moved = moved + active.coefficient * (unconditional + SCALE * (conditional - unconditional))
        if penalty:
            x = rollout.latents[active.index]  # the penalty does not cross bridges
            backbone.transformer.disable_adapters()
            with torch.no_grad():
                reference = backbone.velocity(x, sigmas[active.index], text)
            backbone.transformer.enable_adapters()
            distance = distance + (backbone.velocity(x, sigmas[active.index], text) - reference).square().mean()
    objective = ((moved * gradient).flatten(1).sum(1) * torch.tensor([1.0, 0.5])).mean()
    (penalty * distance / len(plan.active) - objective).backward()


@pytest.mark.parametrize("detach_negative", [True, False])
@pytest.mark.parametrize("penalty", [0.0, 3.0])
def test_gradient_is_that_of_the_whole_graph(scene, detach_negative, penalty):
    whole_graph(scene, detach_negative, penalty)
    reference = gradients(scene[0])
    engine(scene, Guidance(SCALE, detach_negative), penalty)
    ours = gradients(scene[0])
    assert reference.norm() > 0
    assert (ours - reference).norm() / reference.norm() <= 1e-5


def test_micro_batches_add_up(scene):
    engine(scene, Guidance(SCALE))
    together = gradients(scene[0])
    engine(scene, Guidance(SCALE), rows=slice(0, 1))
    engine(scene, Guidance(SCALE), rows=slice(1, 2))
    assert (gradients(scene[0]) - together).norm() / together.norm() <= 1e-5


def test_the_adapter_is_on_again_after_the_penalty(scene):
    backbone, text, _, sigmas, _, rollout, _ = scene
    before = backbone.velocity(rollout.latents[STEPS], sigmas[2], text)
    engine(scene, Guidance(SCALE), penalty=1.0)
    gradients(backbone)
    assert torch.equal(backbone.velocity(rollout.latents[STEPS], sigmas[2], text), before)
