"""Who waited, and what is advised."""

from flowbp_ray.config import load
from pipelines.machines import SPARSE
from pipelines.waits import FIRST, advice, waits

SECONDS = {
    "loading": 0.5, "sampling": 7.5, "sampling_waiting": 2.0, "reward": 1.0, "reward_waiting": 9.0, "waiting": 4.0, "step": 10.0,
}  # fmt: skip


def test_parts_of_the_time_without_the_first_steps():
    seconds = {k: [100.0] * FIRST + [v, v] for k, v in SECONDS.items()}
    assert waits(seconds) == {"samplers": 0.2, "rewards": 0.9, "train workers": 0.4}
    assert waits({k: [v] for k, v in SECONDS.items()}) == {"samplers": 0.2, "rewards": 0.9, "train workers": 0.4}
    assert waits({}) == {}


def test_the_stage_that_waits_least_is_named_and_what_to_set():
    waited = waits({k: [v] for k, v in SECONDS.items()})
    said = advice(load(SPARSE, ["train.policy_lag=1"]), waited)
    assert said.startswith("samplers 20 %, rewards 90 %, train workers 40 % of their time; samplers least")
    assert "cluster.samplers" in said
    shared = load(SPARSE, ["train.policy_lag=1", "reward.application=ours"])
    assert "more of them (of the application 'ours')" in advice(shared, waited | {"rewards": 0.0})
    assert "1 overlaps them" in advice(load(SPARSE, ["train.policy_lag=0"]), waited)
