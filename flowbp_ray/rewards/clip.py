"""CLIP models: PickScore, CLIPScore, and the embedded default's reward and judge are all `CLIPModel`s."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from flowbp_ray.rewards.tokens import Tokens

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def pixel_values(images: Tensor, size: int) -> Tensor:
    """CLIP's input ``(B, 3, size, size)`` from pictures ``(B, 3, H, W)`` in 0…1, differentiable.

    As CLIP's processor does it, on tensors: the shorter side to ``size`` (bicubic, antialiased), the centre
    cut out, mean and spread taken out.
    """
    shorter = min(images.shape[-2:])
    if shorter != size:
        shape = [size * side // shorter for side in images.shape[-2:]]
        images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return normalised(images[..., top : top + size, left : left + size])


def normalised(images: Tensor) -> Tensor:
    """Pictures ``(B, 3, H, W)`` in 0…1 with CLIP's mean and spread taken out."""
    mean, std = (torch.tensor(c, device=images.device, dtype=images.dtype).view(3, 1, 1) for c in (MEAN, STD))
    return (images - mean) / std


def cosine(model: CLIPModel, pixels: Tensor, input_ids: Tensor) -> Tensor:
    """The cosine ``(texts, pictures)`` of the embeddings."""
    images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    texts = F.normalize(model.get_text_features(input_ids=input_ids).pooler_output, dim=-1)
    return texts @ images.T


def similarity(model: CLIPModel, pixels: Tensor, input_ids: Tensor) -> Tensor:
    """Logits ``(texts, pictures)``: the model's logit scale times the cosine of the embeddings."""
    return model.logit_scale.exp() * cosine(model, pixels, input_ids)


def pretrained(source: str | Path) -> CLIPModel:
    """The frozen CLIP, in float32, of a folder or Hugging Face id; ValueError if that has not all of its weights.

    (transformers makes up what is missing, with no more than a line in the log, and the scores are noise.)
    """
    model, found = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True, use_safetensors=True)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{source} is no CLIPModel: it has no {missing[0]}")
    return model.requires_grad_(False).eval()


def clip_tokens(reward: str, model: CLIPModel, source: str | Path) -> Tokens:
    """The tokenizer of a folder or Hugging Face id, for the model's length; ValueError if it is not of the model's kind.

    Behind its end token a prompt may be padded with anything: attention looks back only, and what is embedded is that token.
    """
    tokenizer, config = CLIPTokenizer.from_pretrained(source), model.config.text_config
    # An end that the model doesn't know (older models take the largest id for it) would silently embed the start instead.
    if tokenizer.eos_token_id not in (config.eos_token_id, config.vocab_size - 1):
        raise ValueError(f"the tokenizer {source} does not go with {reward}: it ends prompts with token {tokenizer.eos_token_id}")
    return Tokens(reward, tokenizer, config.max_position_embeddings)


class CLIPScore(nn.Module):
    """Logit scale times cosine, not divided by anything (PickScore's), or if not ``scaled`` the cosine (CLIPScore)."""

    def __init__(self, path: str | Path, tokenizer: str | Path | None = None, *, scaled: bool = True) -> None:
        super().__init__()
        self.model = pretrained(path)
        self.tokens = clip_tokens(str(path), self.model, tokenizer or path)
        self.score = similarity if scaled else cosine

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """One score a picture: ``(B,)`` from pictures ``(B, 3, H, W)`` in 0…1 and ``B`` prompts."""
        input_ids = self.tokens(prompts, images).input_ids
        pixels = pixel_values(images, self.model.config.vision_config.image_size)
        return self.score(self.model, pixels.to(self.model.dtype), input_ids).diagonal().float()
