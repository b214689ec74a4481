"""Memory as a count: the bytes that autograd keeps for backward, at their peak."""

import weakref

import literal
import numpy as np
import pytest
import torch
from literal import World

from flowbp_ray.surrogate.backward import Guidance, backward
from flowbp_ray.surrogate.methods import METHODS


class Saved:
    """A saved tensor that counts as long as a graph holds it."""

    def __init__(self, tensor, count):
        self.tensor, size = tensor.detach(), tensor.numel() * tensor.element_size()
        count.add(size)
        weakref.finalize(self, count.add, -size)


class Count:
    live = peak = 0

    def add(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)


def peak(run):
    count = Count()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: Saved(t, count), lambda s: s.tensor):
        run()
    assert count.live == 0
    return count.peak


def wide_world(guidance):
    world = World(1, [1.0] * 25, guidance, batch=128)
    world.field = literal.Field(1, hidden=32)
    return world


def plan_of(world, method, **values):
    return METHODS[method].plan(METHODS[method].settings(**values), world.sigmas, np.random.default_rng(0))


def peak_of_walk(world, method, **values):
    plan, cotangent = plan_of(world, method, **values), torch.ones_like(world.x[0])
    return peak(lambda: backward(plan, world.velocity, world.x, [cotangent], guidance=world.guidance))


def peak_of_whole_graph(world, number):
    live = [a.index for a in plan_of(world, "sparse", active_steps=number).active]
    return peak(lambda: literal.whole_graph(world, literal.sparse(world, live, 0.5, 0)))


def test_one_velocity_is_alive_whatever_the_number_of_active_steps():
    world = wide_world(Guidance(scale=2.0))
    one, eight, all_ = (peak_of_walk(world, "sparse", active_steps=n) for n in (1, 8, 25))
    assert one > 0
    assert abs(eight - one) <= 0.01 * one
    assert abs(all_ - one) <= 0.01 * one
    bridged = [peak_of_walk(world, "truncated", active_steps=n) for n in (2, 8, 25)]
    full = peak_of_walk(world, "full")
    for measured in [*bridged, full]:
        assert abs(measured - bridged[0]) <= 0.01 * bridged[0]
    assert bridged[0] <= 1.05 * one  # the latents' gradient needs the first layer's weights too


def test_the_whole_graph_grows_linearly():
    world = wide_world(Guidance())
    one, eight, all_ = (peak_of_whole_graph(world, n) for n in (1, 8, 25))
    assert eight > 6 * one
    assert (all_ - one) / 24 == pytest.approx((eight - one) / 7, rel=0.05)
