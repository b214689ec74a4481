"""The adapter on a tiny random pipeline of the real classes, in the real on-disk format."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from flowbp_ray.backbones.sd3 import SD3Backbone

PROMPTS, SEEDS, STEPS, GUIDANCE = ["a red ring", "a ring above a cross"], [5, 6], 4, 3.0

PLAIN = """
import sys
sys.modules["flowbp_ray"] = None  # any import of the project fails
import numpy, torch
from diffusers import StableDiffusion3Pipeline
folder, output, prompts, seeds, steps, guidance = sys.argv[1], sys.argv[2], *map(eval, sys.argv[3:])
pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
pictures = pipeline(
    prompts,
    generator=[torch.Generator().manual_seed(s) for s in seeds],
    sigmas=numpy.linspace(1, 1 / steps, steps).tolist(),
    num_inference_steps=steps,
    guidance_scale=guidance,
    height=64,
    width=64,
    max_sequence_length=8,
    output_type="np",
).images
numpy.save(output, pictures)
"""


def plain_diffusers(folder, tmp_path, steps=STEPS, guidance=GUIDANCE):
    """Pictures (B, 3, 64, 64) of the stock pipeline, in a process and a folder without this project."""
    output = tmp_path / "plain.npy"
    values = [repr(v) for v in (PROMPTS, SEEDS, steps, guidance)]
    subprocess.run([sys.executable, "-I", "-c", PLAIN, str(folder), str(output), *values], check=True, cwd=tmp_path)
    return torch.from_numpy(np.load(output)).permute(0, 3, 1, 2)


pytestmark = pytest.mark.parametrize("tiny_pipeline", [1.0, 3.0], indirect=True, ids=["shift1", "shift3"])


def test_same_pictures_as_plain_diffusers(tiny_pipeline, tmp_path):
    ours = SD3Backbone.from_pretrained(tiny_pipeline).sample(
        PROMPTS, SEEDS, steps=STEPS, guidance_scale=GUIDANCE, height=64, width=64
    )
    plain = plain_diffusers(tiny_pipeline, tmp_path)
    assert ours.std() > 0.01
    assert (ours - plain).abs().max() <= 1e-4


def test_grid_runs_from_one_to_zero_with_the_schedulers_shift(tiny_pipeline):
    backbone = SD3Backbone.from_pretrained(tiny_pipeline)
    sigmas, shift = backbone.grid(4), backbone.pipeline.scheduler.config.shift
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
