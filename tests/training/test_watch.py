"""What the watch warns of and what not: a recorded healthy run, the same with a hack put in, and norms and pictures made up."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbp_ray.config.training import Watch
from flowbp_ray.training.watch import CollapseWatch, diversity

properties = settings(max_examples=30, deadline=None)
JUDGE = "reward/judge"
# `make demo` as it was recorded: configs/shapes/sparse.yaml, 55 steps of 24 samples.
RECORDED = {
    "objective": """10.4 7.41 8.13 9.37 9.67 10.8 10.6 9.45 8.88 9.82 9.28 10.9 10.3 9.64 10.2 11.8 10.6 10.2 10.7 10.4 11.8 10.9
        10.7 12.1 11.8 10.4 10.7 10.8 10.2 11.7 10.4 11.5 11 10.6 10.4 12.1 12 11.6 10.7 11.6 10.5 10.6 11.5 10.4 11.4
        11.5 11.4 11.6 10.4 10.4 10.5 12 10.5 10.9 10.3""",
    JUDGE: """11 8.64 8.77 10.8 9.8 11.5 11.2 10.6 9.84 10.7 9.98 10.9 10.5 10 10.5 11.7 10.7 10.2 10.7 10.7 11.6 11.5 10.4
        12.4 11.7 10.4 10.3 10.3 10.7 11.5 9.94 11.6 11.2 11.2 9.94 11.5 11.6 11.4 10.3 11.2 10.2 10.4 10.9 10.1 11.4
        11.2 11 11.1 10.5 10.1 10.7 11.9 11.3 11.4 10.6""",
    "grad_norm": """4.08 7.58 3.76 3.02 3.52 3 1.89 3.41 5.09 2.27 7.15 5.24 5.39 3.7 7.46 5.39 2.27 2.34 2.05 6.51 1.49 5.69 5.69
        2.56 2.97 3.89 4.35 4.64 4.97 2.07 3.15 5.14 5.98 4.88 5.55 9.34 3.54 4.2 4.41 1.22 2.36 3.76 2.86 4.07 3.58
        5.64 5.14 3.09 6.25 2.93 2.41 4.82 2 2.37 5.93""",
}
HEALTHY = [dict(zip(RECORDED, map(float, row), strict=True)) for row in zip(*map(str.split, RECORDED.values()), strict=True)]
STEADY = {"objective": 1.0, JUDGE: 1.0, "grad_norm": 1.0}


def seen(steps, state=None, start=0, **settings):
    """Every step's warnings, and the state at the end as JSON has it."""
    watch = CollapseWatch(Watch(**settings), [JUDGE], state)
    return [watch.see(metrics, start + n) for n, metrics in enumerate(steps)], json.loads(json.dumps(watch.state))


def said(steps, **settings):
    """Steps with warnings, and these."""
    return {n: warnings for n, warnings in enumerate(seen(steps, **settings)[0]) if warnings}


def hacked(steps, start, slope):
    """The judge loses ``slope`` a step from ``start`` on, the objective gains it."""
    extra = [slope * max(0, n - start) for n in range(len(steps))]
    return [m | {JUDGE: m[JUDGE] - e, "objective": m["objective"] + e} for m, e in zip(steps, extra, strict=True)]


def norms(*values):
    return [STEADY | {"grad_norm": float(v)} for v in values]


def test_the_recorded_demo_is_healthy():
    assert said(HEALTHY) == {}


def test_a_held_out_reward_that_falls_while_the_objective_rises_is_said_once_with_its_figures():
    ((step, (warning,)),) = said(hacked(HEALTHY, 25, 0.1)).items()
    assert 35 < step < 55
    assert warning.startswith(f"after step {step}: reward/judge, which is held out, fell by ")
    assert f" (steps {step - 9} to {step}), while the objective rose from " in warning


def test_a_held_out_reward_that_falls_with_the_objective_is_no_hack():
    steps = hacked(HEALTHY, 25, 0.1)
    assert said([m | {"objective": m[JUDGE]} for m in steps]) == {}


def test_a_gradient_that_explodes_or_grows_is_warned_of_and_a_single_long_one_is_not():
    assert said(norms(*[1] * 20, 1000, *[1] * 20, 1000, 1000, *[1] * 20)) == {}
    assert said(norms(*[1] * 12, *[10] * 20)) == {}
    ((step, (warning,)),) = said(norms(*[1, 2] * 10, 30, 40, 50, 60)).items()
    assert step == 22
    assert warning.startswith("after step 22: the gradient's norm was 30, 40, 50 in the last 3 steps, over 10 times the 1.5 of")
    assert len(said(norms(*1.1 ** np.arange(60)))) == 1
    assert said(norms(*[0] * 12, *[1] * 20)) == {}  # of nothing there are no times


def test_pictures_that_become_alike_are_warned_of_once_until_they_are_clear_again():
    steps = [{"diversity": d} for d in (0.2, 0.15, 0.09, 0.05, 0.11, 0.099)]
    found = said(steps)
    assert list(found) == [2, 5]
    alike = "pictures of the same prompt from different seeds are 0.09 apart, under 0.5 times the 0.2 at the start"
    assert found[2][0].startswith(f"after step 2: {alike}")


def test_what_is_null_is_not_watched():
    off = {"held_out_errors": None, "grad_norm_factor": None, "diversity_fraction": None}
    steps = [m | {"grad_norm": 10.0**n, "diversity": 1 / (n + 1)} for n, m in enumerate(hacked(HEALTHY, 20, 0.2))]
    assert said(steps, **off) == {}
    assert len(said(steps)) == 3


@properties
@given(st.lists(st.fixed_dictionaries(dict.fromkeys(STEADY, st.integers(0, 8).map(float))), max_size=30), st.integers(0, 30))
def test_a_watch_goes_on_from_its_state_as_if_it_had_never_stopped(steps, cut):
    sensitive = {"window": 3, "held_out_errors": 1.0, "grad_norm_factor": 1.5}
    whole, last = seen(steps, **sensitive)
    first, state = seen(steps[:cut], **sensitive)
    rest, end = seen(steps[cut:], state, min(cut, len(steps)), **sensitive)
    assert first + rest == whole
    assert end == last


@properties
@given(st.floats(-100, 100), st.floats(0, 100), st.integers(0, 60))
def test_what_does_not_change_is_healthy(reward, norm, number):
    assert said([{"objective": reward, JUDGE: reward, "grad_norm": norm, "diversity": norm}] * number) == {}


def test_diversity_is_the_mean_distance_of_a_prompts_seeds():
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert diversity(np.stack([[black, black], [white, black]])) == pytest.approx(0.5)  # 1 for one prompt, 0 for the other
    assert diversity(np.stack([[black], [white], [white]])) == pytest.approx(2 / 3)  # two of three pairs
    half = black.copy()
    half[:4] = 255
    assert diversity(np.stack([[black], [half]])) == pytest.approx(0.5**0.5)
    with pytest.raises(ValueError, match="at least two seeds"):
        diversity(black[None, None])
