"""Adapters on a tiny random pipeline: what is bound, and exported for plain diffusers."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from flowbp_ray.backbones.sd3 import SD3Backbone
from flowbp_ray.config import load
from flowbp_ray.config.models import check_start
from flowbp_ray.training import EXPORT_FILE, adapter
from flowbp_ray.training.memory import peak

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
TARGETS = ["attn.to_q", "attn.to_v", "ff.net.2"]
LORA = {"rank": 4, "alpha": 12.0, "targets": TARGETS}
PROMPTS, SEEDS = ["a red ring", "a ring above a cross"], [5, 6]


@pytest.fixture
def backbone(tiny_pipeline):
    return SD3Backbone.from_pretrained(tiny_pipeline)


def moved(backbone):
    """The adapter after 'training', B away from zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters(backbone.transformer):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapter.read(backbone.transformer)


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


def test_in_bfloat16_it_is_float32_and_computes_as_the_model_does(tiny_pipeline):
    """Beside PEFT's own way, which casts the model's activations to float32."""
    gradients, most = [], []
    for cast in (False, True):
        backbone = SD3Backbone.from_pretrained(tiny_pipeline, torch.bfloat16)
        adapter.add_adapter(backbone, **LORA, seed=0)
        moved(backbone)
        for module in backbone.transformer.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = cast
        text = backbone.encode(PROMPTS)
        noise = backbone.initial_latents([torch.Generator().manual_seed(s) for s in SEEDS], 64, 64)
        most.append(peak(lambda b=backbone, n=noise, t=text: b.branch(n, torch.tensor(0.5), t, 1.0).square().mean().backward()))
        trained = adapter.parameters(backbone.transformer)
        assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()
    assert most[0] < 0.9 * most[1]


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


def test_unless_told_otherwise_every_attention_and_feed_forward_is_bound():
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=4, dual_attention_layers=(0,),
    )  # fmt: skip
    linears = {n for n, m in transformer.transformer_blocks.named_modules() if isinstance(m, torch.nn.Linear)}
    modulation = {n for n in linears if n.split(".")[1].startswith("norm")}
    assert modulation
    bound = adapter.matching(transformer, SD3Backbone.lora_targets(transformer))
    assert set(bound) == {f"transformer_blocks.{n}" for n in linears - modulation}
    assert "transformer_blocks.0.attn2.to_out.0" in bound
    assert "transformer_blocks.0.attn.to_add_out" in bound


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_plain_diffusers_makes_the_same_pictures_from_the_export(backbone, tiny_pipeline, plain_diffusers, tmp_path, strength):
    base_pictures = pictures(backbone)
    adapter.add_adapter(backbone, **LORA, seed=0)
    state = moved(backbone)
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
    state = moved(backbone)
    adapter.export(backbone, state, tmp_path, weights="raw")
    again = SD3Backbone.from_pretrained(tiny_pipeline)
    assert adapter.checksum(adapter.load_export(again, tmp_path)) == adapter.checksum(state)
    assert torch.equal(pictures(again), pictures(backbone))
    assert len(adapter.parameters(again.transformer)) == len(state)


