import numpy as np
import pytest

from flowbp_ray.shapes.build.measure import measure_checker
from flowbp_ray.shapes.checker import check, read
from flowbp_ray.shapes.world import COLOURS, SHAPES, Thing, coverage, draw, paint


@pytest.mark.parametrize("number", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_right_and_wrong_captions_noise_and_jpeg(number):
    """The stated bounds; the autoencoder's round trip is in test_models.py."""
    shares = measure_checker(None, number=number)
    assert shares["drawn"] >= 0.995
    assert shares["wrong_caption"] <= 0.005
    assert shares["noise"] >= 0.98
    assert shares["jpeg"] >= 0.98


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("radius", [7.0, 11.3, 18.0])
def test_a_thing_is_read_where_and_as_it_was_drawn(shape, colour, radius):
    (found,) = read(draw((Thing(shape, colour, 29.6, 34.2, radius),)))
    assert (found.shape, found.colour) == (shape, colour)
    assert (found.x, found.y) == pytest.approx((29.6, 34.2), abs=0.6)
    assert (found.width, found.height) == pytest.approx((2 * radius, 2 * radius), abs=1.6)


def test_touching_things_of_two_colours_are_two_things():
    scene = (Thing("square", "red", 22, 32, 9), Thing("square", "blue", 40, 32, 9))
    assert sorted(f.colour for f in read(draw(scene))) == ["blue", "red"]
    assert check(draw(scene), "a red square and a blue square").right


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a red circle and a blue square", "right"),
        ("a circle left of a square", "right"),
        ("a square right of a circle", "right"),
        ("a red circle and a red square", "no red square"),
        ("a blue circle and a red square", "no blue circle"),
        ("a circle and a ring", "0 of 1 ring"),
        ("a circle", "2 things instead of 1"),
        ("two circles", "1 of 2 circle"),
        ("a circle above a square", "not above"),
        ("a circle right of a square", "not right of"),
    ],
)
def test_verdicts_name_the_reason(caption, reason):
    picture = draw((Thing("circle", "red", 16, 30, 9), Thing("square", "blue", 46, 33, 9)))
    verdict = check(picture, caption)
    assert verdict.reason == reason
    assert verdict.right == (reason == "right")


def test_a_noun_without_colour_leaves_the_coloured_thing_to_the_noun_that_names_it():
    scene = (Thing("ring", "red", 16, 30, 9), Thing("ring", "green", 46, 33, 9))
    assert check(draw(scene), "a ring and a red ring").right
    assert check(draw(scene), "a ring right of a red ring").right
    assert not check(draw(scene), "a ring left of a red ring").right


def test_blobs_stretched_shapes_and_foreign_colours_are_no_things_of_the_world():
    blob = np.clip(coverage("square", 30, 30, 12, 4, 64) + coverage("circle", 36, 36, 9, 9), 0, 1)
    assert check(paint([blob], ["red"]), "a red circle").reason == "unknown shape"
    stretched = paint([coverage("circle", 32, 32, 20, 11)], ["red"])
    assert check(stretched, "a red circle").reason == "unknown shape"
    grey = draw((Thing("circle", "red", 32, 32, 12),))
    grey[(grey != grey[0, 0]).any(-1)] = 90
    assert check(grey, "a circle").reason == "unknown colour"


def test_an_empty_picture_shows_nothing():
    assert read(paint([], [])) == []
    assert check(paint([], []), "a ring").reason == "0 things instead of 1"


@pytest.mark.parametrize(
    "picture",
    [np.zeros((32, 32, 3), np.uint8), np.full((64, 64, 3), np.nan), np.full((64, 64, 3), -1.0), np.full((64, 64, 3), 255.0)],
)
def test_pictures_of_another_size_or_range_are_refused(picture):
    with pytest.raises(ValueError, match=r"the checker reads|0…1"):
        check(picture, "a ring")
