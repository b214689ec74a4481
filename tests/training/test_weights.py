"""Trained weights: chunks of a policy, averages, clipping; whole and sharded."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from flowbp_ray.training import weights
from flowbp_ray.training.weights import Weights, clip_by_norm, load_chunk


def model(seed, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 10, 64, 10_000])
def test_chunks_carry_all_weights_into_another_model(monkeypatch, dtype, size):
    monkeypatch.setattr(weights, "CHUNK", size)
    trained, other = model(0), model(1, dtype)
    chunks, parameters = list(Weights(trained).chunks(dtype)), dict(other.named_parameters())
    assert all(chunk.bytes <= max(size, dtype.itemsize) for chunk in chunks)
    number = sum(p.numel() for p in trained.parameters())
    assert sum(chunk.bytes for chunk in chunks) == number * dtype.itemsize
    places = [p.data_ptr() for p in other.parameters()]
    assert sum(load_chunk(parameters, chunk) for chunk in chunks) == number
    assert all(torch.equal(p, q.to(dtype)) for p, q in zip(other.parameters(), trained.parameters(), strict=True))
    assert [p.data_ptr() for p in other.parameters()] == places


def test_a_chunk_is_a_copy():
    trained = model(0)
    (chunk,) = Weights(trained).chunks(torch.float32)
    nn.init.zeros_(trained[0].weight)
    load_chunk(dict(trained.named_parameters()), chunk)
    assert trained[0].weight.abs().min() > 0


def test_a_chunk_that_was_changed_on_its_way_is_an_error():
    (chunk,) = Weights(model(0)).chunks(torch.float32)
    chunk.pieces[1].values[3] ^= 1
    with pytest.raises(RuntimeError, match="the model holds"):
        load_chunk(dict(model(1).named_parameters()), chunk)


def test_a_chunk_of_another_model_is_an_error():
    (chunk,) = Weights(model(0)).chunks(torch.float32)
    with pytest.raises(RuntimeError, match=r"this model has no 0\.bias"):
        load_chunk({}, chunk)
    longer = tuple(dataclasses.replace(p, start=p.start + 1) for p in chunk.pieces)
    with pytest.raises(RuntimeError, match=r"more values of 0\.bias than this model"):
        load_chunk(dict(model(1).named_parameters()), dataclasses.replace(chunk, pieces=longer))


def test_another_state_is_in_the_model_for_a_while():
    own, other = Weights(model(0)), Weights(model(1)).read()
    before = own.read()
    with own.replaced(other):
        assert all(torch.equal(own.read()[k], v) for k, v in other.items())
    assert all(torch.equal(own.read()[k], v) for k, v in before.items())


def test_the_average_moves_by_one_minus_the_decay():
    trained = nn.Linear(1, 1, bias=False)
    nn.init.constant_(trained.weight, 3.0)
    averaged = {"weight": torch.tensor([[1.0]])}
    Weights(trained).average(averaged, decay=0.75)
    assert averaged["weight"].item() == pytest.approx(1.5)


def test_clipping_keeps_the_direction_and_reports_the_norm():
    parts = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    assert clip_by_norm(parts, 1.0) == pytest.approx(5.0)
    assert torch.cat(parts).tolist() == pytest.approx([0.6, 0.0, 0.8])
    assert clip_by_norm(parts, 2.0) == pytest.approx(1.0)
    assert torch.cat(parts).tolist() == pytest.approx([0.6, 0.0, 0.8])
    assert not math.isfinite(clip_by_norm([torch.tensor([float("nan")])], 1.0))


def test_a_part_of_the_gradients_is_cut_by_the_norm_of_all():
    part = [torch.tensor([3.0])]
    assert clip_by_norm(part, 1.0, lambda squares: squares.add_(16.0)) == pytest.approx(5.0)
    assert part[0].item() == pytest.approx(0.6)


def test_a_parameter_without_gradient_is_named():
    own = Weights(model(0))
    with pytest.raises(RuntimeError, match=r"6 of 6 trained parameters received no gradient: 0\.bias"):
        own.collect()
