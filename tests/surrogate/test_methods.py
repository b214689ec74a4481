"""Each method's gradient against plain autograd of its whole graph, built literally (see literal.py), in float64."""

from dataclasses import replace

import literal
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
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
        cap=st.one_of(st.none(), st.integers(2, 6)),
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
    st.sampled_from([0.0, 0.25, 1.0]),
    FACTORS,
    FACTORS,
    st.floats(0.01, 0.5),
)
def test_lagrange(world, seed, pair, tail, order, mode, support_scale, rho, alpha, floor):
    values = {"order": order, "active_supports": mode, "support_scale": support_scale}
    plan = draw("lagrange", world, seed, pair=pair, tail=tail, rescale=rho, alpha=alpha, weight_floor=floor, **values)
    j = plan.bridges[0].index
    active = min({"start": 1, "midpoint": 2, "all": order}[mode], order)
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


def drawn_window(data, world, stop_within, pair, least):
    """A tail and the most active steps that fit whatever the stop; ``least`` of them are needed."""
    shortest = world.steps - (stop_within or 1) + 1
    tail = data.draw(TAILS)
    room = shortest - window_start(shortest, tail, 1 if pair is None else 3)
    assume(room >= least)
    return tail, room


def trajectory(world, plan):
    """The stop of a posterior mean, or None; how many steps lead to the reward input; and its value."""
    if plan.reward_inputs[0].kind == "sampled":
        return None, world.steps, world.x[world.steps]
    stop = plan.reward_inputs[0].index
    return stop, stop + 1, world.x[stop] - world.sigmas[stop] * world.v[stop]


def rho_factor(rho, deltas, live, start=0):
    return literal.rho_factor(rho, deltas[start:], [deltas[i] for i in live])


@properties
@given(worlds(4), SEEDS, PAIRS, st.data())
def test_composed_euler(world, seed, pair, data):
    """Every active set and bridge that goes with Euler weights, to both reward inputs, with and without a window."""
    active = data.draw(st.sampled_from(["all", "last", "late_biased", "evenly_spaced"]))
    bridge = data.draw(st.sampled_from(["none", "every"] + ["drawn"] * (active in ("all", "late_biased"))))
    stop_within = data.draw(st.one_of(st.none(), st.integers(1, world.steps - 2)))
    alpha, pair = None if bridge == "none" else data.draw(FACTORS), pair if bridge == "drawn" else None
    rho, least = 0.0 if active == "all" else data.draw(FACTORS), 1 if bridge == "none" else 2
    tail, room = None, world.steps - (stop_within or 1) + 1
    if active == "late_biased" or pair is not None:
        tail, room = drawn_window(data, world, stop_within, pair, least)
    plan = draw(
        "composed",
        world,
        seed,
        reward_input="sampled" if stop_within is None else "posterior_mean",
        active=active,
        weights="euler",
        bridge=bridge,
        stop_within=stop_within,
        active_steps=None if active == "all" else data.draw(st.integers(least, room)),
        late_bias=1.5 if active == "late_biased" else None,
        alpha=alpha,
        pair=pair,
        rescale=rho,
        tail=tail,
    )
    assert plan.steps == world.steps
    stop, end, _ = trajectory(world, plan)
    live, start = indices(plan), window_start(end, tail, 1 if pair is None else 3)
    assert active == "all" or live[0] >= start
    factor = rho_factor(rho, [world.delta(i, stop) for i in range(end)], live, start)
    match bridge:
        case "none":
            expected = [literal.compose(world, world.x[0], 0, end, live, factor, stop)]
        case "every":
            expected = literal.bridged_everywhere(world, live, alpha, factor, stop)
        case "drawn":
            j = plan.bridges[0].index
            assert j > start
            x_j = literal.pin(literal.compose(world, world.x[0], 0, j, live, factor, stop), world.x[j])
            expected = [literal.compose(world, x_j, j, end, live, factor, stop, at=j, alpha=alpha)]
    assert relative(engine(world, plan), whole_graph(world, expected)) <= BOUND


