"""What the align command says before it starts anything."""

import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = str(Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml")


def run(*arguments):
    command = [sys.executable, "-m", "pipelines.align", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_shows_commands_to_copy():
    result = run("--help")
    assert result.returncode == 0
    assert "python -m pipelines.align configs/shapes/sparse.yaml train.steps=20" in result.stdout


def test_a_dry_run_prints_what_would_be_done_and_starts_nothing(tmp_path):
    result = run(CONFIG, "--dry-run", "train.steps=7", f"output={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/m.db")
    assert result.returncode == 0, result.stderr
    assert "steps: 7" in result.stdout
    assert "active" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepz=7", "train.stepz"),
        ("train.steps=seven", "train.steps"),
        ("model.path=/nowhere", "/nowhere"),
        ("adapter.init_from=/nowhere", "/nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_without_a_traceback(override, sentence):
    result = run(CONFIG, override)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_missing_configuration_is_named(tmp_path):
    result = run(str(tmp_path / "none.yaml"))
    assert result.returncode == 1
    assert "none.yaml" in result.stderr
