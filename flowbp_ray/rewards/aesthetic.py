"""LAION's aesthetic predictor v2: a linear head on CLIP ViT-L/14's picture embedding; prompts play no part.

Source: github.com/christophschuhmann/improved-aesthetic-predictor.
"""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from flowbp_ray.rewards.checkpoints import Weights, fill, read
from flowbp_ray.rewards.clip import pixel_values, pretrained


def head(weights: Weights) -> nn.Sequential:
    """Embeddings ``(B, 768)`` to ``(B, 1)``: 768-1024-128-64-16-1 with no activations between, as published."""
    # Training had a dropout after each of the first three, which still counts in the names.
    places: list[nn.Module] = [nn.Identity() for _ in range(8)]
    for number in (0, 2, 4, 6, 7):
        outputs, inputs = weights[f"layers.{number}.weight"].shape
        places[number] = nn.Linear(inputs, outputs)
    layers = nn.Sequential(*places)
    fill(layers, weights.under("layers."))
    return layers


class Aesthetic(nn.Module):
    """The head on the embedding of length 1."""

    def __init__(self, checkpoint: Path, clip: str | Path) -> None:
        super().__init__()
        self.head = head(read(checkpoint))
        self.clip = pretrained(clip)
        del self.clip.text_model, self.clip.text_projection  # a third of its memory

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """One score a picture: ``(B,)`` from pictures ``(B, 3, H, W)`` in 0…1."""
        pixels = pixel_values(images, self.clip.config.vision_config.image_size)
        embeddings = self.clip.get_image_features(pixel_values=pixels.to(self.clip.dtype)).pooler_output
        return self.head(F.normalize(embeddings, dim=-1))[:, 0].float()
