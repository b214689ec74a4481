"""Captions of the shapes world: the six tasks of GenEval, their grammar, and the split into training and evaluation.

``phrase(spec)`` writes a caption, ``parse(text)`` reads it back. The split is a function of the text
alone, so nobody has to carry lists around: for two objects, position and attribute binding whole
*contents* are held out (no wording of them is trained on); single objects, colours and counts are too
few for that, so wordings of them are.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator

import numpy as np

from flowbp_ray.shapes.world import COLOURS, MAX_COUNT, RELATIONS, SHAPES, Noun, Spec

TASKS = ("single_object", "two_objects", "counting", "colours", "position", "attribute_binding")
PREFIXES = ("", "a picture of ", "a drawing of ", "an image of ", "there is ")
ONE = ("a", "one", "a single")
NUMBERS = ("one", "two", "three", "four", "five")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
EVALUATION_SHARE = 0.2

_NOUN = rf"(a single|an?|{'|'.join(NUMBERS)}) (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})(?:s|es)?"
_CAPTION = re.compile(rf"^(?:{'|'.join(p.strip() for p in PREFIXES if p)})? ?{_NOUN}(?: (and|{'|'.join(RELATIONS)}) {_NOUN})?$")


def task_of(spec: Spec) -> str:
    """The task that a spec belongs to."""
    if spec.relation is not None:
        return "position"
    if len(spec.nouns) == 2:
        return "attribute_binding" if all(n.colour for n in spec.nouns) else "two_objects"
    noun = spec.nouns[0]
    if noun.count > 1:
        return "counting"
    return "colours" if noun.colour else "single_object"


def phrase(spec: Spec, prefix: str = "", one: str = "a") -> str:
    """The spec in words; ``one`` is the word for a count of one."""

    def noun_phrase(noun: Noun) -> str:
        colour = f"{noun.colour} " if noun.colour else ""
        if noun.count > 1:
            plural = "es" if noun.shape == "cross" else "s"
            return f"{NUMBERS[noun.count - 1]} {colour}{noun.shape}{plural}"
        article = "an" if one == "a" and colour.startswith("o") else one
        return f"{article} {colour}{noun.shape}"

    return prefix + f" {spec.relation or 'and'} ".join(noun_phrase(n) for n in spec.nouns)


def parse(text: str) -> Spec:
    """The spec of a caption. Raises ValueError for text outside of the world's grammar."""
    match = _CAPTION.match(text.strip().lower())
    if match is None:
        raise ValueError(
            f"cannot read the caption {text!r}: the shapes world knows noun phrases such as 'two red circles', "
            f"one of them or two joined by 'and', {', '.join(repr(r) for r in RELATIONS)}"
        )

    def noun(number: str, colour: str | None, shape: str) -> Noun:
        return Noun(shape, colour, NUMBERS.index(number) + 1 if number in NUMBERS else 1)

    number, colour, shape, joint, *second = match.groups()
    nouns = [noun(number, colour, shape)]
    if joint is not None:
        nouns.append(noun(*second))
    return Spec(tuple(nouns), None if joint in (None, "and") else joint)


def specs(task: str) -> list[Spec]:
    """Every spec of one task."""
    pairs = list(itertools.permutations(SHAPES, 2))
    match task:
        case "single_object":
            return [Spec((Noun(s),)) for s in SHAPES]
        case "two_objects":
            return [Spec((Noun(a), Noun(b))) for a, b in pairs]
        case "counting":
            return [Spec((Noun(s, count=n),)) for s in SHAPES for n in range(2, MAX_COUNT + 1)]
        case "colours":
            return [Spec((Noun(s, c),)) for s in SHAPES for c in COLOURS]
        case "position":
            return [Spec((Noun(a), Noun(b)), r) for a, b in pairs for r in RELATIONS]
        case "attribute_binding":
            return [Spec((Noun(a, c), Noun(b, d))) for a, b in pairs for c, d in itertools.permutations(COLOURS, 2)]
    raise ValueError(f"unknown task {task!r}: the six are {', '.join(TASKS)}")


