"""The benchmarks that start clusters, at their smallest: what they compare is the same, and what they bound is bounded."""

import pytest

from pipelines import monolith, publish_cost, scale
from pipelines.scale import Case


def quiet(_):
    pass


def test_bounds_of_the_cases():
    assert Case("balanced", 16, 8, 2, 16, 1, 1.0).bound(0, range(2, 6)) == 8.0
    assert Case("samplers", 4, 8, 2, 16, 1, 1.0).bound(0, range(2, 6)) == 32.0
    assert Case("balanced", 1, 1, 1, 1, 0, 1.0).bound(0, range(2, 6)) == 8 + 0.25 + 1
    late = Case("stragglers", 16, 16, 16, 16, 1, 1.0, stragglers=0.5).bound(0, range(2, 6))
    assert 10 < late < 14


@pytest.mark.slow
def test_no_step_is_faster_than_its_bound_and_lag_1_is_faster_than_lag_0():
    rows = scale.measure(["balanced"], [2], 0.2, 3, quiet)
    assert [row["lag"] for row in rows] == [0, 1]
    assert all(0.3 < row["of_bound"] <= 1.05 for row in rows)  # it is seconds that are measured
    assert rows[0]["bound_s"] > rows[1]["bound_s"]
    assert "| balanced | 2 | 1 | 1 | 16 | 0 | 1 MB |" in scale.table(rows)


@pytest.mark.slow
def test_the_loop_and_the_whole_system_end_with_the_same_weights():
    small = ["train.batch=4", "train.micro_batch=2", "sampling.steps=4", "surrogate.active_steps=2", "adapter.rank=4"]
    rows = monolith.measure(small, 1, quiet)
    assert [row["same_weights"] for row in rows if "same_weights" in row] == [True, True]
    assert "bit by bit" in monolith.table(rows)


@pytest.mark.slow
def test_what_is_published_is_loaded(monkeypatch):
    monkeypatch.setattr(publish_cost, "SIZES", {"adapter": (64 * 2**20, publish_cost.torch.float32)})
    (row,) = publish_cost.measure([2], quiet)
    assert (row["bytes"], row["samplers"]) == (64 * 2**20, 2)
    assert row["load_s"] > 0
