"""The measurement of a step's seconds."""

from pipelines.step_times import row


def test_what_the_stages_do_not_explain_is_orchestration():
    seconds = {"sampling": 3.0, "reward": 1.0, "update": 2.0, "step": 8.0, "publishing": 0.5, "loading": 0.25}
    assert row(0, seconds) == "| 0 | 3.00 | 1.00 | 2.00 | 8.00 | 2.00 | 25 % | 0.50 | 0.25 |"
    assert row(1, seconds | {"step": 5.0}) == "| 1 | 3.00 | 1.00 | 2.00 | 5.00 | 2.00 | 40 % | 0.50 | 0.25 |"  # two steps at once
    assert row(1, seconds | {"sampling": 4.0, "step": 5.0}) == "| 1 | 4.00 | 1.00 | 2.00 | 5.00 | 1.00 | 20 % | 0.50 | 0.25 |"
