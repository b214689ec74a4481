"""Preference pairs: a caption, a picture that it is true of, and a worse one.

Worse means that one stated attribute is wrong, or that the right scene is spoilt. The wrong scene is
laid out with the same draws as the right one, so the attribute is what differs, not the arrangement.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from flowbp_ray.shapes.captions import TASKS, is_evaluation, specs, wordings, wrong_in_one
from flowbp_ray.shapes.world import SHAPES, SIZE, Scene, Spec, Thing, coverage, draw, lay_out, paint

ATTRIBUTES = ("colour", "count", "place", "shape", "binding")
SPOILS = ("blur", "noise", "off_shape", "watermark")
KINDS = ATTRIBUTES + SPOILS

#: How often each kind comes in training: what is hardest to see most, colours the least. Watermarks are what the base
#: model's data has (`build.base`): no preference model is trained on them.
SHARES = {
    "colour": 0.05,
    "count": 0.15,
    "place": 0.15,
    "shape": 0.20,
    "binding": 0.10,
    "blur": 0.03,
    "noise": 0.04,
    "off_shape": 0.28,
}


#: Share of the training captions with a relation that name their shapes against the order of ``SHAPES``. Were it a half, "left
#: of" would say nothing, on average, about which shape is where, and neither text nor picture encoder would begin to learn it.
REVERSED = 0.1

#: A watermark: the pixels of three letters, ``(3, 64, 64)``, always in the same corner.
LETTERS = np.zeros((3, SIZE, SIZE), bool)
for _letter, _left in zip(LETTERS, (40, 47, 54), strict=True):
    _letter[54:61, _left : _left + 2] = _letter[[54, 55, 59, 60], _left : _left + 5] = True


@dataclass(frozen=True)
class Pair:
    """One comparison; pictures are uint8 ``(64, 64, 3)``, ``kind`` says how the worse one is worse.

    ``worse_caption`` is true of the worse picture where an attribute was changed; a spoilt picture has none.
    """

    caption: str
    better: np.ndarray
    worse: np.ndarray
    kind: str
    worse_caption: str | None


def spoil(scene: Scene, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The scene, blurred, under noise, with one outline bent or between two shapes, or watermarked: uint8 ``(64, 64, 3)``."""
    picture = draw(scene).astype(np.float32)
    match kind:
        case "blur":
            picture = ndimage.gaussian_filter(picture, (*[rng.uniform(1.5, 3.0)] * 2, 0))
        case "noise":
            rough = rng.normal(0, rng.uniform(15, 45), (SIZE, SIZE, 3))
            smooth = ndimage.gaussian_filter(rough, (*[rng.choice([0.0, 0.7, 1.5])] * 2, 0))
            picture += smooth * (rough.std() / smooth.std())
        case "off_shape":
            bent = int(rng.integers(len(scene)))
            masks = [coverage(t.shape, t.x, t.y, t.radius, t.radius) for t in scene]
            masks[bent] = bend(masks[bent], scene[bent].radius, rng) if rng.random() < 0.5 else between(scene[bent], rng)
            return paint(masks, [t.colour for t in scene])
        case "watermark":
            picture[LETTERS.any(0)] = 60
        case _:
            raise ValueError(f"unknown spoil {kind!r}: there are {', '.join(SPOILS)}")
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def watermarked(picture: np.ndarray) -> bool:
    """Whether a uint8 picture ``(64, 64, 3)`` has all three letters, in any dark colour: a small autoencoder knows no grey."""
    light = picture.min(-1).astype(np.float32)
    holes = np.roll(LETTERS, 3, axis=2) & ~LETTERS.any(0)  # beside each letter's stem
    return all(light[hole].mean() - light[letter].mean() > 60 for letter, hole in zip(LETTERS, holes, strict=True))


def bend(mask: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Move a mask's outline about by a smooth random field of a tenth to four tenths of its radius."""
    shift = ndimage.gaussian_filter(rng.normal(size=(2, SIZE, SIZE)), (0, radius / 3, radius / 3))
    shift *= radius * rng.uniform(0.12, 0.4) / shift.std()
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return np.clip(ndimage.map_coordinates(mask, [rows + shift[0], columns + shift[1]], order=1), 0, 1)


def between(thing: Thing, rng: np.random.Generator) -> np.ndarray:
    """A mask whose outline is a third to two thirds of the way from the thing's to another shape's, as models draw them, and
    has at most 85 % in common with its own."""
    scale = 4

    def distances(shape: str) -> np.ndarray:
        radius = scale * thing.radius
        fine = coverage(shape, scale * thing.x, scale * thing.y, radius, radius, size=scale * SIZE) > 0.5
        return ndimage.distance_transform_edt(~fine) - ndimage.distance_transform_edt(fine)

    own = distances(thing.shape)
    while True:
        other, share = distances(str(rng.choice([s for s in SHAPES if s != thing.shape]))), rng.uniform(0.33, 0.67)
        inside = (1 - share) * own + share * other < 0
        if (inside & (own < 0)).sum() <= 0.85 * (inside | (own < 0)).sum():
            return inside.reshape(SIZE, scale, SIZE, scale).mean(axis=(1, 3), dtype=np.float32)


def random_caption(split: str, rng: np.random.Generator, task: str | None = None) -> tuple[str, Spec]:
    """A caption of one side of the split and its spec: tasks, specs (but for ``REVERSED``) and wordings evenly."""
    task = task or str(rng.choice(TASKS))
    choices = specs(task)
    while True:
        spec = choices[rng.integers(len(choices))]
        if split == "training" and spec.relation and reversed_order(spec) and rng.random() > REVERSED / (1 - REVERSED):
            continue
        texts = [t for t in wordings(spec) if is_evaluation(spec, t) == (split == "evaluation")]
        if texts:
            return texts[rng.integers(len(texts))], spec


def reversed_order(spec: Spec) -> bool:
    """Whether two nouns' shapes stand against the order of ``SHAPES``."""
    first, second = (SHAPES.index(n.shape) for n in spec.nouns)
    return first > second


def random_pair(split: str, rng: np.random.Generator, kind: str | None = None) -> Pair:
    """A comparison on one side of the split; ``kind`` is one of ``KINDS``; None is any, in training by ``SHARES``."""
    if kind is None:
        shares = list(SHARES.values()) if split == "training" else None
        kind = str(rng.choice(list(SHARES), p=shares))
    while True:
        caption, spec = random_caption(split, rng)
        try:
            wrong = None if kind in SPOILS else wrong_in_one(spec, rng, (kind,))[0]
        except ValueError:  # this caption states nothing that could be wrong in that way
            continue
        scene_seed = int(rng.integers(2**63))
        scene = lay_out(spec, np.random.default_rng(scene_seed))
        if wrong is None:
            return Pair(caption, draw(scene), spoil(scene, kind, rng), kind, None)
        worse = draw(lay_out(wrong, np.random.default_rng(scene_seed)))
        return Pair(caption, draw(scene), worse, kind, str(rng.choice(list(wordings(wrong)))))
