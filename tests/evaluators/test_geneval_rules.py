import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbp_ray.evaluators.geneval_rules import CLASSES, TAGS, Detection, read, relations, summary, verdict
from flowbp_ray.shapes.evaluation import average

MASK = np.ones((2, 2), bool)
LEFT, RIGHT, NEAR = (0, 0, 10, 10), (30, 0, 40, 10), (3, 0, 13, 10)


def cat(score=0.95, box=LEFT, colour="red"):
    return "cat", score, box, colour


def dog(score=0.95, box=RIGHT, colour="blue"):
    return "dog", score, box, colour


def judged(row, things):
    """The verdict on things (class, score, box, colour) without a model: what colour a thing has is given."""
    detections = [Detection(name, score, box, MASK) for name, score, box, _ in things]
    colours = dict(zip(detections, (colour for *_, colour in things), strict=True))
    return verdict(detections, row, colours.__getitem__)


def entry(tag, *include, exclude=()):
    rest = {"exclude": list(exclude)} if exclude else {}
    return {"tag": tag, "prompt": "a prompt", "include": list(include), **rest}


CAT, DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
SINGLE, TWO = entry("single_object", CAT), entry("two_object", CAT, DOG)
THREE = entry("counting", {"class": "cat", "count": 3}, exclude=[{"class": "cat", "count": 4}])
RED = entry("colors", CAT | {"color": "red"})
POSITION = entry("position", CAT, DOG | {"position": ["right of", 0]})
TWO_RED = entry("colors", {"class": "cat", "count": 2, "color": "red"})
RIGHT_OF_TWO = entry("position", {"class": "cat", "count": 2}, DOG | {"position": ["right of", 0]})
RIGHT_OF_RED = entry("position", CAT | {"color": "red"}, DOG | {"position": ["right of", 0]})
BOTH = entry("color_attr", CAT | {"color": "red"}, DOG | {"color": "blue"})


@pytest.mark.parametrize(
    ("row", "things", "reason"),
    [
        (SINGLE, [cat()], "right"),
        (SINGLE, [cat(0.31)], "right"),
        (SINGLE, [cat(), cat(), dog()], "right"),  # more is no fault
        (SINGLE, [], "0 of 1 cat"),
        (SINGLE, [dog()], "0 of 1 cat"),
        (SINGLE, [cat(0.3)], "0 of 1 cat"),
        (TWO, [dog(), cat()], "right"),
        (TWO, [cat(), cat()], "0 of 1 dog"),
        (TWO, [], "0 of 1 cat; 0 of 1 dog"),
        (THREE, [cat()] * 3, "right"),
        (THREE, [cat()] * 3 + [cat(0.89)], "right"),  # what does not count does not count against
        (THREE, [cat()] * 2 + [cat(0.9)], "2 of 3 cat"),
        (THREE, [cat()] * 4, "4 cat, not fewer than 4"),
        (RED, [cat()], "right"),
        (RED, [cat(colour="pink")], "cat pink, not red"),
        (RED, [cat(0.8), cat(0.9, colour="pink")], "cat pink, not red"),  # the surest one is looked at
        (RED, [cat(0.9), cat(0.8, colour="pink")], "right"),
        (RED, [dog(colour="red")], "0 of 1 cat"),
        (TWO_RED, [cat()] * 2, "right"),
        (TWO_RED, [cat(), cat(0.5, colour="pink")], "cat red and pink, not red"),
        (POSITION, [cat(), dog()], "right"),
        (POSITION, [cat(box=RIGHT), dog(box=LEFT)], "dog left of cat, not right of"),
        (POSITION, [cat(), dog(box=NEAR)], "dog in no relation to cat, not right of"),
        (POSITION, [cat(), dog(0.8), dog(0.9, NEAR)], "dog in no relation to cat, not right of"),
        (POSITION, [dog()], "0 of 1 cat; nothing for dog to be right of"),
        (POSITION, [cat()], "0 of 1 dog"),
        (RIGHT_OF_TWO, [cat(), cat(0.9, NEAR), dog()], "right"),
        (RIGHT_OF_TWO, [cat(), cat(0.9, (60, 0, 70, 10)), dog()], "dog left of cat, not right of"),
        (RIGHT_OF_TWO, [cat(), dog()], "1 of 2 cat; nothing for dog to be right of"),
        (RIGHT_OF_RED, [cat(colour="pink"), dog()], "cat pink, not red; nothing for dog to be right of"),
        (BOTH, [cat(), dog()], "right"),
        (BOTH, [cat(colour="blue"), dog(colour="red")], "cat blue, not red; dog red, not blue"),
        (BOTH, [cat(), dog(colour="black")], "dog black, not blue"),
        (BOTH, [cat()], "0 of 1 dog"),
    ],
)  # fmt: skip
def test_verdicts(row, things, reason):
    assert judged(row, things) == (reason == "right", reason)


