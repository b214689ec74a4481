"""Bounds of a step, by hand."""

import pytest

from pipelines.bounds import Pools, alone, stages


@pytest.mark.parametrize(
    ("pools", "sampling", "seconds"),
    [
        (Pools(1, 1, 1), [4.0], 4 + 1 + 2),  # one micro-batch goes through all of it
        (Pools(1, 1, 1), [4.0, 4.0], 8 + 1 + 2),  # the first is done when the second is sampled
        (Pools(2, 1, 1), [4.0, 4.0], 4 + 1 + 2 + 2),  # both come at once: one is updated after the other
        (Pools(2, 1, 2), [4.0, 4.0], 4 + 1 + 1 + 2),  # … or rewarded after it
        (Pools(2, 2, 2), [4.0, 4.0], 4 + 1 + 2),
        (Pools(2, 2, 2), [8.0, 4.0], 8 + 1 + 2),  # a straggler
        (Pools(2, 2, 1), [8.0, 4.0, 4.0], 8 + 1 + 2 + 2 + 2),  # in order: nothing is learned before the first
    ],
)
def test_a_step_alone(pools, sampling, seconds):
    assert alone(sampling, 1.0, 2.0, pools) == seconds


@pytest.mark.parametrize(
    ("pools", "sampling", "in_order", "seconds"),
    [
        (Pools(3, 1, 1), [8.0, 4.0, 4.0], True, 8 + 1 + 2 + 2 + 2),  # the others wait for the first one …
        (Pools(3, 1, 1), [8.0, 4.0, 4.0], False, 8 + 1 + 2),  # … or are learned from meanwhile
        (Pools(3, 2, 3), [8.0, 4.0, 4.0], True, 8 + 1 + 1 + 2),
        (Pools(3, 1, 1), [4.0, 4.0, 8.0], True, 8 + 1 + 2),  # it is the last anyway
        (Pools(3, 1, 1), [4.0, 4.0, 4.0], False, 4 + 1 + 2 + 2 + 2),
    ],
)
def test_what_order_costs(pools, sampling, in_order, seconds):
    assert alone(sampling, 1.0, 2.0, pools, in_order=in_order) == seconds


def test_all_stages_busy():
    needs = stages(8, 4.0, 1.0, 2.0, Pools(4, 1, 2))
    assert needs == {"samplers": 8.0, "rewards": 8.0, "train workers": 8.0}
