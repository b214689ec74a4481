import numpy as np
import pytest

from flowbp_ray.shapes import preferences
from flowbp_ray.shapes.captions import is_evaluation, parse, wrong_in_one
from flowbp_ray.shapes.checker import check, read
from flowbp_ray.shapes.preferences import ATTRIBUTES, REVERSED, SHARES, random_caption, random_pair, reversed_order
from flowbp_ray.shapes.world import SHAPES, draw, lay_out


@pytest.mark.parametrize("kind", ATTRIBUTES)
@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_the_caption_is_true_of_the_better_picture_and_false_of_the_worse(kind, split):
    rng = np.random.default_rng(0)
    for _ in range(30):
        pair = random_pair(split, rng, kind)
        assert pair.kind == kind
        assert is_evaluation(parse(pair.caption), pair.caption) == (split == "evaluation")
        assert check(pair.better, pair.caption).right
        assert not check(pair.worse, pair.caption).right
        assert check(pair.worse, pair.worse_caption).right


def test_where_only_an_attribute_differs_the_layout_is_the_same():
    pair = random_pair("training", np.random.default_rng(1), "binding")
    places = [sorted((round(t.x), round(t.y)) for t in read(p)) for p in (pair.better, pair.worse)]
    assert np.abs(np.array(places[0]) - np.array(places[1])).max() <= 2


@pytest.mark.parametrize("kind", preferences.SPOILS)
def test_spoilt_pictures_differ_and_have_no_caption_of_their_own(kind):
    rng = np.random.default_rng(2)
    for _ in range(10):
        pair = random_pair("training", rng, kind)
        assert pair.worse_caption is None
        assert np.abs(pair.better.astype(int) - pair.worse).mean() > 0.2


@pytest.mark.parametrize("shape", SHAPES)
def test_what_lies_between_two_shapes_differs_from_the_thing_and_keeps_its_place(shape):
    rng = np.random.default_rng(0)
    thing = preferences.lay_out(parse(f"a {shape}"), np.random.default_rng(0))[0]
    own = preferences.coverage(shape, thing.x, thing.y, thing.radius, thing.radius)
    for _ in range(10):
        mask = preferences.between(thing, rng)
        assert 0.1 < np.minimum(mask, own).sum() / np.maximum(mask, own).sum() < 0.88
        rows, columns = np.nonzero(mask)
        assert abs(columns.mean() + 0.5 - thing.x) < 2
        assert abs(rows.mean() + 0.5 - thing.y) < 5


def test_every_kind_comes_up_by_itself():
    rng = np.random.default_rng(3)
    assert {random_pair("training", rng).kind for _ in range(300)} == set(SHARES)


def test_watermarks_are_seen_and_nothing_else_is_taken_for_one():
    rng = np.random.default_rng(0)
    scenes = [lay_out(preferences.random_caption("training", rng)[1], rng) for _ in range(300)]
    assert not any(preferences.watermarked(draw(s)) for s in scenes)
    marked = [preferences.spoil(s, "watermark", rng) for s in scenes]
    assert np.mean([preferences.watermarked(picture) for picture in marked]) > 0.85  # some lie on a thing


def test_unknown_spoil_is_refused():
    scene = preferences.lay_out(parse("a ring"), np.random.default_rng(0))
    with pytest.raises(ValueError, match="unknown spoil 'rust'"):
        preferences.spoil(scene, "rust", np.random.default_rng(0))


def test_training_captions_lean_to_one_order_of_shapes_and_evaluation_captions_do_not():
    rng = np.random.default_rng(0)
    shares = {
        split: np.mean([reversed_order(random_caption(split, rng, "position")[1]) for _ in range(2000)])
        for split in ("training", "evaluation")
    }
    assert shares["training"] == pytest.approx(REVERSED, abs=0.04)
    assert shares["evaluation"] > 0.35


def test_a_wrong_place_is_mostly_the_opposite_one():
    rng = np.random.default_rng(0)
    spec = parse("a ring left of a cross")
    wrong = [wrong_in_one(spec, rng, ("place",))[0].relation for _ in range(1000)]
    assert set(wrong) == {"right of", "above", "below"}
    assert 0.7 < wrong.count("right of") / 1000 < 0.8


def test_evaluation_pairs_come_evenly():
    rng = np.random.default_rng(0)
    kinds = [random_pair("evaluation", rng).kind for _ in range(400)]
    assert all(25 < kinds.count(kind) < 75 for kind in SHARES)
