"""ImageReward (arXiv 2304.05977): BLIP's text encoder reads the prompt while it looks at the picture, and a head scores that.

Source: the repository THUDM/ImageReward; BLIP's ViT-L/16 and its BERT's configuration (med_config.json).
"""

import math
from pathlib import Path

from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from flowbp_ray.rewards.aesthetic import head
from flowbp_ray.rewards.checkpoints import Weights, fill, read
from flowbp_ray.rewards.clip import pixel_values
from flowbp_ray.rewards.tokens import Tokens

LENGTH = 35  # tokens
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output
HEAD = 64  # channels of an attention head, of both towers

#: The names of BLIP's vision tower and transformers', in this order; its text tower's are the same in both.
NAMES = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    ("norm.", "post_layernorm."),
)


def vision_config(weights: Weights) -> BlipVisionConfig:
    """The configuration that the vision tower's shapes say."""
    width, _, _, patch = weights["embeddings.patch_embedding.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=weights.count(".mlp.fc1.weight"),
        num_attention_heads=max(1, width // HEAD),
        patch_size=patch,
        image_size=patch * math.isqrt(weights["embeddings.position_embedding"].shape[1] - 1),
        layer_norm_eps=1e-6,
    )


def text_config(weights: Weights) -> BlipTextConfig:
    """The configuration that the text tower's shapes say."""
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=weights.count(".intermediate.dense.weight"),
        num_attention_heads=max(1, width // HEAD),
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
    )


class ImageReward(nn.Module):
    """The head on the first token's hidden state, less the published mean and by the published spread."""

    def __init__(self, checkpoint: Path, tokenizer: str | Path) -> None:
        super().__init__()
        weights = read(checkpoint)
        vision, text = weights.under("blip.visual_encoder.", *NAMES), weights.under("blip.text_encoder.")
        text.pop("embeddings.position_ids", None)  # 0, 1, 2, …
        self.vision = BlipVisionModel(vision_config(vision))
        self.text = BlipTextModel(text_config(text), add_pooling_layer=False)
        fill(self.vision, vision)
        fill(self.text, text)
        self.head = head(weights.under("mlp."))
        self.tokens = Tokens("ImageReward", BertTokenizer.from_pretrained(tokenizer), LENGTH)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """One score a picture: ``(B,)`` from pictures ``(B, 3, H, W)`` in 0…1 and ``B`` prompts."""
        tokens = self.tokens(prompts, images)
        pixels = pixel_values(images, self.vision.config.image_size)
        seen = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        hidden = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        return ((self.head(hidden[:, 0])[:, 0] - MEAN) / STD).float()