def test_sixteen_objects_of_a_class_are_seen_and_no_more():
    seen = entry("counting", CAT, exclude=[{"class": "cat", "count": 16}])
    unseen = entry("counting", CAT, exclude=[{"class": "cat", "count": 17}])
    assert judged(seen, [cat()] * 30) == (False, "16 cat, not fewer than 16")
    assert judged(unseen, [cat()] * 30)[0]


things = st.lists(
    st.tuples(
        st.sampled_from(["cat", "dog", "bus"]),
        st.floats(0, 1),
        st.sampled_from([LEFT, RIGHT, NEAR]),
        st.sampled_from(["red", "blue"]),
    ),
    max_size=8,
    unique_by=lambda t: t[1],
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([SINGLE, TWO, THREE, RED, POSITION, BOTH]), things, st.randoms())
def test_neither_the_order_of_detections_nor_what_is_not_asked_for_matters(row, found, random):
    shuffled = random.sample(found, len(found))
    assert judged(row, shuffled) == judged(row, found)
    least = 0.9 if row["tag"] == "counting" else 0.3
    assert judged(row, [t for t in found if t[0] != "bus" and t[1] > least]) == judged(row, found)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        # Boxes of 10 × 10: of an offset along an axis 2 pixels say nothing, and the rest has to be more than half of the whole.
        ((5, 0), {"right of"}),
        ((-5, 0), {"left of"}),
        ((0, 5), {"below"}),
        ((0, -5), {"above"}),
        ((4, 0), set()),
        ((2, 1), set()),
        ((0, 0), set()),
        ((10, 10), {"right of", "below"}),
        ((-10, 10), {"left of", "below"}),
        ((6, 10), {"below"}),
        ((10, -6), {"right of"}),
        ((5, 5), set()),
    ],
)
def test_relations(offset, expected):
    x, y = offset
    assert relations((x, y, x + 10, y + 10), LEFT) == expected


def test_large_objects_have_to_be_further_apart():
    assert relations((50, 0, 60, 10), LEFT) == {"right of"}
    assert relations((0, -200, 200, 200), (-45, -200, 45, 200)) == {"right of"}  # 100 apart, 29 of which say nothing
    assert relations((-100, -200, 200, 200), (-100, -200, 80, 200)) == set()  # 60 apart, 48 of which say nothing


numbers = st.integers(-200, 200)
boxes = st.tuples(numbers, numbers, st.integers(1, 99), st.integers(1, 99)).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@settings(max_examples=100, deadline=None)
@given(boxes, boxes, numbers, numbers)
def test_relations_are_seen_from_the_other_side_and_move_with_the_boxes(a, b, x, y):
    assert {OPPOSITE[r] for r in relations(a, b)} == relations(b, a)
    moved = [(left + x, top + y, right + x, bottom + y) for left, top, right, bottom in (a, b)]
    assert relations(*moved) == relations(a, b)
    turned = [(top, left, bottom, right) for left, top, right, bottom in (a, b)]
    across = {"left of": "above", "above": "left of", "right of": "below", "below": "right of"}
    assert {across[r] for r in relations(a, b)} == relations(*turned)


