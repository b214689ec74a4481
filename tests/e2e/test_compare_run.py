"""A comparison of two methods, interrupted by nothing and then asked for again."""

import subprocess
import sys
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image

RECIPES = Path(__file__).parents[2] / "configs" / "shapes"
SMALL = (
    "train.steps=2",
    "train.micro_batch=2",
    "train.workers=1",
    "cluster.samplers=1",
    "adapter.rank=4",
    "sampling.steps=4",
    "surrogate.detach_negative=true",
    "evaluation.per_task=2",
    "evaluation.preview_prompts=3",
    "train.checkpoint_every=2",
)


def compare(folder, *overrides):
    files = [str(RECIPES / f"{name}.yaml") for name in ("sparse", "drtune")]
    own = ["--seeds", "1", "--output", str(folder / "out"), f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    command = [sys.executable, "-m", "pipelines.compare", *files, *SMALL, "train.batch=4", *own, *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_cells_are_run_once_and_end_in_a_table_a_chart_and_pictures(tmp_path):
    first = compare(tmp_path)
    assert first.returncode == 0, first.stderr
    assert "cell 3 of 3: drtune, seed 0" in first.stdout
    text = (tmp_path / "out" / "table.md").read_text()
    for row in ("base", "sparse", "drtune"):
        assert f"\n| {row} |" in text
    assert text in first.stdout
    for name in ("chart.png", "pictures.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 300
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("flowbp_ray").experiment_id
    names = sorted(r.info.run_name for r in client.search_runs([experiment]))
    assert names == ["base-0", "comparison", "drtune-0", "sparse-0"]

    again = compare(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "3 of 3 cells are there" in again.stdout
    assert "\ncell " not in again.stdout
    assert (tmp_path / "out" / "table.md").read_text() == text

    other = compare(tmp_path, "train.steps=3")
    assert other.returncode == 1
    assert "base-0.json was measured with another configuration" in other.stderr
