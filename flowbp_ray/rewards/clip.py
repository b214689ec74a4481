"""CLIP preference models: PickScore and the embedded default's reward and judge are all `CLIPModel`s."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def pixel_values(images: Tensor, size: int) -> Tensor:
    """CLIP's input ``(B, 3, size, size)`` from pictures ``(B, 3, H, W)`` in 0…1, differentiable.

    As CLIP's processor does it, on tensors: the shorter side to ``size`` (bicubic, antialiased), the centre
    cut out, mean and spread taken out.
    """
    height, width = images.shape[-2:]
    if min(height, width) != size:
        scale = size / min(height, width)
        shape = (round(height * scale), round(width * scale))
        images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    images = images[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(c, device=images.device, dtype=images.dtype).view(3, 1, 1) for c in (MEAN, STD))
    return (images - mean) / std


def similarity(model: CLIPModel, pixels: Tensor, input_ids: Tensor) -> Tensor:
    """Logits ``(texts, pictures)``: the model's logit scale times the cosine of the embeddings."""
    images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    texts = F.normalize(model.get_text_features(input_ids=input_ids).pooler_output, dim=-1)
    return model.logit_scale.exp() * texts @ images.T


class CLIPScore(nn.Module):
    """The score of a CLIP preference model: logit scale times cosine, not divided by anything (PickScore's)."""

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = CLIPModel.from_pretrained(path, dtype=dtype).requires_grad_(False).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(path)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """One score a picture: ``(B,)`` from pictures ``(B, 3, H, W)`` in 0…1 and ``B`` prompts."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts: give one prompt for each picture")
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        pixels = pixel_values(images, self.model.config.vision_config.image_size)
        return similarity(self.model, pixels.to(self.model.dtype), tokens.input_ids.to(images.device)).diagonal().float()