@properties
@given(worlds(4), SEEDS, PAIRS, FACTORS, FACTORS, st.data())
def test_composed_lagrange_on_the_last_leg(world, seed, pair, rho, alpha, data):
    """Late-biased active steps, of which those from the drawn j on are the supports of the last leg."""
    stop_within = data.draw(st.one_of(st.none(), st.integers(1, world.steps - 2)))
    tail, room = drawn_window(data, world, stop_within, pair, 2)
    plan = draw(
        "composed",
        world,
        seed,
        reward_input="sampled" if stop_within is None else "posterior_mean",
        active="late_biased",
        weights="lagrange_last_leg",
        bridge="drawn",
        stop_within=stop_within,
        active_steps=data.draw(st.integers(2, room)),
        late_bias=1.0,
        alpha=alpha,
        pair=pair,
        rescale=rho,
        tail=tail,
    )
    (stop, end, seen), j = trajectory(world, plan), plan.bridges[0].index
    sigmas = world.sigmas if stop is None else [*world.sigmas[: stop + 1], 0.0]
    live, start = indices(plan), window_start(end, tail, 3)
    before, last = [i for i in live if i < j], [i for i in live if i >= j]
    assert last[0] == j
    assert before[0] >= start
    factor = rho_factor(rho, [world.delta(i, stop) for i in range(j)], before, start)
    x_j = literal.pin(literal.compose(world, world.x[0], 0, j, before, factor, stop), world.x[j])
    expected = x_j
    for i, weight in zip(last, literal.integrals(sigmas, last, j, end), strict=True):
        expected = expected + weight * world.u(literal.scale(x_j, alpha) if i == j else world.x[i], i)
    assert relative(engine(world, plan), whole_graph(world, [literal.pin(expected, seen)])) <= BOUND


@properties
@given(worlds(4), SEEDS, PAIRS, TAILS, st.sampled_from(["none", "drawn"]), st.integers(1, 4), st.data())
def test_composed_legs(world, seed, pair, tail, bridge, order, data):
    """One or two Lagrange legs to both reward inputs, with and without a window and sample weights."""
    stop_within = data.draw(st.one_of(st.none(), st.integers(1, world.steps - 2)))
    active = data.draw(st.sampled_from(["start", "midpoint", "all"]))
    number = {"start": 1, "midpoint": 2, "all": order}[active]
    alpha, rho = None if bridge == "none" else 0.4, data.draw(FACTORS) if number < order else 0.0
    support_scale = 0.5 if order > 1 and active != "start" else None
    floor = data.draw(st.one_of(st.none(), st.floats(0.01, 0.5))) if stop_within is None else None
    plan = draw(
        "composed",
        world,
        seed,
        reward_input="sampled" if stop_within is None else "posterior_mean",
        active=active,
        weights="lagrange",
        bridge=bridge,
        stop_within=stop_within,
        order=order,
        support_scale=support_scale,
        alpha=alpha,
        pair=pair,
        weight_floor=floor,
        rescale=rho,
        tail=tail,
    )
    (stop, end, seen), k, weights = trajectory(world, plan), indices(plan)[0], 1.0
    start, details = window_start(end, tail, 3), (order, number, support_scale or 1.0, rho)
    assert k >= start or pair.rule == "midpoint_j"  # which alone does not clip k
    if bridge == "drawn":
        j = plan.bridges[0].index
        assert j > start
        predicted_j = literal.leg(world, world.x[k], k, j, *details)
        x_j = literal.pin(predicted_j, world.x[j])
        predicted = literal.leg(world, x_j, j, end, *details, at=j, alpha=alpha, stop=stop)
        if floor is not None:
            weights = literal.similarity(world, predicted_j, predicted, j, floor)
    else:
        predicted = literal.leg(world, world.x[k], k, end, *details, stop=stop)
        if floor is not None:
            weights = 1 / (seen - literal.sg(predicted)).abs().mean((1, 2)).clamp(min=floor)
    assert relative(engine(world, plan), whole_graph(world, [literal.pin(predicted, seen)], weights)) <= BOUND


def test_leaps_to_a_posterior_mean_only_shorten_the_grid():
    world = World(5, [0.4, 1.0, 0.7, 0.9, 0.5])
    common = {"active": "start", "weights": "leap", "bridge": "drawn", "alpha": 0.3, "pair": PairDraw()}
    stopped = draw("composed", world, 1, reward_input="posterior_mean", stop_within=2, **common)
    stop = stopped.reward_inputs[0].index
    k, j = indices(stopped)
    assert k < j <= stop
    assert stopped.active[0].coefficient == pytest.approx((world.sigmas[j] - world.sigmas[k]).item())
    assert stopped.active[1].coefficient == pytest.approx(-world.sigmas[j].item())


