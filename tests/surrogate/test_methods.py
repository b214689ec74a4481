"""Each method's gradient against plain autograd of its whole graph, built literally (see literal.py), in float64."""

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal import World, engine, relative, whole_graph
from worlds import SEEDS, worlds

from flowbp_ray.surrogate.backward import Guidance
from flowbp_ray.surrogate.draws import PairDraw, window_start
from flowbp_ray.surrogate.methods import METHODS, composed

BOUND = 1e-10
FACTORS = st.sampled_from([0.0, 0.3, 1.0, 1.7])
TAILS = st.one_of(st.none(), st.just(0.1), st.floats(0.1, 1))
PAIRS = st.one_of(
    st.builds(PairDraw, rule=st.sampled_from(["uniform", "midpoint", "midpoint_j"])),
    st.builds(PairDraw, cap=st.integers(1, 5)),
    st.builds(
        PairDraw,
        rule=st.just("dirichlet"),
        concentration=st.tuples(*[st.floats(0.5, 6)] * 3),
        cap=st.one_of(st.none(), st.integers(1, 6)),
    ),
)
properties = settings(max_examples=30, deadline=None)


def draw(method, world, seed, **values):
    method = METHODS[method]
    return method.plan(method.settings(**values), world.sigmas, np.random.default_rng(seed))


def indices(plan):
    return [a.index for a in plan.active]


@properties
@given(worlds(1), SEEDS, st.data())
def test_refl(world, seed, data):
    last = data.draw(st.integers(1, world.steps))
    plan = draw("refl", world, seed, last_n_steps=last)
    (tau,) = indices(plan)
    assert tau >= world.steps - last
    assert plan.last_index == tau
    assert relative(engine(world, plan), whole_graph(world, literal.refl(world, tau))) <= BOUND


@properties
@given(worlds(1), SEEDS, st.integers(0, 3))
def test_draft_lv(world, seed, copies):
    plan = draw("draft_lv", world, seed, copies=copies)
    noises = [world.random(*world.x[0].shape) for _ in range(copies)]
    assert relative(engine(world, plan, noises), whole_graph(world, literal.draft_lv(world, noises))) <= BOUND


@properties
@given(worlds(1), SEEDS, st.integers(1, 4), st.floats(0.01, 1))
def test_drtune(world, seed, number, ratio):
    plan = draw("drtune", world, seed, active_steps=number, stop_ratio=ratio)
    stop = plan.last_index
    assert 1 <= world.steps - stop <= max(1, round(ratio * world.steps))
    assert len(plan.active) == min(number, stop + 1)
    assert relative(engine(world, plan), whole_graph(world, literal.drtune(world, stop, indices(plan)))) <= BOUND


@properties
@given(worlds(), SEEDS, PAIRS, TAILS, FACTORS, st.floats(0.01, 0.5))
def test_leapalign(world, seed, pair, tail, alpha, floor):
    plan = draw("leapalign", world, seed, pair=pair, tail=tail, alpha=alpha, weight_floor=floor)
    k, j = indices(plan)
    assert relative(engine(world, plan), whole_graph(world, *literal.leapalign(world, k, j, alpha, floor))) <= BOUND


@properties
@given(worlds(1), SEEDS, TAILS, st.floats(0, 4), FACTORS, st.data())
def test_sparse(world, seed, tail, bias, rho, data):
    start = window_start(world.steps, tail)
    number = data.draw(st.integers(1, world.steps - start))
    plan = draw("sparse", world, seed, active_steps=number, late_bias=bias, rescale=rho, tail=tail)
    assert len(plan.active) == number
    assert min(indices(plan)) >= start
    assert relative(engine(world, plan), whole_graph(world, literal.sparse(world, indices(plan), rho, start))) <= BOUND


@properties
@given(worlds(), SEEDS, PAIRS, TAILS, st.integers(2, 12), st.floats(0, 4), FACTORS, FACTORS)
def test_bridge(world, seed, pair, tail, number, bias, rho, alpha):
    plan = draw("bridge", world, seed, pair=pair, tail=tail, active_steps=number, late_bias=bias, rescale=rho, alpha=alpha)
    start = window_start(world.steps, tail, least=3)
    assert len(plan.active) == min(number, world.steps - start)
    assert min(indices(plan)) >= start
    j = plan.bridges[0].index
    assert relative(engine(world, plan), whole_graph(world, literal.bridge(world, indices(plan), j, rho, alpha, start))) <= BOUND


