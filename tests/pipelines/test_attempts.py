"""The progress bar of a training. tests/e2e has it run."""

import io

from tqdm import tqdm

from pipelines.attempts import follow


def test_the_bar_shows_reward_pace_and_time_left():
    shown = io.StringIO()
    with tqdm(total=4, desc="starting", unit="step", file=shown, mininterval=0) as bar:
        follow(bar, None)
        follow(bar, (1, {"reward/preference": 3.14159, "objective": 1.0}))
        bar.refresh()
    last = shown.getvalue().split("\r")[-1]
    assert "align" in last
    assert "2/4" in last
    assert "preference=3.14" in last
    assert "objective" not in last
