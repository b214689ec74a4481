"""Rows of attention backends, on a tiny model and the CPU."""

import pytest
import tiny
import torch
from diffusers.models.attention_dispatch import attention_backend

from flowbp_ray.backbones.flux1 import FluxBackbone
from flowbp_ray.surrogate.backward import Guidance
from flowbp_ray.training.adapter import add_adapter
from pipelines import attention_cost
from pipelines.update_cost import Update


@pytest.fixture
def update():
    backbone = FluxBackbone(tiny.flux1())
    add_adapter(backbone, rank=2, alpha=2, targets=backbone.lora_targets(backbone.transformer), seed=0)
    latents = backbone.initial_latents([torch.Generator().manual_seed(0)], 32, 48)
    sigmas = backbone.grid(4, 32, 48)
    return Update(backbone, backbone.encode(["a ring"]), backbone.encode([""]), Guidance(), 3.5, sigmas, latents)


def test_a_backend_that_is_not_here_says_why_and_others_have_their_row(update):
    with attention_backend("native"):  # diffusers keeps the last one for the whole process
        rows = {name: attention_cost.row(update, name, 1) for name in ("native", "_native_flash", "_native_efficient", "flash")}
    for name in ("native", "_native_flash"):
        assert rows[name]["velocity"] > 0 < rows[name]["step"]
        assert rows[name]["failed"] is None
    for name in ("_native_efficient", "flash"):
        assert rows[name]["velocity"] is rows[name]["step"] is None
        assert rows[name]["failed"]
    found = {"model": "flux1", "device": "CPU", "dtype": "float32", "batch": 1, "height": 32, "width": 48, "repeats": 1}
    text = attention_cost.table(found | {"rows": list(rows.values())})
    assert rows["flash"]["failed"] in text.splitlines()[5]
    assert "1.00" in text.splitlines()[2]


def test_a_model_without_a_choice_is_refused():
    with pytest.raises(ValueError, match="no choice of backends for SD3Transformer2DModel"):
        attention_cost.measure("sd35", 1, 512, 512, 1, print)
