"""The table of an alignment, from made-up verdicts."""

from pathlib import Path

import numpy as np
import pytest

from flowbp_ray.config import ConfigError, load
from flowbp_ray.rollouts.evaluation import differences, scores
from flowbp_ray.rollouts.prompts import pictured
from flowbp_ray.shapes.captions import TASKS
from flowbp_ray.shapes.evaluation import Score
from pipelines.alignment import previewed
from pipelines.before_after import before_after, table

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
CONFIG = load(SPARSE, [])


def pictures(right, reward, watermarked=0.0):
    """Of 40 pictures a task: shares and a mean reward."""
    number = 40 * len(TASKS)
    turn = np.tile(np.arange(40) / 40, len(TASKS))
    return {
        "task": np.repeat(TASKS, 40),
        "seed": np.arange(number),
        "right": turn < right,
        "watermarked": turn < watermarked,
        "reward/preference": reward + np.linspace(-1, 1, number),
    }


def test_the_table_has_differences_with_the_errors_of_pairs():
    base, aligned = pictures(0.4, 10.0, watermarked=0.5), pictures(0.5, 10.5)
    lines = {line.split("|")[1].strip(): line for line in table(CONFIG, base, aligned).splitlines() if line.startswith("|")}
    assert lines["single object"] == "| single object | 40.00 ± 7.75 | 50.00 ± 7.91 | +10.00 ± 4.74 |"
    assert lines["**mean**"].endswith("| +10.00 ± 1.94 |")
    assert lines["watermarked"] == "| watermarked | 50.00 ± 3.23 | 0.00 ± 0.00 | -50.00 ± 3.23 |"
    assert "| +0.50 ± 0.00 |" in lines["reward/preference"]  # every picture gained the same
    assert "| single object |  | 50.00 ± 7.91 |  |" in table(CONFIG, None, aligned)


def test_small_units_are_not_rounded_away():
    base, aligned = (p | {"reward/preference": p["reward/preference"] / 500} for p in (pictures(0.4, 1), pictures(0.4, 1)))
    assert "| 0.002000 ± 0.000075 |" in table(CONFIG, base, aligned)


def test_only_the_same_pictures_are_compared():
    with pytest.raises(ValueError, match="are of different pictures"):
        differences(pictures(0.4, 1), pictures(0.4, 1) | {"seed": np.arange(240) + 1})


def test_scores_of_all_figures():
    assert set(scores(pictures(0.4, 1))) == {*TASKS, "mean", "watermarked", "reward/preference"}


def test_a_files_prompts_are_what_is_independent_and_not_their_pictures():
    reward, prompts = np.array([1.0, 1.1, 3.0, 3.1]), ["a cat", "a cat", "a dog", "a dog"]
    of_file = {"task": np.array(["prompts"] * 4), "seed": np.arange(4), "reward/r": reward}
    apart = scores(of_file | {"prompt": np.array(["a cat", "a dog", "an owl", "a hen"])})["reward/r"]
    assert apart.error == pytest.approx(reward.std() / 2)
    together = scores(of_file | {"prompt": np.array(prompts)})["reward/r"]
    assert together == Score(apart.value, pytest.approx(np.hypot(2.0, 2.0) / 4))  # 4 deviations, which come in pairs
    of_one = scores(of_file | {"prompt": np.array(["a cat"] * 4)})["reward/r"]
    assert of_one.error == apart.error  # no prompt but this is spoken of
    world = of_file | {"task": np.array([TASKS[0]] * 4), "prompt": np.array(prompts)}
    assert scores(world)["reward/r"].error == apart.error  # of all prompts that there are


def test_a_file_of_prompts_is_judged_by_the_rewards_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("a cat\n\na dog\n", encoding="utf-8")
    config = load(SPARSE, [f"evaluation.prompts={tmp_path / 'mine.txt'}", "evaluation.per_task=3", "sampling.width=96"])
    assert pictured(config) == {"prompts": [{"prompt": p} for p in ("a cat", "a dog", "a cat")]}
    assert [prompt for prompt, _ in previewed(config)] == ["a cat", "a dog"] * 4
    only = {k: v for k, v in pictures(0.4, 1).items() if k not in ("right", "watermarked")}
    assert set(scores(only)) == {"reward/preference"}
    assert "Means over 240 pictures. ±" in table(config, only, only)
    judged = only | {"alignment": np.full(240, 3.5), "prompt": np.array(["a cat"] * 240)}
    assert "| alignment | 3.50 ± 0.00 |" in table(config, judged, judged)
    sheet = before_after(config, ["a cat"], np.zeros((1, 64, 96, 3), np.uint8), np.ones((1, 64, 96, 3), np.uint8), "after")
    assert sheet.size[1] > 2 * 128  # two rows


def test_the_checker_reads_its_own_size_alone():
    with pytest.raises(ConfigError, match=r"or evaluation\.prompts to a file"):
        load(SPARSE, ["sampling.width=96"])
