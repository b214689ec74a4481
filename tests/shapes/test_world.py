import numpy as np
import pytest

from flowbp_ray.shapes import world
from flowbp_ray.shapes.captions import TASKS, specs
from flowbp_ray.shapes.world import SHAPES, SIZE, Noun, Spec, Thing

# What each shape covers of its bounding box.
SHARES = {"circle": np.pi / 4, "square": 1, "triangle": 1 / 2, "diamond": 1 / 2, "cross": 5 / 9, "ring": np.pi / 4 * 3 / 4}


@pytest.mark.parametrize("shape", SHAPES)
def test_area_and_centre_of_a_drawn_shape(shape):
    mask = world.coverage(shape, 30.3, 33.8, 14, 10)
    assert mask.sum() == pytest.approx(SHARES[shape] * 28 * 20, rel=0.02)
    columns, rows = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)
    assert (mask * columns).sum() / mask.sum() == pytest.approx(30.3, abs=0.1)
    centroid = 33.8 + (10 / 3 if shape == "triangle" else 0)  # a triangle's lies below its box's centre
    assert (mask * rows).sum() / mask.sum() == pytest.approx(centroid, abs=0.1)


def test_a_shape_over_the_edge_is_cut_off():
    assert world.coverage("square", 0, 0, 4, 4).sum() == pytest.approx(16)
    assert world.coverage("square", -10, 80, 4, 4).sum() == 0


def test_a_picture_has_the_ground_and_the_things_colours():
    picture = world.draw((Thing("square", "blue", 20, 20, 8),))
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.dtype == np.uint8
    assert picture[20, 20].tolist() == [round(255 * c) for c in world.COLOURS["blue"]]
    assert picture[50, 50].tolist() == [round(255 * c) for c in world.BACKGROUND]


@pytest.mark.parametrize("task", TASKS)
def test_layouts_keep_things_apart_inside_and_as_the_spec_says(task):
    rng = np.random.default_rng(0)
    for spec in specs(task)[::7]:
        scene = world.lay_out(spec, rng)
        assert sorted(t.shape for t in scene) == sorted(n.shape for n in spec.nouns for _ in range(n.count))
        for i, a in enumerate(scene):
            assert min(a.x, a.y, SIZE - a.x, SIZE - a.y) >= a.radius + world.MARGIN - 1e-6
            for b in scene[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + world.GAP - 1e-6
        if spec.relation:
            boxes = [(t.x, t.y, 2 * t.radius, 2 * t.radius) for t in scene]
            assert world.relations_between(*boxes[0], *boxes[1]) == {spec.relation}


def test_relations_follow_genevals_rule():
    near = (30, 30, 10, 10)
    assert world.relations_between(10, 30, 10, 10, *near) == {"left of"}
    assert world.relations_between(30, 50, 10, 10, *near) == {"below"}
    assert world.relations_between(10, 10, 10, 10, *near) == {"left of", "above"}  # a diagonal is both
    assert world.relations_between(31, 31, 10, 10, *near) == set()  # a tenth of both sizes is no offset


def test_too_many_things_are_refused():
    with pytest.raises(ValueError, match="cannot draw 5 things"):
        world.lay_out(Spec((Noun("ring", count=5),)), np.random.default_rng(0))
