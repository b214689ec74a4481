"""The adapter on a tiny random pipeline of the real classes, in the real on-disk format."""

import pytest
import torch

from flowbp_ray.backbones.sd3 import SD3Backbone

PROMPTS, SEEDS, STEPS, GUIDANCE = ["a red ring", "a ring above a cross"], [5, 6], 4, 3.0

pytestmark = pytest.mark.parametrize("tiny_pipeline", [1.0, 3.0], indirect=True, ids=["shift1", "shift3"])


def test_same_pictures_as_plain_diffusers(tiny_pipeline, plain_diffusers):
    sampling = {"steps": STEPS, "guidance_scale": GUIDANCE}
    ours = SD3Backbone.from_pretrained(tiny_pipeline).sample(PROMPTS, SEEDS, **sampling, height=64, width=64)
    assert ours.std() > 0.01
    assert (ours - plain_diffusers(tiny_pipeline, PROMPTS, SEEDS, **sampling)).abs().max() <= 1e-4


def test_grid_runs_from_one_to_zero_with_the_schedulers_shift(tiny_pipeline):
    backbone = SD3Backbone.from_pretrained(tiny_pipeline)
    sigmas, shift = backbone.grid(4, 64, 64), backbone.pipeline.scheduler.config.shift
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert sigmas[3] == pytest.approx(shift * 0.25 / (1 + (shift - 1) * 0.25))


def test_guidance_is_the_negative_plus_w_times_the_difference(tiny_pipeline):
    backbone = SD3Backbone.from_pretrained(tiny_pipeline)
    conditioning, negative = backbone.encode(PROMPTS), backbone.encode([""])
    latents = backbone.initial_latents([torch.Generator().manual_seed(s) for s in SEEDS], 64, 64)
    sigma = torch.tensor(0.6)
    conditional = backbone.velocity(latents, sigma, conditioning)
    unconditional = backbone.velocity(latents, sigma, backbone.encode(["", ""]))
    guided = backbone.velocity(latents, sigma, conditioning, negative, 3.0)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.velocity(latents, sigma, conditioning, negative, 1.0), conditional)


def test_decode_is_differentiable_and_nothing_else_asks_for_gradients(tiny_pipeline):
    backbone = SD3Backbone.from_pretrained(tiny_pipeline)
    latents = torch.randn(1, 4, 16, 16, requires_grad=True)
    pictures = backbone.decode(latents)
    pictures.sum().backward()
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert latents.grad.abs().sum() > 0
    assert not any(p.requires_grad for part in (backbone.transformer, backbone.vae) for p in part.parameters())