def test_a_missing_and_a_foreign_adapter_are_refused(backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        adapter.load_export(backbone, tmp_path)
    save_file(
        {"unet.down.lora_A.weight": torch.zeros(4, 4), "unet.down.lora_B.weight": torch.zeros(4, 4)},
        tmp_path / EXPORT_FILE,
    )
    with pytest.raises(ValueError, match="binds nothing"):
        adapter.load_export(backbone, tmp_path)


def test_an_adapter_that_fits_in_part_is_refused(backbone, tiny_pipeline, tmp_path):
    adapter.add_adapter(backbone, **LORA, seed=0)
    adapter.export(backbone, adapter.read(backbone.transformer), tmp_path, weights="raw")
    tensors = load_file(tmp_path / EXPORT_FILE)
    block = "transformer.transformer_blocks.{}.attn.to_q.lora_{}.weight"
    extra = {block.format(9, "A"): torch.zeros(4, 8), block.format(9, "B"): torch.zeros(8, 4)}
    fewer = {k: v for k, v in tensors.items() if k != block.format(0, "B")}
    for changed, first, number in ((tensors | extra, block.format(9, "A"), 26), (fewer, block.format(0, "B"), 23)):
        save_file(changed, tmp_path / EXPORT_FILE)
        wanted = f"{first!r} is on one side only, of {number} tensors in the file and 24 in the model"
        with pytest.raises(ValueError, match=re.escape(wanted)):
            adapter.load_export(SD3Backbone.from_pretrained(tiny_pipeline), tmp_path)


def scaling(backbone):
    """What the adapted layers multiply by."""
    return {m.scaling["default"] for m in backbone.transformer.modules() if hasattr(m, "lora_A")}


def test_the_strength_of_an_export_is_in_it_once_however_often_training_starts_from_one(tiny_pipeline, tmp_path):
    settings = [f"model.path={tiny_pipeline}", "adapter.rank=4", "adapter.alpha=12"]
    start = load(SPARSE, settings)
    for number in range(3):
        backbone = adapter.adapted(start, "cpu")
        assert scaling(backbone) == {12 / 4}
        folder = tmp_path / str(number)
        adapter.export(backbone, moved(backbone), folder, weights="raw", strength=0.3)
        exported = SD3Backbone.from_pretrained(tiny_pipeline)
        adapter.load_export(exported, folder)
        (scale,) = scaling(exported)
        assert scale == pytest.approx(0.3 * 12 / 4)
        start = load(SPARSE, [*settings, f"adapter.init_from={folder}"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["adapter.rank=8"], "has rank 4: set adapter.rank, which is 8, to that"),
        (["adapter.alpha=6"], "has alpha 12: set adapter.alpha, which is 6, to that"),
    ],
)
def test_a_start_with_another_rank_or_alpha_says_what_to_set(backbone, tiny_pipeline, tmp_path, overrides, sentence):
    adapter.add_adapter(backbone, **LORA, seed=0)
    adapter.export(backbone, adapter.read(backbone.transformer), tmp_path, weights="raw", strength=0.5)
    settings = [f"model.path={tiny_pipeline}", "adapter.rank=4", "adapter.alpha=12", f"adapter.init_from={tmp_path}"]
    check_start(load(SPARSE, settings))
    with pytest.raises(ValueError, match=re.escape(f"the adapter in {tmp_path} {sentence}")):
        adapter.adapted(load(SPARSE, [*settings, *overrides]), "cpu")


def test_an_adapter_of_more_than_two_matrices_is_refused(backbone, tiny_pipeline, tmp_path):
    """DoRA, whose directions and lengths are apart; diffusers loads it."""
    names = adapter.matching(backbone.transformer, TARGETS)
    backbone.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names, use_dora=True))
    adapter.export(backbone, adapter.read(backbone.transformer), tmp_path, weights="raw")
    with pytest.raises(ValueError, match=r"the adapter of transformer_blocks\.0\.attn\.to_q is no plain LoRA"):
        adapter.load_export(SD3Backbone.from_pretrained(tiny_pipeline), tmp_path)


def test_a_file_that_is_no_adapter_or_no_single_one_is_no_start(tmp_path):
    config = load(SPARSE, [f"adapter.init_from={tmp_path}"])
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        check_start(config)
    (tmp_path / EXPORT_FILE).write_bytes(b"not at all")
    with pytest.raises(ValueError, match="is no safetensors file, or cut short"):
        check_start(config)
    save_file({f"transformer.{r}.lora_A.weight": torch.zeros(r, 4) for r in (2, 4)}, tmp_path / EXPORT_FILE)
    with pytest.raises(ValueError, match=r"has no one rank and alpha for all its modules \(ranks \[2, 4\]\)"):
        check_start(config)
