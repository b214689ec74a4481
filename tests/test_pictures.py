import numpy as np
import pytest

from flowbp_ray.pictures import GOOD, Cell, Row, sheet, wrap


def test_a_sheet_shows_every_picture_and_verdict():
    red, blue = (np.full((64, 64, 3), c, np.uint8) for c in ((255, 0, 0), (0, 0, 255)))
    page = np.asarray(
        sheet("title", [Row("first", [Cell(red, "a", "right")]), Row("second", [Cell(blue, "b"), Cell(blue, "c")])])
    )
    counts = {c: (page == c).all(-1).sum() for c in ((255, 0, 0), (0, 0, 255))}
    assert counts[(0, 0, 255)] == pytest.approx(2 * counts[(255, 0, 0)], rel=0.01)
    green = tuple(int(GOOD[i : i + 2], 16) for i in (1, 3, 5))
    assert (page == green).all(-1).any()


def test_long_captions_wrap():
    class Font:
        def getlength(self, text):
            return len(text)

    assert wrap("a red circle and a square", Font(), 12) == ["a red circle", "and a square"]


def test_an_empty_sheet_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        sheet("title", [Row("none")])
