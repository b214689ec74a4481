"""The benchmarks that start clusters, at their smallest: what they compare is the same, and what they bound is bounded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowbp_ray.config import load
from flowbp_ray.rollouts import stream
from pipelines import session, without
from pipelines.benchmark import PARTS
from pipelines.machines import SPARSE
from pipelines.scale import Case

ROOT = Path(__file__).parents[2]


def benchmark(*given):
    """A command's rows, and all that it says."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "pipelines.benchmark", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("["))), done.stdout


def test_bounds_of_the_cases():
    assert Case("balanced", 16, 8, 2, 16, 1, 1.0).bound(0, range(2, 6)) == 8.0
    assert Case("samplers", 4, 8, 2, 16, 1, 1.0).bound(0, range(2, 6)) == 32.0
    assert Case("balanced", 1, 1, 1, 1, 0, 1.0).bound(0, range(2, 6)) == 8 + 0.25 + 1
    late = Case("stragglers", 16, 16, 16, 16, 1, 1.0, stragglers=0.5).bound(0, range(2, 6))
    assert 10 < late < 14
    case = Case("stragglers", 16, 8, 2, 16, 0, 1.0, stragglers=0.1)
    assert case.bound(0, range(2, 6)) > case.bound(0, range(2, 6), in_order=False) > 11.0


def test_the_command_knows_all_parts_that_can_be_left_out():
    assert tuple(without.PARTS) == PARTS
    for part in without.PARTS.values():
        with part.left_out():  # fails for a name that is not there any more
            pass
    assert "RAY_DATA_METADATA_PREFETCH_ON_THREAD" in session.PROMPT
    for lag, samplers, number in ((0, 1, 2), (0, 2, 1), (1, 1, 2), (1, 2, 2)):
        config = load(SPARSE, [f"train.policy_lag={lag}", f"cluster.samplers={samplers}"])
        assert stream.at_hand(config) == number
        with without.PARTS["samplers"].left_out():
            assert stream.at_hand(config) == 3 - number


@pytest.mark.drill
def test_steps_are_about_as_long_as_their_bounds_or_longer():
    given = ("--series", "balanced", "--samplers", "2", "--factor", "0.2", "--steps", "3", "--without", "looks", "samplers")
    rows, said = benchmark("scale", *given)
    parts = (None, "looks", "samplers")
    assert [(row["without"], row["lag"]) for row in rows] == [(part, lag) for part in parts for lag in (0, 1)]
    assert all(0.3 < row["of_bound"] <= 1.1 for row in rows)  # it is seconds that are measured
    assert rows[0]["bound_s"] > rows[1]["bound_s"]
    assert "| balanced | 2 | 1 | 1 | 16 | 0 | 1 MB |" in said
    assert "| balanced, without looks | 2 |" in said
    assert "\nlooks: Ray Data's executor looks when something is done; without it each 0.1 s." in said


@pytest.mark.drill
def test_the_loop_and_the_whole_system_end_with_the_same_weights():
    small = ["train.batch=4", "train.micro_batch=2", "sampling.steps=4", "surrogate.active_steps=2", "adapter.rank=4"]
    rows, said = benchmark("pipeline", *small, "--steps", "1")
    assert [row["same_weights"] for row in rows if "same_weights" in row] == [True, True]
    assert "bit by bit" in said


@pytest.mark.drill
def test_what_is_published_is_loaded():
    rows, _ = benchmark("publish", "--samplers", "1")
    assert [(row["what"], row["bytes"]) for row in rows] == [("adapter", 96 * 2**20), ("full", 2**30)]
    assert all(row["load_s"] > 0 for row in rows)