@properties
@given(
    worlds(),
    SEEDS,
    PAIRS,
    TAILS,
    st.integers(1, 4),
    st.sampled_from(["start", "midpoint", "all"]),
    st.one_of(st.none(), st.integers(1, 3)),
    st.sampled_from([0.0, 0.25, 1.0]),
    FACTORS,
    FACTORS,
    st.floats(0.01, 0.5),
)
def test_lagrange(world, seed, pair, tail, order, mode, most, support_scale, rho, alpha, floor):
    values = {"order": order, "active_supports": mode, "max_active_supports": most, "support_scale": support_scale}
    plan = draw("lagrange", world, seed, pair=pair, tail=tail, rescale=rho, alpha=alpha, weight_floor=floor, **values)
    j = plan.bridges[0].index
    active = min({"start": 1, "midpoint": 2, "all": order}[mode], order if most is None else most)
    expected = literal.lagrange(world, indices(plan)[0], j, order, active, support_scale, rho, alpha, floor)
    assert relative(engine(world, plan), whole_graph(world, *expected)) <= BOUND


@properties
@given(worlds(1), SEEDS)
def test_full_is_plain_autograd_through_the_sampler(world, seed):
    plan = draw("full", world, seed)
    assert relative(engine(world, plan), whole_graph(world, literal.last_steps(world, world.steps, attach=True))) <= BOUND


@properties
@given(worlds(1), SEEDS, st.data())
def test_truncated_and_randomised(world, seed, data):
    number = data.draw(st.integers(1, world.steps))
    plan = draw("truncated", world, seed, active_steps=number)
    assert relative(engine(world, plan), whole_graph(world, literal.last_steps(world, number))) <= BOUND
    most = data.draw(st.one_of(st.none(), st.integers(number, world.steps)))
    plan = draw("randomised_truncation", world, seed, least=number, most=most)
    assert number <= len(plan.active) <= (most or world.steps)
    assert relative(engine(world, plan), whole_graph(world, literal.last_steps(world, len(plan.active)))) <= BOUND


def test_full_differs_from_detached():
    """The attached negative branch is what makes full backpropagation full."""
    world = World(3, [1.0] * 6, Guidance(scale=4.0))
    exact, detached = engine(world, draw("full", world, 0)), engine(world, draw("truncated", world, 0, active_steps=6))
    assert relative(detached, exact) > 0.1


@properties
@given(worlds(4), SEEDS, PAIRS, st.data())
def test_composed_euler(world, seed, pair, data):
    """Every active set and bridge that goes with Euler weights, to both reward inputs."""
    active = data.draw(st.sampled_from(["all", "last", "late_biased", "evenly_spaced"]))
    bridge = data.draw(st.sampled_from(["none", "every"] + ["drawn"] * (active in ("all", "late_biased"))))
    stop_within = data.draw(st.one_of(st.none(), st.integers(1, world.steps - 2)))
    alpha = None if bridge == "none" else data.draw(FACTORS)
    rho = 0.0 if active == "all" else data.draw(FACTORS)
    plan = draw(
        "composed",
        world,
        seed,
        reward_input="sampled" if stop_within is None else "posterior_mean",
        active=active,
        weights="euler",
        bridge=bridge,
        stop_within=stop_within,
        active_steps=None if active == "all" else data.draw(st.integers(2, world.steps - (stop_within or 1) + 1)),
        late_bias=1.5 if active == "late_biased" else None,
        alpha=alpha,
        pair=pair if bridge == "drawn" else None,
        rescale=rho,
    )
    assert plan.steps == world.steps
    stop = None if stop_within is None else plan.reward_inputs[0].index
    end, live = (world.steps if stop is None else stop + 1), indices(plan)
    deltas = [world.delta(i, stop) for i in range(end)]
    factor = rho_factor(rho, deltas, live)
    match bridge:
        case "none":
            expected = [literal.compose(world, world.x[0], 0, end, live, factor, stop)]
        case "every":
            expected = literal.bridged_everywhere(world, live, alpha, factor, stop)
        case "drawn":
            j = plan.bridges[0].index
            x_j = literal.pin(literal.compose(world, world.x[0], 0, j, live, factor, stop), world.x[j])
            expected = [literal.compose(world, x_j, j, end, live, factor, stop, at=j, alpha=alpha)]
    assert relative(engine(world, plan), whole_graph(world, expected)) <= BOUND


