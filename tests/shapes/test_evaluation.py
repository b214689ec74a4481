import numpy as np
import pytest
import torch

from flowbp_ray.pictures import to_uint8
from flowbp_ray.shapes.captions import TASKS, evaluation_prompts, parse
from flowbp_ray.shapes.evaluation import judge, seeds, six_tasks
from flowbp_ray.shapes.world import draw, lay_out


def test_shares_and_standard_errors():
    rights = {task: [True] * 3 + [False] for task in TASKS} | {"counting": [False] * 4}
    scores = six_tasks(rights)
    assert scores["position"].value == 0.75
    assert scores["position"].error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert scores["counting"].value == scores["counting"].error == 0
    assert scores["mean"].value == pytest.approx(0.75 * 5 / 6)
    assert scores["mean"].error == pytest.approx((5 * 0.75 * 0.25 / 4) ** 0.5 / 6)


def test_a_missing_task_is_an_error_and_not_a_zero():
    with pytest.raises(ValueError, match="no pictures were judged for counting"):
        six_tasks({task: [True] for task in TASKS if task != "counting"} | {"counting": []})


def test_a_difference_has_the_error_of_differences():
    before, after = np.array([1, 1, 0, 0]), np.array([1, 1, 0, 1])
    gained = six_tasks(dict.fromkeys(TASKS, after - before))["position"]
    assert gained.value == 0.25
    assert gained.error == pytest.approx((0.25 * 0.75 / 4) ** 0.5)


def test_no_two_pictures_share_their_noise():
    several = [seeds(place, start, 50, evaluation) for place in range(len(TASKS)) for start in (0, 50) for evaluation in (0, 1)]
    assert len({seed for some in several for seed in some}) == 50 * len(several)


def test_judging_a_perfect_sampler_and_one_that_ignores_the_prompt():
    def perfect(prompts, seeds):
        pictures = np.stack([draw(lay_out(parse(p), np.random.default_rng(s))) for p, s in zip(prompts, seeds, strict=True)])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255

    prompts = evaluation_prompts(7)
    assert all(all(rights) and len(rights) == 7 for rights in judge(perfect, prompts, batch=3).values())
    scores = six_tasks(judge(lambda p, s: perfect(["a red ring"] * len(p), s), prompts))
    assert scores["mean"].value < 0.2


def test_to_uint8_rounds():
    assert to_uint8(torch.full((1, 3, 2, 2), 0.5)).tolist() == [[[[128] * 3] * 2] * 2]
