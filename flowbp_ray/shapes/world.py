"""The world of the embedded default: flat shapes on a light ground, drawn with numpy.

A *spec* is what a caption says (nouns with shape, colour, count, and at most one relation); a *scene*
is one way to draw it (things with a place and a size); a *picture* is a uint8 array ``(64, 64, 3)``.
64 pixels are what the smallest things need: four of them fit beside each other with outlines of 14
pixels, which an autoencoder that halves the picture twice still keeps apart from each other.
"""

from dataclasses import dataclass

import numpy as np

SIZE = 64
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.14),
    "green": (0.10, 0.60, 0.25),
    "blue": (0.12, 0.30, 0.85),
    "yellow": (0.95, 0.77, 0.05),
    "purple": (0.55, 0.20, 0.72),
    "orange": (0.96, 0.47, 0.08),
}
BACKGROUND = (0.95, 0.95, 0.95)
RELATIONS = ("left of", "right of", "above", "below")
MAX_COUNT = 4

#: Range of a thing's half-extent in pixels, by how many things share the picture.
RADII = {1: (10.0, 18.0), 2: (8.0, 13.0), 3: (7.5, 11.0), 4: (7.0, 10.0)}
GAP = 3.0  # pixels between the bounding boxes of two things
MARGIN = 2.0  # pixels between a thing and the picture's edge
SUPERSAMPLING = 4  # per axis, for outlines without steps


@dataclass(frozen=True)
class Noun:
    """One noun phrase: ``count`` things of one shape; ``colour`` is None where the caption leaves it open."""

    shape: str
    colour: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Spec:
    """What a caption asks for; ``relation`` holds between the first and the second noun."""

    nouns: tuple[Noun, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Thing:
    """One drawn shape: centre ``x, y`` and half-extent ``radius`` in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


Scene = tuple[Thing, ...]


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where points ``(u, v)``, in units of the half-extent from the centre (v downwards), lie in the shape."""
    a, b = np.abs(u), np.abs(v)
    match shape:
        case "circle":
            return u**2 + v**2 <= 1
        case "square":
            return np.maximum(a, b) <= 1
        case "triangle":
            return (2 * a <= v + 1) & (v <= 1)
        case "diamond":
            return a + b <= 1
        case "cross":
            return (np.minimum(a, b) <= 1 / 3) & (np.maximum(a, b) <= 1)
        case "ring":
            rr = u**2 + v**2
            return (rr <= 1) & (rr >= 0.25)
    raise ValueError(f"unknown shape {shape!r}: the world has {', '.join(SHAPES)}")


def coverage(shape: str, x: float, y: float, rx: float, ry: float, size: int = SIZE) -> np.ndarray:
    """Share of each pixel that the shape covers: float32 ``(size, size)`` in 0…1, outlines anti-aliased."""
    s = SUPERSAMPLING
    mask = np.zeros((size, size), np.float32)
    x0, x1 = max(int(np.floor(x - rx)), 0), min(int(np.ceil(x + rx)), size)
    y0, y1 = max(int(np.floor(y - ry)), 0), min(int(np.ceil(y + ry)), size)
    if x0 >= x1 or y0 >= y1:
        return mask
    u = ((np.arange(x0 * s, x1 * s) + 0.5) / s - x) / rx
    v = ((np.arange(y0 * s, y1 * s) + 0.5) / s - y) / ry
    fine = inside(shape, u[None, :], v[:, None])
    mask[y0:y1, x0:x1] = fine.reshape(y1 - y0, s, x1 - x0, s).mean(axis=(1, 3))
    return mask


def paint(masks: list[np.ndarray], colours: list[str]) -> np.ndarray:
    """Lay coloured masks over the ground: uint8 ``(size, size, 3)``."""
    size = masks[0].shape[0] if masks else SIZE
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = BACKGROUND
    for mask, colour in zip(masks, colours, strict=True):
        picture += mask[..., None] * (np.array(COLOURS[colour], np.float32) - picture)
    return np.round(picture * 255).astype(np.uint8)


def draw(scene: Scene) -> np.ndarray:
    """The scene as a uint8 picture ``(64, 64, 3)``."""
    return paint([coverage(t.shape, t.x, t.y, t.radius, t.radius) for t in scene], [t.colour for t in scene])


def relations_between(ax: float, ay: float, aw: float, ah: float, bx: float, by: float, bw: float, bh: float) -> set[str]:
    """Relations of box A to box B (centres, widths, heights in pixels), by GenEval's rule.

    The centres' offset is shortened by a tenth of both sizes, then each axis counts where it makes up
    more than half of the offset's length, so a diagonal neighbour is both beside and above.
    """
    dx, dy = ax - bx, ay - by
    dx = np.sign(dx) * max(abs(dx) - 0.1 * (aw + bw), 0.0)
    dy = np.sign(dy) * max(abs(dy) - 0.1 * (ah + bh), 0.0)
    length = float(np.hypot(dx, dy))
    if length < 1e-3:
        return set()
    dx, dy = dx / length, dy / length
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


def lay_out(spec: Spec, rng: np.random.Generator) -> Scene:
    """One random scene of the spec: colours left open are drawn per thing, nothing touches, and of the
    relations only the stated one holds (so that stating another one is wrong)."""
    kinds = [(n.shape, n.colour or str(rng.choice(list(COLOURS)))) for n in spec.nouns for _ in range(n.count)]
    if len(kinds) not in RADII:
        raise ValueError(f"cannot draw {len(kinds)} things: a {SIZE}-pixel picture has room for {max(RADII)}")
    upper = np.triu_indices(len(kinds), 1)
    for _ in range(100):  # rejection, 32 candidates at a time; a handful of rounds is the most ever needed
        radii = rng.uniform(*RADII[len(kinds)], (32, len(kinds)))
        xs = rng.uniform(MARGIN + radii, SIZE - MARGIN - radii)
        ys = rng.uniform(MARGIN + radii, SIZE - MARGIN - radii)
        apart = np.maximum(np.abs(xs[:, :, None] - xs[:, None]), np.abs(ys[:, :, None] - ys[:, None]))
        clear = (apart - radii[:, :, None] - radii[:, None])[:, *upper] >= GAP
        for x, y, r in zip(*(a[clear.all(1)] for a in (xs, ys, radii)), strict=True):
            if spec.relation is not None:
                first, second = zip(x, y, 2 * r, 2 * r, strict=True)
                if relations_between(*first, *second) != {spec.relation}:
                    continue
            things = zip(kinds, x, y, r, strict=True)
            return tuple(Thing(s, c, float(px), float(py), float(pr)) for (s, c), px, py, pr in things)
    raise ValueError(f"no room to draw {spec}: {len(kinds)} things do not fit a {SIZE}-pixel picture")
