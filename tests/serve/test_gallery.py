"""What a run's folder shows, and that nothing outside of it can be had."""

import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from serve.studio.gallery import picture_of, run_of, runs


def picture(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)


@pytest.fixture
def folder(tmp_path):
    """Two runs, of which one has no pictures, and a picture outside of both."""
    run = tmp_path / "runs" / "20260101-sparse"
    for version in (0, 25):
        for number, prompt in enumerate(("a red ring", "two blue squares")):
            picture(run / "previews" / f"{version:06d}" / f"{number:02d} {prompt}.png")
        (run / "previews" / f"{version:06d}" / "prompts.json").write_text(json.dumps(["a red ring", "two blue squares"]))
    (run / "run.json").write_text(json.dumps({}))
    (run / "config.yaml").write_text("surrogate: {method: sparse}\nmodel: {path: shapes}\n")
    (run / "table.md").write_text("| | base |\n| --- | ---: |\n| mean | 41 |\n\nMeans.\n")
    for name, reason in (("base_000000", "no ring"), ("aligned_000025", "")):
        for start in (0, 3):
            rows = {
                "seed": [start, start + 1, start + 2],
                "task": ["single_object"] * 3,
                "prompt": ["a red ring"] * 3,
                "right": [reason == ""] * 3,
                "reason": [reason] * 3,
            }
            file = run / "evaluation" / name / "scores" / f"{start}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pa.table(rows), file)
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "empty" / "run.json").write_text("{}")
    picture(tmp_path / "secret.png")
    return tmp_path / "runs"


def test_runs_with_pictures_are_shown(folder):
    (run,) = runs(folder)
    assert (run.name, run.method, run.versions) == ("20260101-sparse", "sparse", [0, 25])
    assert [prompt for prompt, _ in run.prompts] == ["a red ring", "two blue squares"]
    assert picture_of(run, run.frame(25, run.prompts[1][1])).is_file()
    assert "<th scope=row>mean</th><td>41</td>" in run.table


def test_prompts_are_as_they_were_given_whatever_file_names_take(folder):
    (run,) = runs(folder)
    given = ["红色的圆环", "two blue squares, and then: " + "more " * 30]
    (run.folder / "previews" / "000000" / "prompts.json").write_text(json.dumps(given))
    (run,) = runs(folder)
    assert [prompt for prompt, _ in run.prompts] == given


def test_more_than_a_hundred_prompts_have_their_own_pictures(folder):
    (run,) = runs(folder)
    for number in range(2, 102):
        picture(run.folder / "previews" / "000000" / f"{number:02d} prompt {number}.png")
    (run.folder / "previews" / "000000" / "prompts.json").write_text(json.dumps([f"prompt {n}" for n in range(102)]))
    (run,) = runs(folder)
    assert [name.partition(" ")[0] for _, name in run.prompts] == [f"{n:02d}" for n in range(102)]
    assert run.prompts[0][1] == "00 a red ring.png"


def test_some_pictures_of_each_task_are_shown_by_base_and_aligned_model(folder):
    (run,) = runs(folder)
    shown = run.judged()
    assert len(shown) == 4
    assert shown[0].task == "single object"
    assert shown[0].pictures == [
        ("base", "evaluation/base_000000/pictures/00000000.png", "no ring", False),
        ("aligned", "evaluation/aligned_000025/pictures/00000000.png", "", True),
    ]


def test_nothing_outside_of_a_run_can_be_had(folder):
    run = run_of(folder, "20260101-sparse")
    for path in (
        "../../secret.png",
        str(folder.parent / "secret.png"),
        "config.yaml",
        "previews",
        "nothing.png",
        "\0.png",
        "a" * 300 + ".png",
    ):
        assert picture_of(run, path) is None
    (run.folder / "link.png").symlink_to(folder.parent / "secret.png")
    assert picture_of(run, "link.png") is None
    for name in ("..", "empty", "nothing", "../runs/20260101-sparse", "", "a" * 300):
        assert run_of(folder, name) is None
