"""GenEval's models: Mask2Former finds a picture's objects, CLIP names their colours, and `geneval_rules` judges.

How the detector is asked and its masks become objects is mmdetection's, which GenEval's script runs; colours are named as in
that script. Known differences are in the README beside this file.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerForUniversalSegmentation

from flowbp_ray.evaluators import Row, paired
from flowbp_ray.evaluators.geneval_rules import CLASSES, COLOURS, CONFIDENCE, Detection, verdict
from flowbp_ray.rewards.clip import clip_tokens, pixel_values, pretrained

DESCRIPTIONS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = np.uint8(0x99)  # around an object whose colour is asked for
SHORT, LONG = 800, 1333  # pixels of the shorter side that the detector is shown, unless the longer one were more than this
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


Size = tuple[int, int]  # height and width


def prepared(pictures: Tensor) -> tuple[Tensor, Size]:
    """The detector's input ``(B, 3, H', W')`` from uint8 ``(B, H, W, 3)``, and its height and width without the grey padding to
    multiples of 32; bilinear without antialiasing, as published."""
    height, width = pictures.shape[1:3]
    scale = min(SHORT / min(height, width), LONG / max(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    pixels = F.interpolate(pictures.permute(0, 3, 1, 2) / 255, size, mode="bilinear")
    pixels = F.pad(pixels, (0, -size[1] % 32, 0, -size[0] % 32), value=128 / 255)
    mean, std = (torch.tensor(c, device=pixels.device).view(3, 1, 1) for c in (MEAN, STD))
    return (pixels - mean) / std, size


def objects(logits: Tensor, masks: Tensor, padded: Size, inner: Size, size: Size) -> list[Detection]:
    """One picture's objects surer than 0.3, from logits of classes and none ``(Q, 81)`` and of masks ``(Q, h, w)``.

    The picture has ``size``, the detector's input ``padded`` with ``inner`` in it (height, width). A score is the class's
    probability times the mean one of the mask's pixels. The Q best pairs of a query and a class are looked at.
    """
    scores, places = logits.softmax(-1)[:, :-1].flatten().topk(len(logits))
    places, scores = places[scores > CONFIDENCE], scores[scores > CONFIDENCE]
    if not len(places):
        return []
    masks = F.interpolate(masks[None, places // len(CLASSES)], padded, mode="bilinear")[..., : inner[0], : inner[1]]
    masks = F.interpolate(masks, size, mode="bilinear")[0]
    inside = masks > 0
    scores = scores * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    found = []
    for score, place, mask in zip(scores.tolist(), (places % len(CLASSES)).tolist(), inside.cpu().numpy(), strict=True):
        if score > CONFIDENCE:
            y, x = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            found.append(Detection(CLASSES[place], score, (int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1), mask))
    return found


class GenEval(nn.Module):
    """The evaluator over folders or Hugging Face ids of a Mask2Former for COCO's instances and of a CLIP; float32, as published.

    ValueError for files that are no such models.
    """

    def __init__(self, detector: str | Path, clip: str | Path) -> None:
        super().__init__()
        self.detector, found = Mask2FormerForUniversalSegmentation.from_pretrained(
            detector, dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
        if missing := sorted(set(found["missing_keys"]) & {name for name, _ in self.detector.named_parameters()}):
            raise ValueError(f"{detector} is no Mask2Former: it has no {missing[0]}")
        labels = self.detector.config.id2label
        # By place: there are two spellings of some names (couch, sofa), and GenEval has its own for three.
        if len(labels) != len(CLASSES) or sum(labels.get(i) == name for i, name in enumerate(CLASSES)) < 70:
            raise ValueError(f"{detector} finds other things than COCO's 80 classes: give a Mask2Former for COCO's instances")
        self.clip = pretrained(clip)
        self.tokens = clip_tokens("GenEval", self.clip, clip)
        self.colours = dict[str, Tensor]()
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pictures: np.ndarray, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """``right`` and ``reason``, ``(B,)`` each, of pictures ``(B, H, W, 3)`` and entries as `read` gives them."""
        paired(pictures, rows)
        if bare := [row["prompt"] for row in rows if not {"tag", "include"} <= row.keys()]:
            raise ValueError(f"{bare[0]!r} says nothing of objects: give GenEval entries of a file in its format")
        found = zip(pictures, self.detect(pictures), rows, strict=True)
        verdicts = [verdict(there, row, partial(self.colour, picture)) for picture, there, row in found]
        return {"right": np.array([v[0] for v in verdicts], bool), "reason": np.array([v[1] for v in verdicts], str)}

    def detect(self, pictures: np.ndarray) -> list[list[Detection]]:
        """The objects of each of the pictures, uint8 ``(B, H, W, 3)``, which go through the detector together."""
        pixels, inner = prepared(torch.tensor(pictures, device=self.detector.device))
        output = self.detector(pixel_values=pixels)
        both = zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        return [objects(*logits, pixels.shape[-2:], inner, pictures.shape[1:3]) for logits in both]

    def colour(self, picture: np.ndarray, thing: Detection) -> str:
        """Of the ten colours the one whose descriptions CLIP finds nearest to the object, cut out of ``(H, W, 3)`` over grey."""
        left, top, right, bottom = map(int, thing.box)
        cut = torch.from_numpy(np.where(thing.mask[..., None], picture, GREY)[top:bottom, left:right]).to(self.clip.device)
        pixels = pixel_values(cut.permute(2, 0, 1)[None] / 255, self.clip.config.vision_config.image_size)
        embedding = self.clip.get_image_features(pixel_values=pixels).pooler_output[0]
        if thing.name not in self.colours:
            self.colours[thing.name] = self._described(thing.name)
        return COLOURS[int((self.colours[thing.name] @ embedding).argmax())]

    def _described(self, name: str) -> Tensor:
        texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in DESCRIPTIONS]
        tokens = self.tokens(texts, torch.empty(len(texts), device=self.clip.device))
        embeddings = self.clip.get_text_features(input_ids=tokens.input_ids).pooler_output
        means = F.normalize(embeddings, dim=-1).view(len(COLOURS), len(DESCRIPTIONS), -1).mean(1)
        return F.normalize(means, dim=-1)
