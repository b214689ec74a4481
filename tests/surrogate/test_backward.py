"""The walk itself: what it evaluates and in which order, the local cotangent, and what it refuses."""

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from literal import World, engine, relative
from worlds import SEEDS, worlds

from flowbp_ray.surrogate.backward import Guidance, backward
from flowbp_ray.surrogate.inputs import connector_errors, noised_copies, reward_inputs, sample_weights
from flowbp_ray.surrogate.methods import METHODS
from flowbp_ray.surrogate.plan import Active, Plan, RewardInput

STEPS = [1.0] * 12


def draw(method, world, **values):
    return METHODS[method].plan(METHODS[method].settings(**values), world.sigmas, np.random.default_rng(7))


@pytest.mark.parametrize("method", ["refl", "draft_lv", "drtune", "leapalign", "sparse", "bridge", "lagrange"])
@pytest.mark.parametrize("detach", [True, False])
def test_each_branch_once_an_active_index_from_last_to_first(method, detach):
    world = World(1, STEPS, Guidance(scale=3.0, detach_negative=detach))
    plan = draw(method, world)
    noises = [world.random(2, 2, 3) for _ in range(plan.copies)]
    engine(world, plan, noises)
    branches = ["conditional"] if detach else ["conditional", "negative"]
    assert world.calls == [(a.index, b) for a in reversed(plan.active) for b in branches]


def test_full_attaches_the_negative_branch_and_one_branch_needs_no_negative():
    world = World(1, STEPS, Guidance(scale=3.0))
    engine(world, draw("full", world))
    assert sum(branch == "negative" for _, branch in world.calls) == 12
    world.guidance = Guidance(scale=1.0, detach_negative=False)
    engine(world, draw("full", world))
    assert {branch for _, branch in world.calls} == {"conditional"}


@settings(max_examples=20, deadline=None)
@given(worlds(3, 6), SEEDS)
def test_local_cotangent_stays_at_its_velocity(world, seed):
    """A penalty towards a reference velocity adds its own gradient and nothing through bridges."""
    reference = literal.Field(seed)
    plan = draw("full", world)

    def penalty(velocity, x, index):
        return 0.3 * (velocity - reference(x, world.sigmas[index], "conditional"))

    plain = engine(world, plan)
    with_penalty = engine(world, plan, local=penalty)
    total = 0.0
    for i in range(world.steps):
        difference = world.field(world.x[i], world.sigmas[i], "conditional") - reference(
            world.x[i], world.sigmas[i], "conditional"
        )
        total = total + 0.15 * difference.square().sum()
    total.backward()
    assert relative(with_penalty, plain + world.gradient()) <= 1e-10


def test_gradients_add_up_in_grad_and_work_under_no_grad():
    world = World(2, STEPS)
    plan = draw("bridge", world)
    cotangents = [torch.ones(2, 2, 3, dtype=torch.float64)]
    backward(plan, world.velocity, world.x, cotangents)
    once = world.gradient()
    with torch.no_grad():
        backward(plan, world.velocity, world.x, cotangents)
    backward(plan, world.velocity, world.x, cotangents)
    assert relative(world.gradient(), 2 * once) <= 1e-12
    assert all(x.grad is None and not x.requires_grad for x in world.x.values())


def test_lower_precision_velocities_take_the_cotangent_in_their_own_dtype():
    world = World(2, STEPS)
    world.field.bfloat16()
    plan = draw("bridge", world)
    field = world.field
    latents = {i: x.float() for i, x in world.x.items()}
    backward(plan, lambda x, i, b: field(x.bfloat16(), world.sigmas[i].bfloat16(), b), latents, [torch.ones(2, 2, 3)])
    assert all(p.grad.dtype == torch.bfloat16 for p in field.parameters())


def test_refusals_say_what_is_missing():
    world = World(3, STEPS)
    plan, x = draw("sparse", world), world.x
    g = torch.ones_like(x[0])
    with pytest.raises(ValueError, match="1 reward inputs, 0 of them copies, but was given 2 cotangents and 0 copies"):
        backward(plan, world.velocity, x, [g, g])
    with pytest.raises(ValueError, match=f"needs the latent of index {plan.active[-2].index}"):
        backward(plan, world.velocity, {i: v for i, v in x.items() if i != plan.active[-2].index}, [g])
    with pytest.raises(ValueError, match=r"cotangent 0 is \(1, 2, 3\), but the latents are \(2, 2, 3\)"):
        backward(plan, world.velocity, x, [g[:1]])
    copied = draw("draft_lv", world)
    with pytest.raises(ValueError, match="given 1 noises"):
        noised_copies(copied, x, world.v, world.sigmas, [g])
    with pytest.raises(ValueError, match="given 2 copies and 0 velocities at copies"):
        reward_inputs(copied, x, world.v, world.sigmas, [g, g])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"scale": -1.0}, "guidance scale is -1.0"),
        ({"scale": float("inf")}, "guidance scale is inf"),
        ({"scale": 1.0, "compensate": True}, "compensate is True: it must be false where guidance scale is 1"),
    ],
)
def test_guidance_refuses(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Guidance(**values)


def test_sample_weights_from_connector_errors():
    world = World(4, STEPS)
    plan = draw("leapalign", world, weight_floor=0.2)
    k, j = (a.index for a in plan.active)
    x, v, s = world.x, world.v, world.sigmas
    d_j = (x[j] - x[k] - (s[j] - s[k]) * v[k]).abs().mean((1, 2))
    d_0 = (x[12] - x[j] + s[j] * v[j]).abs().mean((1, 2))
    torch.testing.assert_close(connector_errors(plan, x, v, s), [d_j, d_0])
    torch.testing.assert_close(sample_weights(plan, x, v, s), 1 / (d_j.clamp(min=0.2) + d_0.clamp(min=0.2)))
    sparse = draw("sparse", world)
    assert connector_errors(sparse, x, v, s) == []
    assert sample_weights(sparse, {12: x[12]}, {}, s).tolist() == [1.0, 1.0]


def test_a_velocity_that_ignores_its_latents_sends_nothing_across_the_bridge():
    shift = torch.zeros(2, 3, requires_grad=True)
    sigmas = torch.tensor([1.0, 0.6, 0.0])
    plan = METHODS["full"].plan(METHODS["full"].settings(), sigmas, np.random.default_rng(0))
    latents = {i: torch.zeros(1, 2, 3) for i in range(3)}
    for local in (None, lambda v, x, i: torch.zeros_like(v)):
        shift.grad = None
        backward(plan, lambda x, i, b: shift[None] * 1.0, latents, [torch.ones(1, 2, 3)], local=local)
        torch.testing.assert_close(shift.grad, torch.full((2, 3), -1.0))


def test_a_plan_written_by_hand():
    world = World(6, STEPS)
    plan = Plan("mine", 12, (RewardInput("sampled", 12),), (Active(5, -0.25),))
    g = world.random(2, 2, 3)
    backward(plan, world.velocity, {5: world.x[5]}, [g])
    ours = world.gradient()
    world.field(world.x[5], world.sigmas[5], "conditional").backward(-0.25 * g)
    assert relative(ours, world.gradient()) <= 1e-12
