"""What the compare command says before it starts anything; tests/e2e has it run."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "configs" / "shapes"
SPARSE = str(FOLDER / "sparse.yaml")
ALL = [str(f) for f in sorted(FOLDER.glob("*.yaml"))]


def run(*arguments):
    command = [sys.executable, "-m", "pipelines.compare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def other(tmp_path, **changes):
    text = Path(SPARSE).read_text()
    for one, two in changes.values():
        assert one in text
        text = text.replace(one, two)
    (tmp_path / "other.yaml").write_text(text)
    return str(tmp_path / "other.yaml")


def test_all_recipes_are_on_equal_terms(tmp_path):
    result = run(*ALL, "--dry-run", "--output", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    for method in ("refl", "draft_lv", "drtune", "leapalign", "sparse", "bridge", "lagrange"):
        assert method in result.stdout
    assert not (tmp_path / "out").exists()


def test_cells_all_have_the_same_number_of_steps():
    result = run(SPARSE, "watch.stop=true", "--dry-run")
    assert result.returncode == 2
    assert "watch.stop and train.best would end cells after different numbers of steps" in result.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("learning_rate: ", "learning_rate: 1"), "train.learning_rate"),
        (("  steps: 12", "  steps: 11"), "sampling.steps"),
        (("micro_batch: ", "weight_decay: 0.5\n  micro_batch: "), "train.weight_decay"),
    ],
)
def test_other_budgets_are_refused(tmp_path, change, sentence):
    result = run(SPARSE, other(tmp_path, change=change), "--dry-run")
    assert result.returncode == 2
    assert "sparse and other are not on equal terms" in result.stderr
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_more_scored_samples_are_refused(tmp_path):
    result = run(SPARSE, str(FOLDER / "draft_lv.yaml"), "train.batch=48", "--dry-run")
    assert result.returncode == 2
    assert "a step scores 48 and 144 samples" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seeds", "1"], "the following arguments are required"),
        (["train.steps=2"], "no configuration is named"),
        ([SPARSE, "--seeds", "0"], "--seeds 0: at least one is needed"),
        ([SPARSE, SPARSE], "two configurations are named sparse"),
        (["base.yaml"], "base.yaml is named as the base model is: a method is named as its file, so rename it"),
        ([SPARSE, "train.stepz=2"], "train.stepz"),
        (["none.yaml"], "none.yaml"),
    ],
)
def test_what_is_wrong_is_said(arguments, sentence):
    result = run(*arguments)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
