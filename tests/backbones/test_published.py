"""The published sizes, on the meta device: no weight is allocated."""

import pytest
import torch

from flowbp_ray.backbones.published import PUBLISHED
from flowbp_ray.training.adapter import matching

BOUND = {"sd35": 24 * 12 - 3 + 13 * 4, "flux1": 19 * 12 + 38 * 5, "flux2": 8 * 12 + 24 * 2}


@pytest.fixture(scope="module", params=PUBLISHED)
def named(request):
    with torch.device("meta"):
        return request.param, PUBLISHED[request.param].build()


def test_parameters_are_as_published(named):
    name, transformer = named
    assert sum(p.numel() for p in transformer.parameters()) == PUBLISHED[name].parameters


def test_an_adapter_binds_every_attention_and_feed_forward(named):
    """SD3.5's last block has no text output, so three modules fewer; FLUX.1's single blocks have q, k, v and two more."""
    name, transformer = named
    bound = matching(transformer, PUBLISHED[name].family.lora_targets(transformer))
    assert len(bound) == BOUND[name]
    stacked = len(PUBLISHED[name].family.blocks(transformer))
    assert stacked == {"sd35": 24, "flux1": 57, "flux2": 32}[name]
