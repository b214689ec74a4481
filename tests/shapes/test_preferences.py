import numpy as np
import pytest

from flowbp_ray.shapes import preferences
from flowbp_ray.shapes.captions import is_evaluation, parse
from flowbp_ray.shapes.checker import check, read
from flowbp_ray.shapes.preferences import ATTRIBUTES, KINDS, random_pair


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


def test_every_kind_comes_up_by_itself():
    rng = np.random.default_rng(3)
    assert {random_pair("training", rng).kind for _ in range(300)} == set(KINDS)


def test_unknown_spoil_is_refused():
    scene = preferences.lay_out(parse("a ring"), np.random.default_rng(0))
    with pytest.raises(ValueError, match="unknown spoil 'rust'"):
        preferences.spoil(scene, "rust", np.random.default_rng(0))
