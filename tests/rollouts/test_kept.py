"""Embeddings that a worker keeps, of a tiny random pipeline."""

import pytest
import tiny
import torch

from flowbp_ray import backbones
from flowbp_ray.rollouts.kept import Kept

PROMPTS = ["a red ring", "two circles", "a cross above a square", "a blue square", "three stars"]


@pytest.fixture(scope="module")
def backbone(tiny_pipeline):
    return backbones.load(tiny_pipeline)


@pytest.fixture
def asked(backbone, monkeypatch):
    """What the backbone is asked to encode."""
    calls, encode = [], backbone.encode_texts
    monkeypatch.setattr(backbone, "encode_texts", lambda prompts: calls.append(prompts) or encode(prompts))
    return calls


@pytest.mark.parametrize("made", [tiny.sd3, tiny.flux1, tiny.flux2, tiny.z_image])
def test_they_are_those_of_an_encoder_that_keeps_nothing_bit_by_bit(made, tmp_path):
    backbone = backbones.load(tiny.saved(made, tmp_path))
    kept = Kept(backbone)
    for prompts in (PROMPTS[:3], [PROMPTS[2], PROMPTS[3], PROMPTS[0]], [PROMPTS[4], PROMPTS[4], PROMPTS[1]]):
        again = kept(prompts).tensors
        for name, tensor in backbone.encode(prompts).tensors.items():
            assert again[name].dtype == tensor.dtype
            assert torch.equal(again[name], tensor)


def test_a_prompt_is_encoded_once_in_batches_of_one_size(backbone, asked):
    kept = Kept(backbone)
    kept(PROMPTS[:3])
    kept([PROMPTS[1], PROMPTS[3], PROMPTS[0]])
    kept([PROMPTS[3], PROMPTS[3], PROMPTS[2]])
    assert asked == [PROMPTS[:3], [PROMPTS[3]] * 3]


def test_of_embeddings_on_the_disk_new_ones_alone_are_read(backbone, monkeypatch):
    read = []
    monkeypatch.setattr(backbone, "embeds", lambda prompts: read.append(prompts) or backbone.encode_texts(prompts))
    kept = Kept(backbone)
    kept([PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    kept([PROMPTS[1], PROMPTS[3], PROMPTS[0]])
    assert read == [PROMPTS[:2], [PROMPTS[3]]]


def test_those_asked_for_last_are_kept_within_the_bytes(backbone, asked):
    each = sum(tensor.nbytes for tensor in backbone.encode(PROMPTS[:1]).tensors.values())
    asked.clear()
    kept = Kept(backbone, most=2 * each)
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[1]):
        kept([prompt])
    assert asked == [[PROMPTS[0]], [PROMPTS[1]], [PROMPTS[2]], [PROMPTS[1]]]
    assert kept.bytes == 2 * each == sum(t.nbytes for row in kept.rows.values() for t in row.values())
    assert len(kept(PROMPTS).tensors["prompt_embeds"]) == 5  # more than are kept
    assert kept.bytes <= 2 * each
