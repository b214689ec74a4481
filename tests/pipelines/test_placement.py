"""What `align --plan` predicts, by hand, and one real profile."""

import subprocess
import sys

import pytest

from flowbp_ray.config import load
from pipelines.bounds import Pools
from pipelines.machines import SPARSE
from pipelines.placement import predicted, report

FIGURES = {
    "sampling": 4.0,
    "reward": 0.5,
    "update": 1.0,
    "texts": 0.0,
    "stepping": 0.0,
    "publishing": 0.0,
    "loading": 0.0,
    "sample_bytes": 1e6,
}
CONFIG = load(SPARSE, ["train.batch=32", "train.micro_batch=4", "cluster.samplers=2", "train.workers=1"])  # lag 1


def test_the_bottleneck_and_the_pools_that_do_not_wait():
    found = predicted(CONFIG, FIGURES, None)
    assert found["stages"] == {"samplers": 16.0, "rewards": 4.0, "train workers": 8.0, "two steps under way": 18.5 / 2}
    assert found["bottleneck"] == "samplers"
    assert found["step"] == {0: 16 + 0.5 + 1 + 1, 1: 16.0}  # the last two are sampled at once, and then take turns
    assert found["pools"] == Pools(4, 1, 1)
    said = report(CONFIG, FIGURES, found)
    assert "| samplers | 4.000 | 2 | 16.00 |" in said
    assert "the bottleneck: samplers (cluster.samplers)." in said
    assert "cluster.samplers=4 cluster.reward_replicas=1 train.workers=1, which reserves 7 CPUs." in said


def test_cores_that_all_share_are_a_bound_too():
    found = predicted(CONFIG, FIGURES, 2)
    assert found["stages"]["cores of this machine"] == pytest.approx(8 * 5.5 / 2)
    assert found["bottleneck"] == "cores of this machine"
    assert found["step"][1] == pytest.approx(22)
    assert "| cores of this machine |  |  | 22.00 |" in report(CONFIG, FIGURES, found)


def test_weights_on_their_way_are_in_the_stages_that_wait_for_them():
    found = predicted(CONFIG, FIGURES | {"publishing": 6.0, "loading": 2.0, "stepping": 3.0}, None)
    assert found["stages"]["samplers"] == 16 + 2
    assert found["stages"]["train workers"] == 8 + 6 + 3
    assert found["step"][1] == 18
    assert found["step"][0] == 18.5 + 6 + 3 + 2


def test_where_more_processes_do_not_help_none_are_suggested():
    few = predicted(load(SPARSE, ["train.batch=32", "train.micro_batch=16"]), FIGURES | {"update": 0.5}, None)
    assert few["pools"] is None  # 2 micro-batches: a step alone is 5 s, of which 1 s is learning
    assert "more of them would help" in report(CONFIG, FIGURES, few)
    for loading in (7.999, 8.0, 9.0):  # a step's learning takes 8 s
        assert predicted(CONFIG, FIGURES | {"loading": loading}, None)["pools"] is None
    in_turn = load(SPARSE, ["train.policy_lag=0", "train.batch=32", "train.micro_batch=4"])
    found = predicted(in_turn, FIGURES, None)
    assert found["bottleneck"] == "one step by itself"
    assert "1 overlaps them" in report(in_turn, FIGURES, found)


@pytest.mark.parametrize("more", [[], ["train.batch=8", "train.sharded=true", "train.unsharded_gradients=true"]])
def test_the_command_profiles_and_starts_nothing(tmp_path, more):
    small = ["train.batch=2", "train.micro_batch=1", "sampling.steps=4", "surrogate.active_steps=2", *more]
    given = [str(SPARSE), "--plan", *small, f"output={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/m.db"]
    done = subprocess.run([sys.executable, "-m", "pipelines.align", *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| train workers | 0." in done.stdout
    assert "which reserves" in done.stdout
    assert "a micro-batch's texts take 0." in done.stdout
    assert not list(tmp_path.iterdir())