def wordings(spec: Spec) -> Iterator[str]:
    """Every caption that says the spec."""
    for prefix in PREFIXES:
        yield phrase(spec, prefix)
        if len(spec.nouns) == 1 and spec.nouns[0].count == 1:
            yield from (phrase(spec, prefix, one) for one in ONE[1:])


def is_evaluation(spec: Spec, text: str) -> bool:
    """Whether a caption belongs to the evaluation side of the split; the rest is for training."""
    if task_of(spec) == "attribute_binding" or spec.relation is not None:
        key = phrase(spec)
    elif len(spec.nouns) == 2:  # "a ring and a cross" and "a cross and a ring" are one content
        key = " and ".join(sorted(n.shape for n in spec.nouns))
    else:
        key = text
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") < EVALUATION_SHARE * 2**32


def prompts(task: str, split: str) -> list[str]:
    """Every caption of one task on one side of the split (``training`` or ``evaluation``), in a fixed order."""
    if split not in ("training", "evaluation"):
        raise ValueError(f"unknown split {split!r}: it is 'training' or 'evaluation'")
    wanted = split == "evaluation"
    return [text for spec in specs(task) for text in wordings(spec) if is_evaluation(spec, text) == wanted]


def evaluation_prompts(per_task: int, seed: int = 0) -> dict[str, list[str]]:
    """``per_task`` evaluation captions for each task, drawn evenly (each is used once before any is used twice)."""
    return _drawn("evaluation", per_task, seed)


def training_prompts(per_task: int = 500) -> list[str]:
    """``per_task`` training captions for each task, drawn evenly: each task has its share, however many captions it has."""
    return [text for texts in _drawn("training", per_task, 0).values() for text in texts]


def _drawn(split: str, per_task: int, seed: int) -> dict[str, list[str]]:
    chosen = {}
    for number, task in enumerate(TASKS):
        rng = np.random.default_rng([seed, number])
        pool = prompts(task, split)
        rounds = [rng.permutation(len(pool)) for _ in range(-(-per_task // len(pool)))]
        chosen[task] = [pool[i] for i in np.concatenate(rounds)[:per_task]]
    return chosen


def wrong_in_one(spec: Spec, rng: np.random.Generator, kinds: tuple[str, ...] | None = None) -> tuple[Spec, str]:
    """The spec with exactly one attribute changed, and which: colour, count, place, shape or binding.

    Only attributes that the spec states can be wrong. ``kinds`` restricts the choice; the result is
    never equal to the spec, nor another wording of it.
    """
    nouns = list(spec.nouns)
    possible = ["shape", "count"]
    if spec.relation is not None:
        possible = ["shape", "place"]
    if any(n.colour for n in nouns):
        possible.append("colour")
    if len({n.colour for n in nouns}) == 2 and all(n.colour for n in nouns):
        possible.append("binding")
    if kinds is not None:
        possible = [k for k in possible if k in kinds]
    if not possible:
        raise ValueError(f"nothing of {kinds} can be wrong about {spec}")
    kind = str(rng.choice(possible))
    i = int(rng.integers(len(nouns)))
    noun = nouns[i]

    def other(choices: tuple[str, ...], *taken: str | None) -> str:
        return str(rng.choice([c for c in choices if c not in taken]))

    match kind:
        case "shape":
            nouns[i] = Noun(other(SHAPES, *(n.shape for n in nouns)), noun.colour, noun.count)
        case "colour":
            nouns[i] = Noun(noun.shape, other(tuple(COLOURS), *(n.colour for n in nouns)), noun.count)
        case "count":
            counts = [c for c in (noun.count - 1, noun.count + 1) if 1 <= c <= MAX_COUNT]
            nouns[i] = Noun(noun.shape, noun.colour, int(rng.choice(counts)))
        case "binding":
            a, b = nouns
            nouns = [Noun(a.shape, b.colour, a.count), Noun(b.shape, a.colour, b.count)]
        case "place":  # mostly the opposite: that is the harder one to see
            opposite = OPPOSITE[spec.relation or ""]
            return Spec(tuple(nouns), opposite if rng.random() < 0.75 else other(RELATIONS, spec.relation, opposite)), kind
    return Spec(tuple(nouns), spec.relation), kind
