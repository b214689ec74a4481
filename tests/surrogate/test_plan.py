"""Plans as data: what they need from the rollout, how they print, and which contradict themselves."""

import json

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
def test_tables_and_dicts(method):
    plan = METHODS[method].plan(METHODS[method].settings(), torch.linspace(1, 0, 26), np.random.default_rng(0))
    assert json.loads(json.dumps(plan.to_dict()))["method"] == method
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
