"""Folders of models that are looked at without loading them; tests/bad_input.py has what is refused."""

import json
from pathlib import Path

import pytest
import tiny

from flowbp_ray import backbones, shapes
from flowbp_ray.config import load, models

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


def test_every_backbone_is_known_before_torch_is_imported():
    assert set(models.FAMILIES) == set(backbones.FAMILIES)


def test_shapes_are_read_from_headers_as_the_model_has_them():
    own = backbones.load(shapes.BASE).transformer.state_dict()
    assert {name: list(tensor.shape) for name, tensor in own.items()} == models.headers(shapes.BASE / "transformer")


def test_settings_that_do_not_go_with_the_model_are_refused_before_it_is_loaded(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ring\n", encoding="utf-8")
    flux = tiny.saved(tiny.flux1, tmp_path / "flux")
    paths = [f"model.path={flux}", f"evaluation.prompts={tmp_path / 'prompts.txt'}", "sampling.height=32", "sampling.width=32"]
    models.check_models(load(SPARSE, [*paths, "adapter.targets=[to_q]"]))
    for change, said in (
        ("surrogate.compensate_guidance=true", "guidance is an input of the transformer of a FluxPipeline"),
        ("adapter.targets=[to_q, attn9.to_q]", r"the adapter target 'attn9\.to_q' binds no linear module of .*flux; it has"),
    ):
        with pytest.raises(ValueError, match=said):
            models.check_models(load(SPARSE, [*paths, change]))
    vae = flux / "vae" / "config.json"  # as the published ones' decoders: eight times coarser, in patches of 2
    vae.write_text(json.dumps(json.loads(vae.read_text("utf-8")) | {"block_out_channels": [8] * 4}), encoding="utf-8")
    models.check_models(load(SPARSE, paths))
    with pytest.raises(ValueError, match=r"height and sampling.width are 32 and 40: .*flux makes sizes that are multiples of 16"):
        models.check_models(load(SPARSE, [*paths, "sampling.width=40"]))
