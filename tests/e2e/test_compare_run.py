"""A comparison of two methods, interrupted by nothing and then asked for again."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from pipelines import compare as command
from pipelines import session

pytestmark = pytest.mark.slow
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


@pytest.fixture
def compare(cluster, tmp_path, monkeypatch, capsys):
    """The command, on the cluster that is there; what it prints."""
    monkeypatch.setattr(session, "cluster", lambda _: nullcontext())
    files = [str(RECIPES / f"{name}.yaml") for name in ("sparse", "drtune")]
    own = ["--seeds", "1", "--output", str(tmp_path / "out"), f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]

    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["compare", *files, *SMALL, "train.batch=4", *own, *overrides])
        command.main()
        return capsys.readouterr().out

    return run


def test_cells_are_run_once_and_end_in_a_table_a_chart_and_pictures(compare, tmp_path):
    first = compare()
    assert "cell 3 of 3: drtune, seed 0" in first
    text = (tmp_path / "out" / "table.md").read_text()
    for row in ("base", "sparse", "drtune"):
        assert f"\n| {row} |" in text
    assert text in first
    for name in ("chart.png", "pictures.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 300
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("flowbp_ray").experiment_id
    names = sorted(r.info.run_name for r in client.search_runs([experiment]))
    assert names == ["base-0", "comparison", "drtune-0", "sparse-0"]

    again = compare()
    assert "3 of 3 cells are there" in again
    assert "\ncell " not in again
    assert (tmp_path / "out" / "table.md").read_text() == text

    with pytest.raises(SystemExit, match=r"base-0\.json was measured with another configuration"):
        compare("train.steps=3")
