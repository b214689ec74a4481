"""Stage 3: the reward model and the held-out judge, transformers' own CLIPModel.

Trained the way PickScore was: a contrastive start, which here fades out over the first half of the same
run, and then comparisons, where the better of two pictures of a caption must score higher.
The judge has another width and seed, and sees other pictures; nothing is ever optimised against it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from flowbp_ray.rewards.clip import pixel_values, similarity
from flowbp_ray.shapes.build.loop import Schedule, train
from flowbp_ray.shapes.build.text import CLIP_LENGTH, clip_tokenizer
from flowbp_ray.shapes.preferences import random_pair
from flowbp_ray.shapes.world import SIZE as PICTURE


@dataclass(frozen=True)
class Size:
    """Width, depth and attention heads of both towers, and training steps."""

    width: int
    layers: int
    heads: int
    steps: int


PATCH = 8
REWARD, JUDGE = Size(96, 3, 3, steps=6000), Size(128, 3, 4, steps=6000)
PLACE_ALONE = 600  # steps
RADIUS, RADIUS_GROWS = 2.0, 1000  # length of the worst change of a picture's values, of 0…1; steps from none to all of it
SCHEDULE = Schedule(steps=REWARD.steps, batch=24, learning_rate=1e-3, decay=0.6)


class Comparisons(Dataset):
    """Fresh comparisons of training captions, a batch for every step number.

    The contrastive loss fades out over the first ``contrastive`` steps. The ``PLACE_ALONE`` steps after that compare
    places alone: among other pairs a model does not begin to tell "left of" from "right of". Then the ``radius`` grows
    within which `worst` changes the pictures. Without ``contrastive`` steps, the mix of places and all else comes at once.
    """

    def __init__(self, tokenizer: CLIPTokenizer, seed: int, batch: int, contrastive: int) -> None:
        self.tokenizer, self.seed, self.batch, self.contrastive = tokenizer, seed, batch, contrastive
        self.mixed = contrastive + PLACE_ALONE if contrastive else 0

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, step])
        kind = "place" if self.contrastive <= step < self.mixed else None
        pairs = [random_pair("training", rng, kind) for _ in range(self.batch)]
        texts = [p.caption for p in pairs] + [p.worse_caption or p.caption for p in pairs]
        pictures = np.stack([p.better for p in pairs] + [p.worse for p in pairs]).astype(np.float32) / 255
        # Light noise on both: what is compared is the content, and decoded pictures are never this clean.
        pictures += rng.uniform(0, 0.03, (len(pictures), 1, 1, 1)) * rng.standard_normal(pictures.shape)
        return {
            "input_ids": self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids,
            "pictures": torch.from_numpy(pictures).permute(0, 3, 1, 2).float(),
            "changed": torch.tensor([p.worse_caption is not None for p in pairs]),
            "radius": torch.from_numpy(rng.uniform(0, RADIUS, len(pictures))).float()
            * min(1.0, max(0.0, (step - self.mixed) / RADIUS_GROWS)),
            "contrast": torch.tensor(max(0.0, 1 - step / self.contrastive) if self.contrastive else 0.0),
        }


def new_clip(size: Size, tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP for 64-pixel pictures in patches of 8, and captions of 16 tokens."""
    shared = {
        "hidden_size": size.width,
        "intermediate_size": 3 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "projection_dim": size.width,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shared,
    )
    vision = CLIPVisionConfig(image_size=PICTURE, patch_size=PATCH, **shared)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=size.width))
    # CLIP's own start gives a patch's place a twentieth of the weight of its content, and "left of" is never learned.
    places = get_2d_sincos_pos_embed(size.width, PICTURE // PATCH, output_type="pt")
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight[1:] = 0.5 * places
    return model


def loss(model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Comparison loss in both directions (which picture for this caption, which caption for this picture),
    plus the fading contrastive one, of pictures made worse for it."""
    pictures = worst(model, batch, generator) if batch["radius"].any() else batch["pictures"]
    return compared(model, pictures, batch)


def worst(model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """The pictures, each changed by a vector no longer than its ``radius`` in the direction that raises the loss.

    A model trained on these has gradients that mean something: what raises its score by little change of the picture is
    no pattern that only it can see. (Adversarial training with one step from a random start, in the L2 norm.)
    """
    pictures, radius = batch["pictures"], batch["radius"].view(-1, 1, 1, 1)

    def within(change: Tensor) -> Tensor:
        return change * (radius / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=1e-12)).clamp(max=1)

    noise = torch.randn(pictures.shape, generator=generator, device=pictures.device)
    start = within(noise) * torch.rand(len(pictures), 1, 1, 1, generator=generator, device=pictures.device)
    changed = (pictures + start).requires_grad_()
    (gradient,) = torch.autograd.grad(compared(model, changed, batch)[0], changed)
    step = radius * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=1e-12)
    return (pictures + within(start + step)).clamp(0, 1).detach()


def compared(model: nn.Module, pictures: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The loss of ``pictures``, better ones first, and how many comparisons are right."""
    logits = similarity(model, pixel_values(pictures, PICTURE), batch["input_ids"])
    n = len(logits) // 2
    a, b = torch.arange(n, device=logits.device), torch.arange(n, 2 * n, device=logits.device)
    changed = batch["changed"]
    better = logits[a, a] - logits[a, b]
    # Where an attribute was changed, the other caption turns the comparison round.
    others = logits[b, b] - logits[b, a], logits[a, a] - logits[b, a], logits[b, b] - logits[a, b]
    margins = torch.cat([better, *(m[changed] for m in others)])
    value = F.softplus(-margins).mean()
    contrast = batch["contrast"]
    if contrast > 0:
        own = torch.cat([a, b[changed]])
        square = logits[own][:, own]
        target = torch.arange(len(own), device=logits.device)
        value = value + contrast * (F.cross_entropy(square, target) + F.cross_entropy(square.T, target)) / 2
    return value, {"right": (better > 0).float().mean().item(), "scale": model.logit_scale.exp().item()}


def build(work: Path, target: Path, size: Size, *, further: bool, seed: int, device: str, workers: int) -> None:
    """Train one preference model and save it in float16 with its tokenizer and processor to ``target``.

    ``further`` goes on from the one that is there, by comparisons alone.
    """
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(target) if further else clip_tokenizer()
    schedule = replace(SCHEDULE, steps=size.steps)
    data = Comparisons(tokenizer, seed, schedule.batch, 0 if further else schedule.steps // 2)
    model = new_clip(size, tokenizer)
    if further:
        model.load_state_dict(CLIPModel.from_pretrained(target, dtype=torch.float32).state_dict())
    averaged = train(model, data, loss, schedule, work, seed=seed, device=device, workers=workers)
    assert isinstance(averaged, CLIPModel)
    averaged.to("cpu").half().save_pretrained(target)
    tokenizer.save_pretrained(target)
    edge = {"height": PICTURE, "width": PICTURE}
    CLIPImageProcessorPil(size={"shortest_edge": PICTURE}, crop_size=edge).save_pretrained(target)
