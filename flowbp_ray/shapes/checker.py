"""The exact checker: reads a picture back into things and says whether a caption is true of it.

No model is involved and none is ever trained against it. A picture passes only if it shows what the
caption says and nothing else: an extra thing, a blob of no known shape or colour, or a wrong count
fails it. Reading goes: how much each pixel is painted with each colour, connected regions, one colour
a region, and the shape whose drawing in the region's box overlaps best.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from flowbp_ray.shapes.captions import parse
from flowbp_ray.shapes.world import BACKGROUND, COLOURS, SHAPES, SIZE, Spec, coverage, relations_between

MIN_AREA = 16.0  # pixels; the smallest thing drawn covers about 98, a speck below this is no thing
MIN_OVERLAP = 0.74  # intersection over union with the best shape's drawing
MAX_COLOUR_ERROR = 0.30  # distance of a thing's median colour from the palette's, RGB in 0…1
MAX_ASPECT = 1.25  # longer side over shorter side of a thing's box


@dataclass(frozen=True)
class Found:
    """A thing read from a picture: names are None where nothing known fits; box centre and sides in pixels."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    width: float
    height: float
    overlap: float  # with the best-fitting shape


@dataclass(frozen=True)
class Verdict:
    """Whether the caption is true of the picture, and if not, the first reason."""

    right: bool
    reason: str


_PALETTE = np.array(list(COLOURS.values()), np.float32)
_NAMES = tuple(COLOURS)
_GROUND = np.array(BACKGROUND, np.float32)


def as_unit(picture: np.ndarray) -> np.ndarray:
    """A picture ``(64, 64, 3)``, uint8 or float in 0…1, as float32 in 0…1."""
    if picture.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the checker reads pictures of shape {(SIZE, SIZE, 3)}, not {picture.shape}")
    if picture.dtype == np.uint8:
        return picture.astype(np.float32) / 255
    if not np.isfinite(picture).all() or picture.min() < -1e-3 or picture.max() > 1 + 1e-3:
        raise ValueError("a float picture must be finite and in 0…1: clamp it, or map it from -1…1, first")
    return picture.astype(np.float32)


def read(picture: np.ndarray) -> list[Found]:
    """Every thing in the picture, larger ones first."""
    pixels = ndimage.gaussian_filter(as_unit(picture), (0.45, 0.45, 0))
    # A pixel is ground + amount·(colour − ground) + rest: the colour with the least rest paints it.
    directions = _PALETTE - _GROUND
    offset = pixels - _GROUND
    amounts = np.clip(offset @ directions.T / (directions**2).sum(1), 0, 1)
    rests = np.linalg.norm(offset[:, :, None] - amounts[..., None] * directions, axis=-1)
    nearest = rests.argmin(-1)
    amount = np.take_along_axis(amounts, nearest[..., None], -1)[..., 0]
    # A colour that the palette lacks (grey, black) is still paint: its distance from the ground counts.
    painted = np.maximum(amount, np.linalg.norm(offset, axis=-1) / np.linalg.norm(directions, axis=-1).max())
    regions, count = ndimage.label(painted > 0.5)
    found: list[Found] = []
    for index in range(1, count + 1):
        region = regions == index
        if region.sum() < MIN_AREA:
            continue
        core = ndimage.binary_erosion(region)
        votes = np.bincount(nearest[core if core.any() else region], minlength=len(_NAMES))
        if votes.max() >= 0.8 * votes.sum():
            found.append(_thing(region, pixels, painted))
        else:  # things of different colours touch: take them apart by colour
            for colour in np.flatnonzero(votes > 0.1 * votes.sum()):
                parts, number = ndimage.label(region & (nearest == colour))
                masks = [parts == p for p in range(1, number + 1)]
                found.extend(_thing(m, pixels, painted) for m in masks if m.sum() >= MIN_AREA)
    return sorted(found, key=lambda f: -f.width * f.height)


def _thing(region: np.ndarray, pixels: np.ndarray, painted: np.ndarray) -> Found:
    soft = painted * ndimage.binary_dilation(region)  # the anti-aliased outline lies just outside
    rows, columns = soft.max(1), soft.max(0)
    y0, y1 = _edges(rows)
    x0, x1 = _edges(columns)
    x, y, width, height = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
    core = ndimage.binary_erosion(region)
    median = np.median(pixels[core if core.any() else region], axis=0)
    errors = np.linalg.norm(_PALETTE - median, axis=1)
    colour = _NAMES[errors.argmin()] if errors.min() <= MAX_COLOUR_ERROR else None
    best, overlap = None, 0.0
    for shape in SHAPES:
        for grow in (-0.5, 0.0, 0.5):  # the box is known to half a pixel
            mask = coverage(shape, x, y, width / 2 + grow, height / 2 + grow)
            score = float(np.minimum(mask, soft).sum() / np.maximum(mask, soft).sum())
            if score > overlap:
                best, overlap = shape, score
    known = overlap >= MIN_OVERLAP and max(width, height) <= MAX_ASPECT * min(width, height)
    return Found(best if known else None, colour, x, y, width, height, overlap)


def _edges(profile: np.ndarray) -> tuple[float, float]:
    """First and last coordinate at which a 0…1 profile crosses one half, to a part of a pixel."""
    inside = np.flatnonzero(profile > 0.5)
    first, last = int(inside[0]), int(inside[-1])
    before = profile[first - 1] if first > 0 else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return first - min(float(before), 0.5), last + 1 + min(float(after), 0.5)


def check(picture: np.ndarray, caption: str | Spec) -> Verdict:
    """Whether the picture shows exactly what the caption says (ValueError if it is outside of the grammar)."""
    spec = parse(caption) if isinstance(caption, str) else caption
    things = read(picture)
    for thing in things:
        if thing.shape is None or thing.colour is None:
            what = "shape" if thing.shape is None else "colour"
            return Verdict(False, f"unknown {what}")
    wanted = sum(n.count for n in spec.nouns)
    if len(things) != wanted:
        return Verdict(False, f"{len(things)} things instead of {wanted}")
    left = list(things)
    places: list[Found] = []
    # Nouns that name a colour choose first; "a ring and a red ring" must not lose its red one to the other.
    for noun in sorted(spec.nouns, key=lambda n: n.colour is None):
        fits = [t for t in left if t.shape == noun.shape and noun.colour in (None, t.colour)]
        if len(fits) < noun.count:
            shaped = sum(t.shape == noun.shape for t in left)
            reason = f"no {noun.colour} {noun.shape}" if shaped >= noun.count else f"{shaped} of {noun.count} {noun.shape}"
            return Verdict(False, reason)
        for thing in fits[: noun.count]:
            left.remove(thing)
        places.append(fits[0])
    if spec.relation is not None:
        a, b = places if spec.nouns[0].colour or not spec.nouns[1].colour else places[::-1]
        holds = relations_between(a.x, a.y, a.width, a.height, b.x, b.y, b.width, b.height)
        if spec.relation not in holds:
            return Verdict(False, f"not {spec.relation}")
    return Verdict(True, "right")
