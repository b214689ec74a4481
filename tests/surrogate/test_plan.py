"""Plans as data: what they need from the rollout, how they print, and which contradict themselves."""

import numpy as np
import pytest
import torch

from flowbp_ray.surrogate.methods import METHODS
from flowbp_ray.surrogate.plan import Active, Bridge, Connector, Plan, RewardInput, SampleWeight

SAMPLED = (RewardInput("sampled", 4),)


def test_what_each_kind_needs():
    sparse = Plan("sparse", 4, SAMPLED, (Active(1, -0.25), Active(3, -0.25)))
    assert (sparse.latents_needed, sparse.velocities_needed, sparse.last_index) == ((1, 3, 4), (), 4)
    refl = Plan("refl", 4, (RewardInput("posterior_mean", 2),), (Active(2, -0.5),))
    assert (refl.latents_needed, refl.velocities_needed, refl.last_index) == ((2,), (2,), 2)
    drtune = Plan("drtune", 4, (RewardInput("posterior_mean", 2),), (Active(1, -0.5),))
    assert (drtune.latents_needed, drtune.velocities_needed, drtune.last_index) == ((1, 2), (2,), 2)
    draft = METHODS["draft_lv"].plan(METHODS["draft_lv"].settings(), torch.linspace(1, 0, 5), np.random.default_rng(0))
    assert (draft.latents_needed, draft.velocities_needed, draft.last_index, draft.copies) == ((3,), (3,), 3, 2)
    weight = SampleWeight((Connector(0, 2, (0, 1)), Connector(2, 4, (2, 3))), 0.1)
    legs = Plan("lagrange", 4, SAMPLED, (Active(0, -0.5), Active(2, -0.5)), (Bridge(2, 0.1),), weight)
    assert (legs.latents_needed, legs.velocities_needed, legs.last_index) == ((0, 2, 4), (0, 1, 2, 3), 4)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("composed", "truncated")])
def test_tables(method):
    plan = METHODS[method].plan(METHODS[method].settings(), torch.linspace(1, 0, 26), np.random.default_rng(0))
    lines = plan.table().splitlines()
    assert lines[0] == f"{method}, 25 steps"
    rows = lines[2:-1] if plan.sample_weight else lines[2:]
    assert [int(row.split()[0]) for row in rows] == [a.index for a in plan.active]
    assert lines[-1].startswith("sample weight 1 / (max(d_") == (plan.sample_weight is not None)


def test_a_table_in_full():
    plan = Plan("mine", 4, (RewardInput("posterior_mean", 3),), (Active(1, -0.25), Active(3, -0.25)), (Bridge(3, 0.5),))
    assert plan.table() == (
        "mine, 4 steps\n"
        "index  coefficient  bridge  reward input\n"
        "    1    -0.250000       -  posterior mean at 3\n"
        "    3    -0.250000     0.5  posterior mean at 3"
    )


