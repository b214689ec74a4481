import json

import make_open_clip_expected
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_rewards import LONG, PROMPTS, as_open_clip, clip_model, saved_hpsv2
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from flowbp_ray.config.reward import FILES
from flowbp_ray.rewards.checkpoints import Weights, fill, read
from flowbp_ray.rewards.clip import MEAN, STD
from flowbp_ray.rewards.hpsv2 import HPSv2, config_of, pixel_values, translated
from flowbp_ray.shapes.build.text import clip_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_hpsv2(tmp_path_factory.mktemp("hpsv2"))


@pytest.fixture
def reward(folder):
    return HPSv2(folder / FILES["hpsv2"].weights, folder)


def test_embeddings_are_those_of_the_model_whose_weights_the_file_has(reward):
    torch.manual_seed(0)
    model, pixels = clip_model("gelu"), torch.randn(3, 3, 32, 32)
    ids = clip_tokenizer()(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    for ours, theirs in (
        (reward.model.get_image_features(pixel_values=pixels), model.get_image_features(pixel_values=pixels)),
        (reward.model.get_text_features(input_ids=ids), model.get_text_features(input_ids=ids)),
    ):
        torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, rtol=0, atol=1e-4)


def test_embeddings_are_open_clips_own(tmp_path):
    expected = json.loads(make_open_clip_expected.FILE.read_text())
    tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in make_open_clip_expected.weights(expected["shapes"]).items()}
    weights = translated(Weights(tmp_path, tensors))
    model = CLIPModel(config_of(weights)).eval()
    fill(model, weights)
    ids = torch.tensor(make_open_clip_expected.IDS)
    images = model.get_image_features(pixel_values=torch.from_numpy(make_open_clip_expected.pixels())).pooler_output
    texts = model.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(images, torch.tensor(expected["images"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(texts, torch.tensor(expected["texts"]), rtol=0, atol=1e-4)
    assert images.std() > 0.5
    assert texts.std() > 0.5


def block(weights, prefix, heads):
    """open_clip's residual block by torch's own layer, which is the same: norms first, exact GELU."""
    inner, width = weights[f"{prefix}.mlp.c_fc.weight"].shape
    layer = nn.TransformerEncoderLayer(width, heads, inner, 0.0, "gelu", batch_first=True, norm_first=True).double()
    names = {"self_attn": "attn", "norm1": "ln_1", "norm2": "ln_2", "linear1": "mlp.c_fc", "linear2": "mlp.c_proj"}
    state = {}
    for name in layer.state_dict():
        part, _, rest = name.partition(".")
        state[name] = weights[f"{prefix}.{names[part]}.{rest}"]
    layer.load_state_dict(state)
    return layer.requires_grad_(False)


def norm(weights, name, x):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def open_clip_cosine(weights, pixels, ids):
    x = F.conv2d(pixels, weights["visual.conv1.weight"], stride=8).flatten(2).mT
    x = torch.cat([weights["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + weights["visual.positional_embedding"]
    x = norm(weights, "visual.ln_pre", x)
    for i in range(2):
        x = block(weights, f"visual.transformer.resblocks.{i}", 2)(x)
    seen = norm(weights, "visual.ln_post", x[:, 0]) @ weights["visual.proj"]
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
    mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
    for i in range(2):
        x = block(weights, f"transformer.resblocks.{i}", 2)(x, src_mask=mask)
    read = norm(weights, "ln_final", x)[torch.arange(len(ids)), ids.argmax(-1)] @ weights["text_projection"]
    return F.cosine_similarity(seen, read)


def test_score_and_gradient_are_those_of_the_formula_on_open_clips_weights_and_padding(folder, reward):
    weights = {k: v.double() for k, v in read(folder / FILES["hpsv2"].weights, "state_dict").items()}
    images = torch.rand(2, 3, 40, 56, dtype=torch.float64, requires_grad=True)
    rows = [row + [0] * (16 - len(row)) for row in clip_tokenizer()(PROMPTS).input_ids]
    there = open_clip_cosine(weights, pixel_values(images, 32), torch.tensor(rows))
    here = reward.double()(images, PROMPTS)
    assert here.dtype == torch.float32
    torch.testing.assert_close(here.double(), there, rtol=0, atol=1e-6)
    ours, theirs = (torch.autograd.grad(scores.sum(), images)[0] for scores in (here, there))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    assert theirs.abs().max() > 1e-5


def test_the_published_shapes_give_vit_h_14():
    tower = {"num_attention_heads": 16, "projection_dim": 1024}
    text = tower | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision = tower | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14}
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024))
    config = config_of(translated(Weights("HPS_v2.1_compressed.pt", as_open_clip(model))))
    for found, known in ((config.text_config, text), (config.vision_config, vision | {"image_size": 224})):
        assert known.items() <= found.to_dict().items()
    assert (config.text_config.vocab_size, config.text_config.max_position_embeddings) == (49408, 77)
    assert config.text_config.eos_token_id == 49407
    assert sum(p.numel() for p in model.parameters()) == 986_109_441  # open_clip's ViT-H-14


@pytest.mark.parametrize("shape", [(64, 64), (96, 61), (45, 128), (20, 31), (64, 33), (31, 64)])
def test_a_picture_is_resized_by_its_longer_side_and_padded_before_it_is_normalised(shape):
    picture = np.random.default_rng(0).random((*shape, 3), np.float32)
    height, width = (round(side * 64 / max(shape)) for side in shape)
    # Pillow resizes single floats as torch does, and neither rounds nor clamps.
    parts = [Image.fromarray(np.ascontiguousarray(picture[..., c])) for c in range(3)]
    resized = np.stack([np.asarray(p.resize((width, height), Image.Resampling.BICUBIC)) for p in parts])
    square = np.zeros((3, 64, 64), np.float32)
    top, left = (64 - height) // 2, (64 - width) // 2
    square[:, top : top + height, left : left + width] = resized
    expected = (square - np.array(MEAN).reshape(3, 1, 1)) / np.array(STD).reshape(3, 1, 1)
    ours = pixel_values(torch.from_numpy(picture).permute(2, 0, 1)[None], 64)[0]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_a_prompt_that_is_too_long_is_cut_and_that_is_said_once(reward, recwarn):
    images = torch.rand(2, 3, 32, 32)
    first = reward(images, [PROMPTS[0], LONG])
    second = reward(images, [PROMPTS[0], LONG])
    assert [str(w.message) for w in recwarn] == [f"HPSv2 reads 16 tokens and {LONG!r} has 58: its end is not scored"]
    ids = [[*clip_tokenizer()(LONG).input_ids[:15], clip_tokenizer().eos_token_id]]
    read = reward.model.get_text_features(input_ids=torch.tensor(ids)).pooler_output
    seen = reward.model.get_image_features(pixel_values=pixel_values(images[1:], 32)).pooler_output
    torch.testing.assert_close(first[1:], F.cosine_similarity(seen, read))
    torch.testing.assert_close(first, second)


def test_a_prompt_that_just_fits_is_not_talked_about(reward, recwarn):
    reward(torch.rand(1, 3, 32, 32), [" ".join(["red"] * 14)])
    assert not recwarn


def test_another_file_is_refused_in_one_sentence(folder, tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"other\.pt is another reward's checkpoint, or none: it has no state_dict"):
        HPSv2(path, folder)
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=r"other\.pt is another reward's checkpoint, or none: it has no text_proj"):
        HPSv2(path, folder)
    state = as_open_clip(clip_model("gelu"))
    del state["visual.ln_pre.bias"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(
        ValueError, match=r"other\.pt is .*: Missing key\(s\) in state_dict: \"vision_model\.pre_layrnorm\.bias\""
    ):
        HPSv2(path, folder)
    path.write_text("<html>")
    with pytest.raises(ValueError, match=r"other\.pt is no file of weights: Weights only load failed"):
        HPSv2(path, folder)


def test_a_tokenizer_with_another_end_is_refused(folder, tmp_path):
    tokenizer = clip_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"the tokenizer {tmp_path} does not go with HPSv2: it ends prompts with token"):
        HPSv2(folder / FILES["hpsv2"].weights, tmp_path)
