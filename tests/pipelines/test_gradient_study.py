"""The gradient study as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

CONFIG = str(Path(__file__).parents[2] / "configs" / "shapes" / "leapalign.yaml")


def run(*arguments):
    command = [sys.executable, "-m", "pipelines.gradient_study", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_all_weights_are_refused_before_anything_is_loaded():
    result = run(CONFIG, "adapter=null", "train.sharded=true", "train.velocity_penalty=0")
    assert result.returncode == 2
    assert "trains all weights, and gradients are studied of an adapter's: set adapter={}" in result.stderr


@pytest.mark.slow
def test_table_figures_picture_and_mlflow_run_are_written(tmp_path):
    uri, folder = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "study"
    # All samples are above this clip: the study has to be one without it.
    clipped = "reward.components=[{name: preference, path: shapes/reward, weight: 1, clip: -100}]"
    small = [clipped, "sampling.steps=4", "surrogate.alpha=0.7", f"tracking.uri={uri}", "--samples", "2", "--draws", "3"]
    result = run(CONFIG, *small, "--output", str(folder), "--lengths", "3", "2")
    assert result.returncode == 0, result.stderr
    assert "refl is left out: surrogate does not go with sampling.steps = 4: last_n_steps is 11" in result.stderr
    text = (folder / "table.md").read_text()
    assert text in result.stdout
    figures = json.loads((folder / "figures.json").read_text())
    assert list(figures["compared"]) == list(figures["methods"])
    assert figures["methods"]["leapalign"]["alpha"] == 0.7
    assert figures["compared"]["full"]["angle"] == pytest.approx(0, abs=1e-5)
    assert figures["compared"]["full"]["samples_seen"] == 2
    assert all(f"| {name} |" in text for name in figures["compared"])
    assert [g["steps"] for g in figures["growth"]] == [2, 3]
    assert [list(errors) for errors in figures["connector_errors"].values()] == [["2", "3", "4"]] * 4
    with Image.open(folder / "gradient_study.png") as page:
        assert page.width > 1000
        assert len(page.convert("RGB").getcolors(1 << 24)) > 10
    client = MlflowClient(uri)
    (tracked,) = client.search_runs([client.get_experiment_by_name("flowbp_ray").experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["surrogate.leapalign.alpha"] == "0.7"
    assert tracked.data.params["study.samples"] == "2"
    assert tracked.data.metrics["full/norm"] == pytest.approx(1)
    norms = {p.step: p.value for p in client.get_metric_history(tracked.info.run_id, "growth/full")}
    assert norms == pytest.approx({g["steps"]: g["norms"]["full"] for g in figures["growth"]})
    kept = {f.path for f in client.list_artifacts(tracked.info.run_id)}
    assert {"table.md", "figures.json", "gradient_study.png", "resolved_config.yaml"} <= kept


def test_help_shows_commands_to_copy():
    result = run("--help")
    assert result.returncode == 0
    assert "python -m pipelines.gradient_study configs/shapes/leapalign.yaml sampling.guidance_scale=1" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--samples", "1"], "--samples 1: at least 2 are needed"),
        (["--draws", "2"], "--draws 2: at least 3 are needed"),
        (["--lengths", "4", "0"], "--lengths 0: a trajectory has at least one step"),
        (["one.yaml", "two.yaml"], "one configuration is studied at a time"),
        (["none.yaml"], "there is no configuration"),
        (["train.stepz=2"], "train.stepz"),
        (["tracking.uri=folder/runs"], "'folder/runs' is no tracking URI"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments, sentence):
    result = run(*arguments)
    assert result.returncode != 0
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
