"""Narrow random models of the rewards' real classes, saved under the names and in the files that they are published in."""

from itertools import pairwise

import torch
from torch import nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from flowbp_ray.config.reward import FILES
from flowbp_ray.shapes.build.text import clip_tokenizer

PROMPTS = ["a red ring", "two crosses above a blue ring"]
LONG = " ".join(["a red ring above a blue cross"] * 8)


def shaken(module):
    """Weights that make every input count: all random, those of norms about 1."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in module.named_parameters():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and name.endswith("weight")), std=0.2)
    return module.eval()


def clip_model(hidden_act="quick_gelu"):
    """Attention heads as wide as ViT-H-14's: 2 of 64 in text, 2 of 80 in vision."""
    tokenizer = clip_tokenizer()
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": hidden_act, "projection_dim": 24}
    text = {
        "hidden_size": 128, "intermediate_size": 96, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id, "max_position_embeddings": tokenizer.model_max_length,
    }  # fmt: skip
    vision = {"hidden_size": 160, "intermediate_size": 112, "image_size": 32, "patch_size": 8}
    return shaken(CLIPModel(CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=24)))


def saved_clip(folder):
    """A folder with a CLIP and its tokenizer."""
    clip_model().save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder


def as_open_clip(model):
    """The weights of transformers' CLIPModel under open_clip's names."""
    theirs, ours = {}, model.state_dict()

    def both(new, old):
        for kind in ("weight", "bias"):
            theirs[f"{new}.{kind}"] = ours[f"{old}.{kind}"]

    for prefix, tower, config in (
        ("", "text_model", model.config.text_config),
        ("visual.", "vision_model", model.config.vision_config),
    ):
        theirs[f"{prefix}positional_embedding"] = ours[f"{tower}.embeddings.position_embedding.weight"]
        for i in range(config.num_hidden_layers):
            block, layer = f"{prefix}transformer.resblocks.{i}", f"{tower}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                parts = [ours[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                theirs[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
            both(f"{block}.attn.out_proj", f"{layer}.self_attn.out_proj")
            both(f"{block}.ln_1", f"{layer}.layer_norm1")
            both(f"{block}.ln_2", f"{layer}.layer_norm2")
            both(f"{block}.mlp.c_fc", f"{layer}.mlp.fc1")
            both(f"{block}.mlp.c_proj", f"{layer}.mlp.fc2")
    theirs["logit_scale"] = ours["logit_scale"]
    theirs["token_embedding.weight"] = ours["text_model.embeddings.token_embedding.weight"]
    theirs["visual.class_embedding"] = ours["vision_model.embeddings.class_embedding"]
    theirs["visual.conv1.weight"] = ours["vision_model.embeddings.patch_embedding.weight"]
    both("visual.ln_pre", "vision_model.pre_layrnorm")
    both("visual.ln_post", "vision_model.post_layernorm")
    both("ln_final", "text_model.final_layer_norm")
    theirs["text_projection"] = ours["text_projection.weight"].T
    theirs["visual.proj"] = ours["visual_projection.weight"].T
    return theirs


def saved_hpsv2(folder):
    """A folder with HPSv2.1's file and a tokenizer."""
    clip_tokenizer().save_pretrained(folder)
    torch.save({"state_dict": as_open_clip(clip_model("gelu"))}, folder / FILES["hpsv2"].weights)
    return folder


def head(widths):
    """The published head: linear layers, and dropouts that only its training had, which its names count."""
    a, b, c, d, e = (nn.Linear(i, o) for i, o in pairwise(widths))
    return shaken(nn.Sequential(a, nn.Dropout(), b, nn.Dropout(), c, nn.Dropout(), d, e))


def saved_aesthetic(folder):
    """A folder with the aesthetic predictor's file and a CLIP."""
    layers = head((24, 20, 16, 8, 4, 1)).state_dict()
    torch.save({f"layers.{name}": tensor for name, tensor in layers.items()}, folder / FILES["aesthetic"].weights)
    return saved_clip(folder)


VISION_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "post_layernorm": "norm",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def blip_name(name):
    """BLIP's name of a weight of transformers' vision tower."""
    if name in VISION_NAMES:
        return VISION_NAMES[name]
    stem, _, kind = name.rpartition(".")
    if stem.startswith("encoder.layers."):
        number, _, part = stem.removeprefix("encoder.layers.").partition(".")
        return f"blocks.{number}.{VISION_NAMES[part]}.{kind}"
    return f"{VISION_NAMES[stem]}.{kind}"


def saved_image_reward(folder):
    """A folder with ImageReward's file and a tokenizer; attention heads are 64 wide, as the published ones."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ring", "two", "crosses", "above", "blue", "cross"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    shared = {"intermediate_size": 96, "num_hidden_layers": 2}
    vision = BlipVisionConfig(hidden_size=192, num_attention_heads=3, image_size=32, patch_size=8, **shared)
    text = BlipTextConfig(
        hidden_size=128, num_attention_heads=2, encoder_hidden_size=192, vocab_size=16, max_position_embeddings=40, **shared
    )
    tensors = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None], "blip.text_proj.weight": torch.ones(4, 128)}
    for name, tensor in shaken(BlipVisionModel(vision)).state_dict().items():
        tensors[f"blip.visual_encoder.{blip_name(name)}"] = tensor
    for name, tensor in shaken(BlipTextModel(text, add_pooling_layer=False)).state_dict().items():
        tensors[f"blip.text_encoder.{name}"] = tensor
    for name, tensor in head((128, 20, 16, 8, 4, 1)).state_dict().items():
        tensors[f"mlp.layers.{name}"] = tensor
    torch.save(tensors, folder / FILES["image_reward"].weights)
    return folder
