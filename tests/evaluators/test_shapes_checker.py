import numpy as np
import pytest

from flowbp_ray.evaluators.shapes_checker import ShapesChecker
from flowbp_ray.shapes.preferences import spoil
from flowbp_ray.shapes.world import Thing, draw

SCENE = (Thing("circle", "red", 16, 30, 9), Thing("square", "blue", 46, 20, 9))
ROWS = [{"prompt": "a red circle and a blue square"}, {"prompt": "a circle"}, {"prompt": "a circle left of a square"}]


def test_pictures_are_judged_in_their_order():
    pictures = np.stack([draw(SCENE), draw(SCENE), spoil(SCENE, "watermark", np.random.default_rng(0))])
    judged = ShapesChecker()(pictures, ROWS)
    assert judged["right"].tolist()[:2] == [True, False]
    assert judged["reason"].tolist()[:2] == ["right", "2 things instead of 1"]
    assert judged["watermarked"].tolist() == [False, False, True]
    assert judged["right"].dtype == judged["watermarked"].dtype == bool


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (np.zeros((2, 64, 64, 3), np.uint8), "2 pictures but 3 entries: give one entry"),
        (np.zeros((3, 64, 64, 3)), r"not float64 of shape \(3, 64, 64, 3\)"),
        (np.zeros((3, 3, 64, 64), np.uint8), r"not uint8 of shape \(3, 3, 64, 64\)"),
        (np.zeros((64, 64, 3), np.uint8), r"not uint8 of shape \(64, 64, 3\)"),
    ],
)
def test_what_are_no_pictures_with_an_entry_each_is_refused(pictures, message):
    with pytest.raises(ValueError, match=message):
        ShapesChecker()(pictures, ROWS)


def test_no_pictures_have_no_verdicts():
    judged = ShapesChecker()(np.zeros((0, 64, 64, 3), np.uint8), [])
    assert {name: values.shape for name, values in judged.items()} == dict.fromkeys(("right", "reason", "watermarked"), (0,))
