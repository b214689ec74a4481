"""When a version takes the champion's place; tests/e2e/test_studio_run.py has two versions judged for real."""

import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from flowbp_ray.config import ConfigError, load
from flowbp_ray.rollouts.evaluation import scores
from pipelines import promote
from pipelines.report import Result

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


@pytest.fixture
def said(capsys, monkeypatch):
    """What the command ends with on standard error, where it ends with exit code 2."""

    def run(*given):
        monkeypatch.setattr(sys, "argv", ["promote", *given])
        with pytest.raises(SystemExit) as end:
            promote.main()
        assert end.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


def test_what_cannot_stand_is_refused(said, tmp_path):
    store = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    assert said("shapes-aligned/1", store).startswith("'shapes-aligned/1' is no version of a registered model: write models:/")
    assert said("models:/nothing/1", store).startswith("models:/nothing/1 is no folder here, and MLflow (sqlite:///")


def test_what_was_trained_for_never_decides_by_itself(tmp_path):
    assert promote.deciding(load(SPARSE, [])) == "mean"
    file = tmp_path / "prompts.txt"
    file.write_text("a red ring\n")
    assert promote.deciding(load(SPARSE, [f"evaluation.prompts={file}"])) == "reward/judge"
    trained = "reward.components=[{name: preference, path: shapes/reward, weight: 1}]"
    with pytest.raises(ConfigError, match="name what decides with --metric, such as reward/NAME: 0 rewards have weight 0"):
        promote.deciding(load(SPARSE, [f"evaluation.prompts={file}", trained]))


@pytest.fixture
def versions(tmp_path):
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("m")
    made = [client.create_model_version("m", f"{tmp_path}/{n}") for n in range(2)]
    client.set_registered_model_alias("m", "champion", "1")
    return client, made


def result(name, right):
    number = len(right)
    pictures = {
        "task": np.array(["prompts"] * number),
        "prompt": np.array([f"p{n}" for n in range(number)]),
        "seed": np.arange(number),
        "reward/judge": np.asarray(right, float),
    }
    return Result(name, Path("/nowhere"), {}, pictures, scores(pictures))


@pytest.mark.parametrize(
    ("gain", "won"),
    [([1.0, 1.0, 1.0, 0.9], True), ([2.0, -2.0, 0.3, 0.0], False), ([-1.0, -1.0, -1.0, -0.9], False), ([0.0] * 4, False)],
)
def test_only_a_gain_over_its_own_error_moves_the_alias(versions, tmp_path, capsys, gain, won):
    client, (champion, candidate) = versions
    config = load(SPARSE, [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"])
    theirs, ours = result("version 1", [5.0, 6.0, 7.0, 8.0]), result("version 2", np.array([5.0, 6.0, 7.0, 8.0]) + gain)
    assert promote.decide(config, "champion", candidate, champion, theirs, ours, "reward/judge") is won
    assert str(client.get_model_version_by_alias("m", "champion").version) == ("2" if won else "1")
    assert client.get_model_version("m", "2").tags["promotion"].startswith("won: " if won else "not won: ")
    assert f"champion  of m {'is now 2' if won else 'stays 1'}" in capsys.readouterr().out


def test_what_cannot_decide_is_refused_before_anything_is_judged():
    config = load(SPARSE, [])
    with pytest.raises(ConfigError, match="of 'watermarked' less is better"):
        promote.check_metric(config, "watermarked")
    with pytest.raises(ConfigError, match="there is no 'reward/x' among the scores: --metric takes reward/pref"):
        promote.check_metric(config, "reward/x")
    promote.check_metric(config, "counting")


def test_a_champion_that_changed_meanwhile_is_not_replaced(versions, tmp_path):
    client, (champion, candidate) = versions
    client.create_model_version("m", f"{tmp_path}/3")
    client.set_registered_model_alias("m", "champion", "3")
    config = load(SPARSE, [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"])
    with pytest.raises(ConfigError, match="the champion became version 3 meanwhile"):
        promote.decide(config, "champion", candidate, champion, result("a", [1.0, 2.0]), result("b", [2.0, 4.0]), "reward/judge")
    assert str(client.get_model_version_by_alias("m", "champion").version) == "3"


def test_a_gain_without_an_error_wins_nothing(versions, tmp_path):
    _, (champion, candidate) = versions
    config = load(SPARSE, [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"])
    with pytest.raises(ConfigError, match="reward/judge has no error to compare a gain with"):
        promote.decide(config, "champion", candidate, champion, result("a", [1.0, 2.0]), result("b", [2.0, 3.0]), "reward/judge")


def test_a_score_that_is_not_there_is_named(versions, tmp_path):
    _, (champion, candidate) = versions
    config = load(SPARSE, [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"])
    with pytest.raises(ConfigError, match="there is no 'mean' among the scores: --metric takes reward/judge"):
        promote.decide(config, "champion", candidate, champion, result("a", [1.0, 2.0]), result("b", [1.0, 2.0]), "mean")
