"""GenEval's rules: whether the objects found in a picture are those of its prompt. No model is involved.

Source: Ghosh et al. (2023), arXiv 2310.11513, and its script, github.com/djghosh13/geneval, evaluation/evaluate_images.py.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from flowbp_ray.evaluators import Row
from flowbp_ray.shapes.evaluation import Score, average

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
#: COCO's 80 in their order; a mouse, a remote and a keyboard have longer names here.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9  # an object's score is above this
MOST = 16  # objects of a class, the surest; overlapping ones are all kept (the published max_overlap is 1)
MARGIN = 0.1  # of both objects' sizes: how much of an offset says nothing

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Detection:
    """An object: its class, a score in 0…1, its box (left, top, right, bottom; pixels) and its mask, bool ``(H, W)``."""

    name: str
    score: float
    box: Box
    mask: np.ndarray


def relations(a: Box, b: Box) -> set[str]:
    """How ``a`` lies to ``b``: along each axis the distance of their centres less a tenth of both sizes has to be more than half
    of their whole distance."""
    corners_a, corners_b = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))
    offset = corners_a.mean(0) - corners_b.mean(0)
    clear = np.abs(offset) - MARGIN * (np.ptp(corners_a, 0) + np.ptp(corners_b, 0))
    if (clear < 1e-3).all():
        return set()
    x, y = np.sign(offset) * np.maximum(clear, 0) / np.linalg.norm(offset)
    return {name for name, part in zip(RELATIONS, (-x, x, -y, y), strict=True) if part > 0.5}


def verdict(detections: Iterable[Detection], row: Row, colour_of: Callable[[Detection], str]) -> tuple[bool, str]:
    """Whether the picture is right, and "right" or all that is wrong with it.

    Of each class that is to be included the surest objects, as many as are asked for, are looked at: all of them have to have
    the colour, and the relation to all of the earlier entry's. Of a class that is excluded there must be fewer.
    """
    least = COUNTING_CONFIDENCE if row["tag"] == "counting" else CONFIDENCE
    objects: dict[str, list[Detection]] = defaultdict(list)
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > least and len(objects[detection.name]) < MOST:
            objects[detection.name].append(detection)
    wrong: list[str] = []
    matched: list[list[Detection]] = []
    for wanted in row["include"]:
        there = objects[wanted["class"]][: wanted["count"]]
        if fault := _fault(wanted, there, matched, colour_of):
            wrong.append(fault)
        matched.append([] if fault else there)
    for unwanted in row.get("exclude", []):
        if (number := len(objects[unwanted["class"]])) >= unwanted["count"]:
            wrong.append(f"{number} {unwanted['class']}, not fewer than {unwanted['count']}")
    return not wrong, "; ".join(wrong) or "right"


def _fault(wanted: Row, there: list[Detection], matched: list[list[Detection]], colour_of: Callable[[Detection], str]) -> str:
    name, count = wanted["class"], wanted["count"]
    if len(there) < count:
        return f"{len(there)} of {count} {name}"
    if "color" in wanted and set(colours := [colour_of(thing) for thing in there]) != {wanted["color"]}:
        return f"{name} {' and '.join(colours)}, not {wanted['color']}"
    if "position" in wanted:
        relation, target = wanted["position"]
        if not matched[target]:
            return f"nothing for {name} to be {relation}"
        for thing, other in product(there, matched[target]):
            if relation not in (holds := relations(thing.box, other.box)):
                return f"{name} {' and '.join(sorted(holds)) or 'in no relation to'} {other.name}, not {relation}"
    return ""


def read(path: Path) -> list[Row]:
    """The entries of a file of GenEval's format (JSON, one a line), in order; ValueError says which line is none, and why."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: write one entry as JSON, not {line[:60]!r}") from error
            if problem := _problem(rows[-1]):
                raise ValueError(f"{path}, line {number}: {problem}")
    if not rows:
        raise ValueError(f"there are no entries in {path}: give GenEval's evaluation_metadata.jsonl or one of its format")
    return rows


def _problem(row: Any) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        return 'write an object with "prompt", "tag" and "include"'
    if row.get("tag") not in TAGS:
        return f"tag is {row.get('tag')!r}, not one of {', '.join(TAGS)}"
    if not row.get("include"):
        return "include names no object"
    for key, known in (("include", {"class", "count", "color", "position"}), ("exclude", {"class", "count"})):
        entries = row.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            return f"{key} is no list of objects"
        for place, entry in enumerate(entries):
            where = f"{key}[{place}]"
            if unknown := sorted(entry.keys() - known):
                return f"{where}.{unknown[0]} is unknown: there are {', '.join(sorted(known))}"
            if entry.get("class") not in CLASSES:
                return f"{where}.class is {entry.get('class')!r}, not one of COCO's 80 by GenEval's names"
            if type(entry.get("count")) is not int or entry["count"] < 1:
                return f"{where}.count is {entry.get('count')!r}, not a whole number of at least 1"
            if entry.get("color", "red") not in COLOURS:
                return f"{where}.color is {entry['color']!r}, not one of {', '.join(COLOURS)}"
            match entry.get("position", [RELATIONS[0], -1]):
                case [relation, int(target)] if relation in RELATIONS and (0 <= target < place or "position" not in entry):
                    pass
                case other:
                    what = f"[one of {', '.join(RELATIONS)}; the number of an earlier object, from 0]"
                    return f"{where}.position is {other!r}, not {what}"
    return ""


def summary(rows: Sequence[Row], right: np.ndarray) -> dict[str, Score]:
    """Each tag's share of right pictures, and as ``mean`` the overall score, the mean of the six, with standard errors.

    ``right (B,)`` are an evaluator's verdicts on pictures of ``rows``, or differences of such. A prompt's pictures are right or
    wrong together, so prompts count as what is independent. ValueError if a tag has no picture.
    """
    tags, prompts = (np.array([row[key] for row in rows]) for key in ("tag", "prompt"))
    if missing := [tag for tag in TAGS if tag not in tags]:
        raise ValueError(f"no pictures were judged for {', '.join(missing)}: the mean needs all six tasks")
    scores = {}
    for tag in TAGS:
        scores[tag] = average(np.asarray(right)[tags == tag], prompts[tags == tag])
    mean, error = np.mean([s.value for s in scores.values()]), np.linalg.norm([s.error for s in scores.values()]) / len(TAGS)
    return scores | {"mean": Score(float(mean), float(error))}
