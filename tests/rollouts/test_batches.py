from pathlib import Path

from flowbp_ray.config import load
from flowbp_ray.rollouts.batches import MicroBatch, policy_version

CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


def test_every_sample_of_every_step_is_in_one_micro_batch():
    config = load(CONFIG, ["train.steps=5", "train.batch=12", "train.micro_batch=3", "train.workers=2"])
    batches = [MicroBatch.of(config, n) for n in range(20)]
    assert [b.step for b in batches] == [s for s in range(5) for _ in range(4)]
    assert [b.part for b in batches] == [0, 1, 2, 3] * 5
    for step in range(5):
        assert [s for b in batches if b.step == step for s in b.samples] == list(range(12))


def test_the_lag_is_exact():
    now, behind = (load(CONFIG, [f"train.policy_lag={lag}"]) for lag in (0, 1))
    assert [policy_version(now, step) for step in range(4)] == [0, 1, 2, 3]
    assert [policy_version(behind, step) for step in range(4)] == [0, 0, 1, 2]