@pytest.mark.parametrize(
    ("active", "bridges", "sentence"),
    [
        ((), (), "no active index"),
        ((Active(3, 1.0), Active(1, 1.0)), (), "not in order"),
        ((Active(1, 1.0), Active(1, 1.0)), (), "there twice"),
        ((Active(4, 1.0),), (), "leave its 4 steps"),
        ((Active(1, 1.0, 1),), (), "or its 1 reward inputs"),
        ((Active(1, 1.0), Active(2, 1.0)), (Bridge(1, 1.0),), "after the first"),
        ((Active(1, 1.0), Active(2, 1.0)), (Bridge(3, 1.0),), "after the first"),
    ],
)
def test_contradictions_are_refused(active, bridges, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plan("mine", 4, SAMPLED, active, bridges)


MEAN = RewardInput("posterior_mean", 3)


def copy(number, index=3):
    return RewardInput("copy", index, number)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ([RewardInput("sampled", 3)], r"reward input 0 \(x_3\), but of its 4 steps a sampled one needs 4"),
        ([RewardInput("posterior_mean", 4)], r"\(posterior mean at 4\), but of its 4 steps a posterior_mean one needs 0 to 3"),
        ([RewardInput("posterior_mean", -1)], "needs 0 to 3"),
        ([MEAN, copy(0, index=2)], r"reward input 1 \(posterior mean of copy 0 at 2\), but of its 4 steps a copy one needs 3"),
        ([MEAN, copy(1)], r"numbers its copies \[1\]: number them 0, 1"),
        ([MEAN, copy(1), copy(0)], r"numbers its copies \[1, 0\]"),
        ([MEAN, copy(0), copy(0)], r"numbers its copies \[0, 0\]"),
        ([MEAN, copy(None)], r"numbers its copies \[None\]"),
        ([RewardInput("posterior_mean", 3, copy=0)], "and nothing but copies"),
    ],
)
def test_reward_inputs_out_of_place_are_refused(inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plan("mine", 4, tuple(inputs), tuple(Active(3, 1.0, m) for m in range(len(inputs))))


@pytest.mark.parametrize(
    ("inputs", "places", "bridges", "sentence"),
    [
        (
            [RewardInput("posterior_mean", 2)],
            [(1, 0), (3, 0)],
            [],
            r"active index 3 after its reward input \(posterior mean at 2",
        ),
        ([MEAN, copy(0)], [(2, 1), (3, 0)], [], "active index 2 for a noised copy"),
        ([MEAN, RewardInput("sampled", 4)], [(1, 0), (1, 1), (2, 0)], [1], r"bridges \[1\]: .* here of \[2\]"),
        ([MEAN, RewardInput("sampled", 4)], [(1, 0), (2, 1)], [2], r"bridges \[2\]: .* here of \[\]"),
        ([MEAN, copy(0)], [(1, 0), (3, 0), (3, 1)], [3], r"at \[3\] a velocity is taken at a noised copy"),
        ([MEAN], [(1, 0), (2, 0), (3, 0)], [3, 2], "must be in order"),
        ([MEAN], [(1, 0), (2, 0), (3, 0)], [2, 2], "must be in order"),
    ],
)
def test_active_velocities_and_bridges_that_move_nothing_are_refused(inputs, places, bridges, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plan("mine", 4, tuple(inputs), tuple(Active(i, 1.0, m) for i, m in places), tuple(Bridge(b, 1.0) for b in bridges))


def test_an_index_active_for_two_reward_inputs_can_be_bridged_for_one():
    active = (Active(1, 1.0, 0), Active(2, 1.0, 0), Active(2, 1.0, 1))
    assert Plan("mine", 4, (MEAN, RewardInput("sampled", 4)), active, (Bridge(2, 1.0),)).bridges[0].index == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(number):
    for coefficient, alpha in ((number, 1.0), (1.0, number)):
        with pytest.raises(ValueError, match="all must be finite"):
            Plan("mine", 4, SAMPLED, (Active(1, 1.0), Active(2, coefficient)), (Bridge(2, alpha),))


@pytest.mark.parametrize(
    ("connectors", "floor", "sentence"),
    [
        ([], 0.1, "weighs samples by no connector"),
        ([(1, 3, (1,))], 0.0, "floor 0.0: it must be a finite number above 0"),
        ([(1, 3, (1,))], float("nan"), "floor nan"),
        ([(1, 1, (1,))], 0.1, "connector from 1 to 1: it must go forward within its 4 steps"),
        ([(0, 2, (0,)), (3, 2, (3,))], 0.1, "connector from 3 to 2"),
        ([(1, 5, (1,))], 0.1, "connector from 1 to 5"),
        ([(-1, 2, (0,))], 0.1, "connector from -1 to 2"),
        ([(1, 3, ())], 0.1, r"from 1 to 3 with supports \(\)"),
        ([(1, 3, (1, 3))], 0.1, r"with supports \(1, 3\): they must be in order and before the target, from the start on"),
        ([(1, 3, (0, 1))], 0.1, r"with supports \(0, 1\)"),
        ([(1, 3, (2, 1))], 0.1, r"with supports \(2, 1\)"),
        ([(1, 3, (1, 1))], 0.1, r"with supports \(1, 1\)"),
    ],
)
def test_sample_weights_of_no_leg_are_refused(connectors, floor, sentence):
    weight = SampleWeight(tuple(Connector(*c) for c in connectors), floor)
    with pytest.raises(ValueError, match=sentence):
        Plan("mine", 4, SAMPLED, (Active(1, 1.0),), sample_weight=weight)