def test_entries_are_read_in_order(tmp_path):
    rows = [SINGLE, TWO, THREE, RED, POSITION, BOTH]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read(tmp_path / "prompts.jsonl") == rows
    assert len(CLASSES) == len(set(CLASSES)) == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "write an object with"),
        ({"prompt": " "}, "write an object with"),
        ({"tag": "colours"}, "tag is 'colours', not one of single_object"),
        ({"include": []}, "include names no object"),
        ({"include": "cat"}, "include is no list of objects"),
        ({"exclude": ["cat"]}, "exclude is no list of objects"),
        ({"include": [CAT | {"colour": "red"}]}, r"include\[0\].colour is unknown: there are class, color, count, position"),
        ({"exclude": [CAT | {"color": "red"}]}, r"exclude\[0\].color is unknown"),
        ({"include": [CAT, {"class": "mouse", "count": 1}]}, r"include\[1\].class is 'mouse'"),
        ({"include": [{"class": "cat"}]}, r"include\[0\].count is None"),
        ({"include": [{"class": "cat", "count": 0}]}, r"include\[0\].count is 0"),
        ({"include": [{"class": "cat", "count": True}]}, r"include\[0\].count is True"),
        ({"include": [CAT | {"color": None}]}, r"include\[0\].color is None, not one of red"),
        ({"include": [CAT, DOG | {"position": ["on", 0]}]}, r"include\[1\].position is \['on', 0\]"),
        ({"include": [CAT, DOG | {"position": ["above", 1]}]}, r"include\[1\].position is \['above', 1\]"),
        ({"include": [CAT | {"position": ["above", -1]}]}, r"include\[0\].position is \['above', -1\]"),
        ({"include": [CAT | {"position": []}]}, r"include\[0\].position is \[\]"),
        ({"include": [CAT | {"position": None}]}, r"include\[0\].position is None"),
    ],
)
def test_a_line_that_is_no_entry_is_named(tmp_path, change, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(SINGLE) + "\n" + json.dumps(SINGLE | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match=f"prompts.jsonl, line 2: {message}"):
        read(path)


def test_a_line_that_is_no_json_and_an_empty_file_are_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("a photo of a cat")
    with pytest.raises(ValueError, match="line 1: write one entry as JSON, not 'a photo of a cat'"):
        read(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="there are no entries in"):
        read(path)


def of_prompts(number, pictures):
    """Rows of so many prompts of each task with so many pictures each."""
    return [{"tag": tag, "prompt": f"prompt {n}"} for tag in TAGS for n in range(number) for _ in range(pictures)]


def test_one_picture_a_prompt_has_the_plain_standard_error():
    right = np.random.default_rng(0).random(6 * 40) < 0.6
    scores = summary(of_prompts(40, 1), right)
    for tag, own in zip(TAGS, right.reshape(6, 40), strict=True):
        assert scores[tag].value == pytest.approx(average(own).value)
        assert scores[tag].error == pytest.approx(average(own).error)
    assert scores["mean"].value == pytest.approx(right.mean())
    assert scores["mean"].error == pytest.approx(sum(scores[t].error ** 2 for t in TAGS) ** 0.5 / 6)


def test_pictures_of_a_prompt_that_agree_say_no_more_than_one():
    right = np.random.default_rng(0).random(6 * 40) < 0.6
    once, again = summary(of_prompts(40, 1), right), summary(of_prompts(40, 4), right.repeat(4))
    for name in (*TAGS, "mean"):
        assert again[name].value == pytest.approx(once[name].value)
        assert again[name].error == pytest.approx(once[name].error)


def test_tasks_count_alike_however_many_pictures_they_have():
    rows = [{"tag": tag, "prompt": str(n)} for tag, number in zip(TAGS, (1, 2, 3, 4, 5, 6), strict=True) for n in range(number)]
    right = np.array([row["tag"] in TAGS[:3] for row in rows])
    assert summary(rows, right)["mean"].value == pytest.approx(0.5)


def test_a_task_without_pictures_is_an_error():
    with pytest.raises(ValueError, match="no pictures were judged for counting: the mean needs all six tasks"):
        summary([row for row in of_prompts(1, 1) if row["tag"] != "counting"], np.ones(5))
