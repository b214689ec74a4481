"""Every family beside its stock pipeline, on tiny random models of the real classes in the real on-disk format."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend

from flowbp_ray import backbones
from flowbp_ray.backbones import FAMILIES, family_of
from flowbp_ray.surrogate.backward import Guidance, backward
from flowbp_ray.surrogate.methods import METHODS
from flowbp_ray.training import adapter

MADE = {"FluxPipeline": tiny.flux1, "Flux2KleinPipeline": tiny.flux2, "ZImagePipeline": tiny.z_image}
PROMPTS, SEEDS, STEPS = ["a red ring", "a ring above a cross"], [5, 6], 4
SIZE = {"height": 24, "width": 32}


@pytest.fixture(scope="module", params=MADE)
def folder(request, tmp_path_factory):
    return tiny.saved(MADE[request.param], tmp_path_factory.mktemp(request.param))


def stock(folder, guidance_scale):
    """Pictures of the stock pipeline at its own defaults; Z-Image counts guidance from 0."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    name = type(pipeline).__name__
    more = {} if name == "ZImagePipeline" else {"max_sequence_length": 8 if name == "FluxPipeline" else 24}
    if name == "Flux2KleinPipeline":
        more["text_encoder_out_layers"] = (1, 2, 3)
    pictures = pipeline(
        prompt=list(PROMPTS),  # Z-Image writes its chat template into the list
        generator=[torch.Generator().manual_seed(s) for s in SEEDS],
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale - (name == "ZImagePipeline"),
        output_type="np",
        **SIZE,
        **more,
    ).images
    return torch.from_numpy(np.asarray(pictures)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_same_pictures_as_the_stock_pipeline(folder, guidance_scale):
    ours = backbones.load(folder).sample(PROMPTS, SEEDS, steps=STEPS, guidance_scale=guidance_scale, **SIZE)
    assert ours.shape == (2, 3, SIZE["height"], SIZE["width"])
    assert ours.std() > 0.01
    assert (ours[0] - ours[1]).abs().max() > 0.01
    assert (ours - stock(folder, guidance_scale)).abs().max() <= 1e-4


def test_attention_is_of_diffusers_active_backend(folder, monkeypatch):
    """Which the environment variable DIFFUSERS_ATTN_BACKEND names."""
    backbone, calls = backbones.load(folder), []
    settings = {"steps": STEPS, "guidance_scale": 3.5, **SIZE}
    wanted = backbone.sample(PROMPTS, SEEDS, **settings)
    with attention_backend("_native_math"):
        named, used = _AttentionBackendRegistry.get_active_backend()
        monkeypatch.setitem(_AttentionBackendRegistry._backends, named, lambda *a, **k: calls.append(named) or used(*a, **k))
        pictures = backbone.sample(PROMPTS, SEEDS, **settings)
    assert set(calls) == {"_native_math"}
    assert (pictures - wanted).abs().max() <= 1e-4


def test_guidances_branches_are_the_same_one_after_the_other(folder):
    backbone = backbones.load(folder)
    settings = {"steps": STEPS, "guidance_scale": 3.5, **SIZE}
    batched = backbone.sample_latents(PROMPTS, SEEDS, **settings)
    backbone.batched_branches = False
    sizes, branch = [], backbone.branch
    backbone.branch = lambda latents, *more: sizes.append(len(latents)) or branch(latents, *more)
    apart = (backbone.sample_latents(PROMPTS, SEEDS, **settings) - batched).norm()
    assert apart <= 1e-4 * batched.norm()
    assert sizes == [len(PROMPTS)] * STEPS * (1 if backbone.embedded_guidance else 2)


def test_stock_and_training_grid_of_sd3(tiny_pipeline):
    """Of the families only this one's differ; both run from 1 to 0."""
    backbone = backbones.load(tiny_pipeline)
    training, stock_grid = (backbone.grid(25, 64, 64, kind) for kind in ("training", "stock"))
    assert training[0] == stock_grid[0] == 1
    assert training[-1] == stock_grid[-1] == 0
    assert training[-2].item() == pytest.approx(0.1111, abs=1e-4)  # published for shift 3 and 25 steps
    assert stock_grid[-2].item() == pytest.approx(0.0089, abs=1e-4)


def test_stock_grid_makes_the_stock_pipelines_pictures_of_sd3(tiny_pipeline):
    backbone = backbones.load(tiny_pipeline)
    settings = {"guidance_scale": 3.0, "height": 64, "width": 64}
    ours = backbone.sample(PROMPTS, SEEDS, steps=STEPS, kind="stock", **settings)
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    more = {"num_inference_steps": STEPS, "max_sequence_length": 8, "output_type": "np"}
    pictures = backbone.pipeline(PROMPTS, generator=generators, **settings, **more).images
    assert (ours - torch.from_numpy(pictures).permute(0, 3, 1, 2)).abs().max() <= 1e-4


def moved(folder):
    """With an adapter that is not the identity."""
    backbone = backbones.load(folder)
    bound = adapter.add_adapter(backbone, rank=2, alpha=4, targets=backbone.lora_targets(backbone.transformer), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters(backbone.transformer):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone, bound


def test_the_adapter_binds_every_attention_and_feed_forward(folder):
    backbone, bound = moved(folder)
    inside = {name for name, module in backbone.transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {id(b) for b in backbone.blocks(backbone.transformer)}
    stacked = {n for n, m in backbone.transformer.named_modules() if id(m) in blocks}
    meant = {
        n.removesuffix(".base_layer")
        for n in inside
        if any(n.startswith(f"{s}.") for s in stacked) and ".lora_" not in n and "norm" not in n and "adaLN" not in n
    }
    assert set(bound) == meant


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_engine_gives_the_whole_graphs_gradient(folder, checkpointing):
    backbone, _ = moved(folder)
    if checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
        backbone.transformer.train()
    text, negative, scale = backbone.encode(PROMPTS), backbone.encode([""]), 2.5
    sigmas = backbone.grid(STEPS, **SIZE)
    plan = METHODS["bridge"].plan(METHODS["bridge"].settings(active_steps=3), sigmas, np.random.default_rng(0))
    noise = backbone.initial_latents([torch.Generator().manual_seed(s) for s in SEEDS], **SIZE)
    latents = {0: noise}
    with torch.no_grad():
        for i in range(STEPS):
            v = backbone.velocity(latents[i], sigmas[i], text, negative, scale)
            latents[i + 1] = latents[i] + (sigmas[i + 1] - sigmas[i]) * v
    gradient = torch.randn(noise.shape, generator=torch.Generator().manual_seed(2))

    def field(x, index, branch):
        return backbone.branch(x, sigmas[index], text if branch == "conditional" else negative.expand(len(x)), scale)

    backward(plan, field, latents, [gradient], guidance=Guidance(1.0 if backbone.embedded_guidance else scale))
    parameters = adapter.parameters(backbone.transformer)
    ours = torch.cat([p.grad.flatten() for p in parameters])
    alphas, total = {b.index: b.alpha for b in plan.bridges}, torch.zeros_like(noise)
    for active in plan.active:
        x = latents[active.index] + alphas.get(active.index, 0.0) * (total - total.detach())
        guided = backbone.branch(x, sigmas[active.index], text, scale)
        if not backbone.embedded_guidance:
            with torch.no_grad():
                unguided = backbone.branch(x, sigmas[active.index], negative.expand(2), scale)
            guided = unguided + scale * (guided - unguided)
        total = total + active.coefficient * guided
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad((total * gradient).sum(), parameters)])
    assert (ours - wanted).norm() <= 1e-5 * wanted.norm()


PLAIN = """
import json, sys
sys.modules["flowbp_ray"] = None  # any import of the project fails
import torch
from diffusers import DiffusionPipeline
folder, lora, output = json.loads(sys.argv[1])
pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
pipeline.load_lora_weights(lora)
names = [n for n, m in pipeline.transformer.named_modules() if hasattr(m, "lora_A")]
torch.save({n: pipeline.transformer.get_submodule(n).get_delta_weight("default_0") for n in names}, output)
"""


def test_the_export_loads_in_plain_diffusers_and_in_here(folder, tmp_path):
    backbone, bound = moved(folder)
    adapter.export(backbone, adapter.read(backbone.transformer), tmp_path / "lora", weights="raw")
    again = backbones.load(folder)
    adapter.load_export(again, tmp_path / "lora")
    settings = {"steps": STEPS, "guidance_scale": 2.0, **SIZE}
    ours = backbone.sample(PROMPTS, SEEDS, **settings)
    assert (again.sample(PROMPTS, SEEDS, **settings) - ours).abs().max() <= 1e-5
    assert (backbones.load(folder).sample(PROMPTS, SEEDS, **settings) - ours).abs().max() > 1e-3
    arguments = json.dumps([str(folder), str(tmp_path / "lora"), str(tmp_path / "added.pt")])
    subprocess.run([sys.executable, "-I", "-c", PLAIN, arguments], check=True, cwd=tmp_path)
    added = torch.load(tmp_path / "added.pt", weights_only=True)
    assert set(added) == set(bound)
    for name, weight in added.items():
        torch.testing.assert_close(weight, backbone.transformer.get_submodule(name).get_delta_weight("default"))


def test_decoding_is_differentiable(folder):
    backbone = backbones.load(folder)
    latents = torch.randn(1, *backbone.latent_shape(**SIZE), requires_grad=True)
    assert backbone.latent_channels(backbone.vae) == latents.shape[1]
    pictures = backbone.decode(latents)
    pictures.sum().backward()
    assert pictures.shape == (1, 3, SIZE["height"], SIZE["width"])
    assert latents.grad.abs().sum() > 0


def test_the_checkpoint_says_its_family(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    assert family_of(folder) is FAMILIES[index["_class_name"]]
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline: the families that can be aligned are Stable"):
        family_of(tmp_path)


def test_distilled_checkpoints_take_no_guidance(tmp_path):
    backbone = backbones.load(tiny.saved(lambda: tiny.flux2(is_distilled=True), tmp_path))
    backbone.check_guidance(1.0)
    for refused in (backbone.check_guidance, lambda scale: backbone.sample(["a"], [0], steps=2, guidance_scale=scale, **SIZE)):
        with pytest.raises(ValueError, match="this checkpoint is distilled"):
            refused(4.0)


def test_a_size_of_no_whole_tokens_is_refused(folder):
    with pytest.raises(ValueError, match="pictures of 26×32 pixels: this model makes sizes that are multiples of 4"):
        backbones.load(folder).sample(["a"], [0], steps=2, guidance_scale=1.0, height=26, width=32)
