from pathlib import Path

import pytest

from flowbp_ray.config import ConfigError, load

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


def weight(step, schedule):
    return (
        load(SPARSE, [f"reward.components.0.schedule={schedule}", "reward.components.0.weight=2"])
        .reward.components[0]
        .weight_at(step)
    )


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 1.0), (9, 1.0), (10, 1.0), (15, 0.75), (20, 0.5), (29, 0.05), (30, 0.0), (1000, 0.0)]
)
def test_a_schedule_is_linear_between_its_steps_and_level_around_them(step, factor):
    assert weight(step, "[[10, 1], [20, 0.5], [30, 0]]") == pytest.approx(2 * factor)


def test_without_a_schedule_the_weight_stays():
    assert weight(7, "null") == 2
    assert weight(7, "[[3, 0.5]]") == 1


@pytest.mark.parametrize("schedule", ["[[10, 1], [10, 2]]", "[[10, 1], [5, 2]]"])
def test_a_schedules_steps_go_forward(schedule):
    with pytest.raises(
        ConfigError, match=r"reward.components.0.schedule: its steps are .*: let each be later than the one before"
    ):
        weight(0, schedule)


def test_rewards_of_their_own_reserve_theirs_and_a_running_application_nothing():
    plain, own = load(SPARSE, []).reserved(), "reward.components.0.deployment={replicas: 2, cpus: 0.5, gpus: 0.25}"
    assert load(SPARSE, [own]).reserved() == {"CPU": plain["CPU"] + 1, "GPU": 0.5}
    assert load(SPARSE, [own, "reward.application=rewards"]).reserved()["CPU"] == plain["CPU"] - 1


def test_judges_reserve_theirs_after_the_train_workers():
    def reserved(*more):
        return load(SPARSE, ["cluster.reward_max_replicas=2", *more]).reserved()

    assert reserved("evaluation.judge_cpus=0.5") == reserved()  # no more than train workers
    judged = reserved("evaluation.judge_cpus=4", "evaluation.judge_gpus=1")
    workers = load(SPARSE, []).train.workers * load(SPARSE, []).cluster.trainer_cpus
    assert judged == {"CPU": reserved()["CPU"] - workers - 1 + 2 * 4, "GPU": 2}


@pytest.mark.parametrize(
    "override", ["reward.components.0.deployment={replicas: 2, max_replicas: 1}", "cluster.reward_max_replicas=0"]
)
def test_replicas_have_room(override):
    with pytest.raises(ConfigError, match="max_replicas"):
        load(SPARSE, [override])
