"""HPSv2.1 (arXiv 2306.09341): the cosine of a ViT-H-14 CLIP trained on preferences, read from open_clip's names.

Source: the model card of xswu/HPSv2 and the configuration of open_clip's ViT-H-14.
"""

import math
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from flowbp_ray.rewards.checkpoints import Weights, fill, read
from flowbp_ray.rewards.clip import clip_tokens, cosine, normalised

#: Channels of an attention head. They are not in the file; ViT-H-14's width of 1280 (text: 1024) makes 16 heads.
VISION_HEAD, TEXT_HEAD = 80, 64

#: open_clip's names and transformers', in this order.
NAMES = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.", ".self_attn."),
)


def translated(published: Weights) -> Weights:
    """open_clip's weights as those of transformers' CLIPModel: renamed, projections transposed, q, k and v taken apart."""
    tensors = {}
    for name, tensor in published.under("", *NAMES).items():
        if "in_proj_" in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                tensors[name.replace("in_proj_", f"{part}_proj.")] = third
        else:
            tensors[name] = tensor.T if name in ("visual_projection.weight", "text_projection.weight") else tensor
    return Weights(published.path, tensors)


def config_of(weights: Weights) -> CLIPConfig:
    """The configuration that the translated weights' shapes say."""
    dim = weights["text_projection.weight"].shape[0]
    text, vision = weights.under("text_model.embeddings."), weights.under("vision_model.embeddings.")
    vocabulary, patch = text["token_embedding.weight"].shape[0], vision["patch_embedding.weight"].shape[-1]
    side = math.isqrt(vision["position_embedding.weight"].shape[0] - 1)  # all positions but the class token's

    def tower(name: str, head: int) -> dict[str, int | str]:
        layers = weights.under(f"{name}.encoder.layers.")
        inner, width = layers["0.mlp.fc1.weight"].shape
        return {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers.count(".mlp.fc1.weight"),
            "num_attention_heads": max(1, width // head),
            "hidden_act": "gelu",  # the exact one
            "projection_dim": dim,
        }

    return CLIPConfig(
        text_config=tower("text_model", TEXT_HEAD)
        | {
            "vocab_size": vocabulary,
            "max_position_embeddings": text["position_embedding.weight"].shape[0],
            "eos_token_id": vocabulary - 1,  # what is embedded is the token of the largest id, the end of the text
        },
        vision_config=tower("vision_model", VISION_HEAD) | {"patch_size": patch, "image_size": patch * side},
        projection_dim=dim,
    )


def pixel_values(images: Tensor, size: int) -> Tensor:
    """HPSv2's input ``(B, 3, size, size)`` from pictures ``(B, 3, H, W)`` in 0…1, differentiable.

    The longer side to ``size`` (bicubic, antialiased, not clamped), black on both sides to a square, and only then mean and
    spread taken out.
    """
    scale = size / max(images.shape[-2:])
    shape = [round(side * scale) for side in images.shape[-2:]]
    if shape != list(images.shape[-2:]):
        images = F.interpolate(images, shape, mode="bicubic", antialias=True)
    height, width = size - shape[0], size - shape[1]
    return normalised(F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2)))


class HPSv2(nn.Module):
    """The cosine of picture and prompt, without logit scale."""

    def __init__(self, checkpoint: Path, tokenizer: str | Path) -> None:
        super().__init__()
        weights = translated(read(checkpoint, "state_dict"))
        self.model = CLIPModel(config_of(weights))
        fill(self.model, weights)
        self.tokens = clip_tokens("HPSv2", self.model, tokenizer)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """One score a picture: ``(B,)`` from pictures ``(B, 3, H, W)`` in 0…1 and ``B`` prompts."""
        input_ids = self.tokens(prompts, images).input_ids
        pixels = pixel_values(images, self.model.config.vision_config.image_size)
        return cosine(self.model, pixels.to(self.model.dtype), input_ids).diagonal().float()