MEAN = {"reward_input": "posterior_mean", "weights": "euler", "bridge": "none"}
LATE = {"reward_input": "sampled", "weights": "euler", "active": "late_biased"}
SPLIT = {"bridge": "drawn", "alpha": 0.2, "pair": PairDraw(cap=9)}
LEGS = SPLIT | {"reward_input": "sampled", "weight_floor": 0.3}


@pytest.mark.parametrize("tail", [None, 0.5])
@pytest.mark.parametrize(
    ("method", "values", "choices"),
    [
        ("refl", {"last_n_steps": 11}, MEAN | {"stop_within": 11, "active": "last", "active_steps": 1}),
        ("draft_lv", {"copies": 0}, MEAN | {"stop_within": 1, "active": "last", "active_steps": 1}),
        ("drtune", {"active_steps": 3}, MEAN | {"stop_within": 10, "active": "evenly_spaced", "active_steps": 3}),
        ("leapalign", SPLIT | {"weight_floor": 0.3, "bridge": None}, LEGS | {"weights": "leap", "active": "start"}),
        ("sparse", {}, LATE | {"bridge": "none", "active_steps": 4, "late_bias": 1.0, "rescale": 0.5}),
        (
            "bridge",
            SPLIT | {"rescale": 0.5, "bridge": None},
            LATE | SPLIT | {"active_steps": 5, "late_bias": 4.0, "rescale": 0.5},
        ),
        (
            "lagrange",
            SPLIT | {"weight_floor": 0.3, "rescale": 0.5, "bridge": None},
            LEGS | {"weights": "lagrange", "active": "midpoint", "order": 3, "support_scale": 0.25, "rescale": 0.5},
        ),
        (
            "truncated",
            {"active_steps": 6},
            {"reward_input": "sampled", "weights": "euler", "bridge": "every", "alpha": 1.0, "active": "last", "active_steps": 6},
        ),
    ],
)
def test_composed_from_the_same_choices_is_the_method(method, values, choices, tail):
    """Plan for plan, from the same generator; a window where the method has one."""
    values = {k: v for k, v in values.items() if v is not None}
    if tail is not None:
        if "tail" not in METHODS[method].settings.__dataclass_fields__:
            return
        values, choices = values | {"tail": tail}, choices | {"tail": tail}
    world = World(5, np.linspace(0.5, 1.5, 25))
    for seed in range(20):
        composed_plan = draw("composed", world, seed, **choices)
        assert replace(composed_plan, method=method) == draw(method, world, seed, **values)


COMPOSED = {"reward_input": "sampled", "active": "late_biased", "weights": "euler", "bridge": "none"}
COMPOSED |= {"active_steps": 2, "late_bias": 1.0}
LEAPS = {"reward_input": "sampled", "active": "start", "weights": "leap", "bridge": "drawn", "alpha": 0.3, "pair": PairDraw()}
QUADRATURE = LEAPS | {"weights": "lagrange", "support_scale": 0.5}


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
        (QUADRATURE | {"order": 1, "active": "midpoint"}, "support_scale is 0.5: it has nothing to act on .* order at least 2"),
        (QUADRATURE | {"order": 1, "active": "all"}, "support_scale is 0.5: it has nothing to act on"),
        (QUADRATURE | {"order": 3, "active": "midpoint", "support_scale": None}, "support_scale is None: it is needed"),
        (QUADRATURE | {"order": 2, "active": "midpoint", "rescale": 0.5}, "order 2 no velocity is inactive"),
        (QUADRATURE | {"order": 3, "active": "all", "rescale": 0.5}, "no velocity is inactive"),
        (
            QUADRATURE | {"order": 1, "active": "midpoint", "support_scale": None, "rescale": 0.5},
            "order 1 no velocity is inactive",
        ),
        (
            QUADRATURE | {"order": 1, "active": "start", "support_scale": None, "rescale": 0.5},
            "order 1 no velocity is inactive",
        ),
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
    one, two = (draw(method, world, 4) for _ in range(2))
    assert one == two
    assert one.method == method


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
        ("randomised_truncation", {"least": 5}, "least is 5: it must be at most 4"),
        ("randomised_truncation", {"least": 2, "most": 5}, "most is 5: it must be at most 4"),
    ],
)
def test_plans_refuse_a_grid_too_short(method, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw(method, World(0, [1.0] * 4), 0, **values)
