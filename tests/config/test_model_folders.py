"""Folders of models that are looked at without loading them; tests/bad_input.py has what is refused."""

from flowbp_ray import backbones, shapes
from flowbp_ray.config import models


def test_every_backbone_is_known_before_torch_is_imported():
    assert set(models.FAMILIES) == set(backbones.FAMILIES)


def test_shapes_are_read_from_headers_as_the_model_has_them():
    own = backbones.load(shapes.BASE).transformer.state_dict()
    assert {name: list(tensor.shape) for name, tensor in own.items()} == models.headers(shapes.BASE / "transformer")