@properties
@given(worlds(4), SEEDS, PAIRS, FACTORS, FACTORS, st.data())
def test_composed_lagrange_on_the_last_leg(world, seed, pair, rho, alpha, data):
    """Late-biased active steps, of which those from the drawn j on are the supports of the last leg."""
    stop_within = data.draw(st.one_of(st.none(), st.integers(1, world.steps - 2)))
    plan = draw(
        "composed",
        world,
        seed,
        reward_input="sampled" if stop_within is None else "posterior_mean",
        active="late_biased",
        weights="lagrange_last_leg",
        bridge="drawn",
        stop_within=stop_within,
        active_steps=data.draw(st.integers(2, world.steps - (stop_within or 1) + 1)),
        late_bias=1.0,
        alpha=alpha,
        pair=pair,
        rescale=rho,
    )
    stop, j = None if stop_within is None else plan.reward_inputs[0].index, plan.bridges[0].index
    sigmas = world.sigmas if stop is None else [*world.sigmas[: stop + 1], 0.0]
    live = indices(plan)
    before, last = [i for i in live if i < j], [i for i in live if i >= j]
    assert last[0] == j
    factor = rho_factor(rho, [world.delta(i, stop) for i in range(j)], before)
    x_j = literal.pin(literal.compose(world, world.x[0], 0, j, before, factor, stop), world.x[j])
    expected = x_j
    for i, weight in zip(last, literal.integrals(sigmas, last, j, len(sigmas) - 1), strict=True):
        expected = expected + weight * world.u(literal.scale(x_j, alpha) if i == j else world.x[i], i)
    seen = world.x[world.steps] if stop is None else world.x[stop] - world.sigmas[stop] * world.v[stop]
    assert relative(engine(world, plan), whole_graph(world, [literal.pin(expected, seen)])) <= BOUND


def rho_factor(rho, deltas, live):
    return literal.rho_factor(rho, deltas, [deltas[i] for i in live])


@properties
@given(worlds(4), SEEDS, PAIRS, FACTORS, st.sampled_from(["none", "drawn"]), st.one_of(st.none(), st.floats(0.01, 0.5)))
def test_composed_legs_to_the_sampled_latent(world, seed, pair, rho, bridge, floor):
    """One or two Lagrange legs; two with a leap's weights are LeapAlign."""
    alpha = None if bridge == "none" else 0.4
    common = {"reward_input": "sampled", "bridge": bridge, "alpha": alpha, "pair": pair, "weight_floor": floor}
    details = {"active": "midpoint", "weights": "lagrange", "order": 3, "support_scale": 0.5, "rescale": rho}
    plan = draw("composed", world, seed, **common, **details)
    k, x = indices(plan)[0], world.x[world.steps]
    if bridge == "drawn":
        inputs, weights = literal.lagrange(world, k, plan.bridges[0].index, 3, 2, 0.5, rho, alpha, floor or 1.0)
    else:
        predicted = literal.leg(world, world.x[k], k, world.steps, 3, 2, 0.5, rho)
        inputs = [literal.pin(predicted, x)]
        weights = 1 / (x - literal.sg(predicted)).abs().mean((1, 2)).clamp(min=floor or 1.0)
    assert relative(engine(world, plan), whole_graph(world, inputs, 1.0 if floor is None else weights)) <= BOUND


def test_composed_leaps_are_leapalign_and_the_posterior_mean_only_shortens_the_grid():
    world = World(5, [0.4, 1.0, 0.7, 0.9, 0.5])
    common = {"active": "start", "weights": "leap", "bridge": "drawn", "alpha": 0.3, "pair": PairDraw()}
    leaps = draw("composed", world, 1, reward_input="sampled", weight_floor=0.1, **common)
    assert leaps.to_dict() | {"method": "leapalign"} == draw("leapalign", world, 1).to_dict()
    stopped = draw("composed", world, 1, reward_input="posterior_mean", stop_within=2, **common)
    stop = stopped.reward_inputs[0].index
    k, j = indices(stopped)
    assert k < j <= stop
    assert stopped.active[0].coefficient == pytest.approx((world.sigmas[j] - world.sigmas[k]).item())
    assert stopped.active[1].coefficient == pytest.approx(-world.sigmas[j].item())


