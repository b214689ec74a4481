"""The short form of the chaos suite, and how it tells what is different."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowbp_ray.config import load
from pipelines.chaos import Kill, Left, different, table

ROOT = Path(__file__).parents[2]
CONFIG = load(ROOT / "configs" / "shapes" / "sparse.yaml", [])
UNDISTURBED = Left("abc", {"objective": [(0, 1.0), (1, 2.0)], "seconds/step": [(0, 3.0), (1, 3.0)]}, ["checkpoint_000002"], [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": "abd"}, "the final weights are others"),
        ({"checkpoints": []}, "the checkpoints are [], not ['checkpoint_000002']"),
        ({"orphans": ["ray::Tracker"]}, "left running: ['ray::Tracker']"),
        ({"points": UNDISTURBED.points | {"objective": [(0, 1.0)]}}, "objective: lost points [1], more []"),
        ({"points": UNDISTURBED.points | {"objective": [(0, 1.0), (1, 2.0), (1, 2.0)]}}, "objective: lost points [], more [1]"),
        ({"points": UNDISTURBED.points | {"objective": [(0, 1.0), (1, 2.5)]}}, "objective has other values"),
        ({"points": UNDISTURBED.points | {"seconds/step": [(0, 3.0)]}}, "seconds/step: lost points [1], more []"),
        ({"points": {"objective": [(0, 1.0), (1, 2.0)]}}, "seconds/step: lost points [0, 1], more []"),
    ],
)
def test_whatever_is_different_is_said(change, said):
    assert different(UNDISTURBED, dataclasses.replace(UNDISTURBED, **change)) == [said]


def test_durations_may_be_others():
    slower = UNDISTURBED.points | {"seconds/step": [(0, 5.0), (1, 9.0)]}
    assert different(UNDISTURBED, dataclasses.replace(UNDISTURBED, points=slower)) == []


def test_the_table_has_every_role_with_its_times():
    kills = [Kill("sampler", 3, 2.0), Kill("driver", 1, 40.0), Kill("sampler", 5, 4.0)]
    text = table(kills, [], CONFIG)
    assert "| sampler | 2 | 3, 5 | 3 | 4 |" in text
    assert "| driver | 1 | 1 | 40 | 40 |" in text
    assert "final weights bit by bit" in text
    assert "- run 1 (driver): the final weights are others" in table(
        kills, ["run 1 (driver): the final weights are others"], CONFIG
    )


@pytest.mark.drill
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found in /proc")
def test_a_sampler_a_reward_stage_a_train_worker_the_driver_and_a_machine_are_killed_and_nothing_is_different(tmp_path):
    command = [sys.executable, "-m", "pipelines.chaos", "train.steps=9", "--kills", "5", "--per-run", "5"]
    command += ["--roles", "sampler", "reward stage", "train worker", "driver", "worker node", "--output", str(tmp_path)]
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (table,) = tmp_path.glob("*/table.md")
    assert "5 kills in runs of 9 steps" in table.read_text()
    assert (tmp_path / "runs" / "mine").is_dir()
