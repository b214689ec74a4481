"""Adapters on a tiny random pipeline: what is bound, pushed, averaged, and exported for plain diffusers."""

import json

import pytest
import torch

from flowbp_ray.backbones.sd3 import SD3Backbone
from flowbp_ray.training import adapter

TARGETS = ["attn.to_q", "attn.to_v", "ff.net.2"]
LORA = {"rank": 4, "alpha": 12.0, "targets": TARGETS}
PROMPTS, SEEDS = ["a red ring", "a ring above a cross"], [5, 6]


@pytest.fixture
def backbone(tiny_pipeline):
    return SD3Backbone.from_pretrained(tiny_pipeline)


def trained(state):
    """The state after 'training': B away from zero."""
    generator = torch.Generator().manual_seed(3)
    return {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items()}


def pictures(backbone):
    return backbone.sample(PROMPTS, SEEDS, steps=2, guidance_scale=3.0, height=64, width=64)


def test_a_fresh_adapter_is_the_base_and_only_it_trains(backbone):
    before = pictures(backbone)
    names = adapter.add_adapter(backbone, **LORA, seed=0)
    assert torch.equal(pictures(backbone), before)
    assert len(names) == 12  # three targets in four blocks
    trainable = [n for n, p in backbone.transformer.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(names)
    assert all("lora_" in n for n in trainable)


def test_the_same_seed_is_the_same_adapter(tiny_pipeline):
    states = []
    for seed in (0, 0, 1):
        backbone = SD3Backbone.from_pretrained(tiny_pipeline)
        adapter.add_adapter(backbone, **LORA, seed=seed)
        states.append(adapter.checksum(adapter.read(backbone.transformer)))
    assert states[0] == states[1] != states[2]


def test_a_target_that_binds_nothing_is_refused(backbone):
    with pytest.raises(ValueError, match=r"'attn9\.to_q' binds no linear module of SD3Transformer2DModel"):
        adapter.add_adapter(backbone, rank=4, alpha=4, targets=["attn.to_q", "attn9.to_q"], seed=0)


def test_pushed_weights_arrive_and_change_the_picture(backbone, tiny_pipeline):
    adapter.add_adapter(backbone, **LORA, seed=0)
    before, state = pictures(backbone), trained(adapter.read(backbone.transformer))
    adapter.write(backbone.transformer, state)
    assert adapter.checksum(adapter.read(backbone.transformer)) == adapter.checksum(state)
    assert (pictures(backbone) - before).abs().max() > 0.01
    with pytest.raises(ValueError, match="does not fit"):
        adapter.write(backbone.transformer, dict(list(state.items())[1:]))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_plain_diffusers_makes_the_same_pictures_from_the_export(backbone, tiny_pipeline, plain_diffusers, tmp_path, strength):
    base_pictures = pictures(backbone)
    adapter.add_adapter(backbone, **LORA, seed=0)
    state = trained(adapter.read(backbone.transformer))
    adapter.write(backbone.transformer, state)
    backbone.transformer.set_adapters("default", strength)
    ours = pictures(backbone)
    adapter.export(backbone, state, tmp_path / "adapter", weights="ema", strength=strength)
    lora = tmp_path / "adapter"
    plain = plain_diffusers(tiny_pipeline, PROMPTS, SEEDS, steps=2, guidance_scale=3.0, lora=lora)
    assert (plain - ours).abs().max() <= 1e-4
    assert (plain - base_pictures).abs().max() > 0.01
    note = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert note == {
        "weights": "ema",
        "strength": strength,
        "rank": 4,
        "alpha": strength * 12,
        "checksum": adapter.checksum(state),
    }


def test_an_export_is_a_start(backbone, tiny_pipeline, tmp_path):
    adapter.add_adapter(backbone, **LORA, seed=0)
    state = trained(adapter.read(backbone.transformer))
    adapter.write(backbone.transformer, state)
    adapter.export(backbone, state, tmp_path, weights="raw")
    again = SD3Backbone.from_pretrained(tiny_pipeline)
    assert adapter.checksum(adapter.load_export(again, tmp_path)) == adapter.checksum(state)
    assert torch.equal(pictures(again), pictures(backbone))
    assert len(adapter.parameters(again.transformer)) == len(state)


def test_a_missing_and_a_foreign_adapter_are_refused(backbone, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no adapter in"):
        adapter.load_export(backbone, tmp_path)
    save_file(
        {"unet.down.lora_A.weight": torch.zeros(4, 4), "unet.down.lora_B.weight": torch.zeros(4, 4)},
        tmp_path / adapter.EXPORT_FILE,
    )
    with pytest.raises(ValueError, match="binds nothing"):
        adapter.load_export(backbone, tmp_path)


def test_the_average_moves_by_one_minus_the_decay():
    averaged = adapter.average({"a": torch.tensor([1.0])}, {"a": torch.tensor([3.0])}, decay=0.75)
    assert averaged["a"].item() == pytest.approx(1.5)