COMPOSED = {"reward_input": "sampled", "active": "late_biased", "weights": "euler", "bridge": "none"}
COMPOSED |= {"active_steps": 2, "late_bias": 1.0}
LEAPS = {"reward_input": "sampled", "active": "start", "weights": "leap", "bridge": "drawn", "alpha": 0.3, "pair": PairDraw()}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (COMPOSED | {"reward_input": "latent"}, "reward_input is 'latent'"),
        (COMPOSED | {"weights": "leap"}, "must be one of start"),
        (COMPOSED | {"weights": "lagrange_last_leg"}, "what follows the drawn split j; use bridge 'drawn', or"),
        (COMPOSED | {"active": "midpoint"}, "must be one of all, last, late_biased, evenly_spaced"),
        (LEAPS | {"bridge": "every"}, "only the split j between two legs can be bridged"),
        (COMPOSED | {"active": "last", "late_bias": None, "bridge": "drawn"}, "must itself be active"),
        (COMPOSED | {"stop_within": 3}, "stop_within is 3: it has nothing to act on"),
        (COMPOSED | {"reward_input": "posterior_mean"}, "stop_within is None: it is needed"),
        (COMPOSED | {"late_bias": None}, "late_bias is None: it is needed"),
        (COMPOSED | {"alpha": 0.5}, "alpha is 0.5: it has nothing"),
        (COMPOSED | {"bridge": "every"}, "alpha is None: it is needed"),
        (COMPOSED | {"bridge": "drawn", "alpha": 0.5}, "pair is None: it is needed"),
        (COMPOSED | {"bridge": "every", "alpha": 1.0, "active_steps": 1}, "at least 2"),
        (COMPOSED | {"weight_floor": 0.1}, "weight_floor is 0.1, but samples"),
        (COMPOSED | {"order": 3}, "order is 3: it has nothing"),
        (LEAPS | {"rescale": 0.5}, "no velocity is inactive"),
        (LEAPS | {"alpha": -1.0}, "alpha is -1.0: it must be a finite number of at least 0"),
        (COMPOSED | {"active": "last", "late_bias": None, "tail": 0.5}, "draws nothing from a window"),
    ],
)
def test_composed_refuses_contradictions(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        composed.Settings(**values)


def test_composed_refuses_a_grid_that_some_draw_would_not_fit():
    sigmas = torch.linspace(1, 0, 5)
    values = COMPOSED | {"reward_input": "posterior_mean", "stop_within": 4, "active_steps": 2}
    for seed in range(5):  # whatever would have been drawn
        with pytest.raises(ValueError, match="active_steps is 2: it must be at most 1"):
            composed.plan(composed.Settings(**values), sigmas, np.random.default_rng(seed))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("composed", "truncated")])
def test_published_settings_make_a_plan_and_draws_repeat(method):
    world = World(0, [1.0] * 25)
    one, two = (draw(method, world, 4).to_dict() for _ in range(2))
    assert one == two
    assert one["method"] == method


@pytest.mark.parametrize(
    ("method", "values", "sentence"),
    [
        ("refl", {"last_n_steps": 0}, "last_n_steps is 0: it must be a whole number of at least 1"),
        ("draft_lv", {"copies": -1}, "copies is -1"),
        ("drtune", {"stop_ratio": 0.0}, "stop_ratio is 0.0: it must be above 0"),
        ("drtune", {"active_steps": 2.5}, "active_steps is 2.5"),
        ("leapalign", {"weight_floor": 0.0}, "weight_floor is 0.0"),
        ("sparse", {"late_bias": float("nan")}, "late_bias is nan"),
        ("sparse", {"tail": 1.5}, "tail is 1.5"),
        ("bridge", {"active_steps": 1}, "active_steps is 1: it must be a whole number of at least 2"),
        ("lagrange", {"active_supports": "none"}, "one of start, midpoint, all"),
        ("truncated", {"active_steps": 0}, "active_steps is 0"),
        ("randomised_truncation", {"least": 4, "most": 3}, "most is 3"),
    ],
)
def test_settings_refuse_what_is_not_allowed(method, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        METHODS[method].settings(**values)


@pytest.mark.parametrize(
    ("method", "values", "sentence"),
    [
        ("refl", {"last_n_steps": 5}, "last_n_steps is 5: it must be at most 4"),
        ("sparse", {"active_steps": 3, "tail": 0.5}, "active_steps is 3: it must be at most 2"),
        ("truncated", {"active_steps": 5}, "active_steps is 5: it must be at most 4"),
        ("randomised_truncation", {"least": 5}, "most is None"),
    ],
)
def test_plans_refuse_a_grid_too_short(method, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw(method, World(0, [1.0] * 4), 0, **values)
