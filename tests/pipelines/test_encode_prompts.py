"""What the command says before it starts anything; tests/e2e has it encode."""

import json
import sys
from pathlib import Path

import pytest
import tiny

from pipelines import encode_prompts

SPARSE = str(Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml")


@pytest.fixture
def said(monkeypatch, capsys):
    """Runs the command and gives what it prints, or ends with."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["encode_prompts", *map(str, arguments)])
        try:
            encode_prompts.main()
        except SystemExit as end:
            printed = capsys.readouterr()
            return printed.err.strip() if end.code == 2 else end.code or printed.out
        return capsys.readouterr().out

    return run


def test_help_shows_commands_to_copy(said):
    printed = said("--help")
    assert "python -m pipelines.encode_prompts my.yaml --output embeds" in printed
    assert "usage: python -m pipelines.encode_prompts" in printed


def test_a_dry_run_counts_and_starts_nothing(said, tmp_path):
    printed = said(SPARSE, "evaluation.per_task=2", "evaluation.preview_prompts=0", "--dry-run", "--output", tmp_path / "embeds")
    assert printed.endswith("are to be encoded by 2 processes. Nothing was started.\n")
    assert f"0 of them are in {tmp_path}/embeds" in printed
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_one_sentence(said, tmp_path):
    assert "train.stepz" in said(SPARSE, "train.stepz=3", "--output", tmp_path)
    (tmp_path / "file").write_text("")
    assert said(SPARSE, "--output", tmp_path / "file") == f"{tmp_path}/file is a file: name a folder"
    (tmp_path / "prompts.jsonl").write_text("{")
    assert "prompts.jsonl, line 1: write an object" in said(
        SPARSE, f"prompts.path={tmp_path}/prompts.jsonl", "--output", tmp_path
    )


def test_a_folder_of_another_encoder_is_refused(said, tmp_path):
    model = tiny.saved(tiny.sd3, tmp_path / "model")
    (tmp_path / "embeds").mkdir()
    (tmp_path / "embeds" / "encoder.json").write_text(json.dumps({"encoder": {"pipeline": "FluxPipeline"}}))
    for more in ([], ["--dry-run"]):
        sentence = said(SPARSE, f"model.path={model}", "--output", tmp_path / "embeds", *more)
        assert "pipeline is FluxPipeline there and StableDiffusion3Pipeline here" in sentence
        assert len(sentence.splitlines()) == 1
