"""What the align command says before it starts anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save_file

from flowbp_ray.config import load, models
from flowbp_ray.training import EXPORT_FILE
from pipelines import align

BASE = Path(__file__).parents[2] / "flowbp_ray" / "shapes" / "models" / "base"
CONFIG = str(Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml")


def run(*arguments, **variables):
    command = [sys.executable, "-m", "pipelines.align", *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | variables
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_help_shows_commands_to_copy():
    result = run("--help")
    assert result.returncode == 0
    assert "python -m pipelines.align configs/shapes/sparse.yaml train.steps=20" in result.stdout


def test_a_dry_run_prints_what_would_be_done_and_starts_nothing(tmp_path):
    result = run(CONFIG, "--dry-run", "train.steps=7", f"output={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/m.db")
    assert result.returncode == 0, result.stderr
    assert "steps: 7" in result.stdout
    assert "index  coefficient" in result.stdout
    assert "Nothing was started" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_hubs_model_is_pinned_to_the_commit_that_it_has_now(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--owner--model"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "model_index.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    for given in ([], ["model.revision=main"]):
        result = run(CONFIG, "--dry-run", "model.path=owner/model", *given, HF_HUB_CACHE=str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert f"revision: {commit}" in result.stdout


def test_further_files_change_the_first_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {steps: 9}\nsampling: {guidance_scale: 2}\n", encoding="utf-8")
    result = run(CONFIG, str(tmp_path / "mine.yaml"), "--dry-run", "sampling.guidance_scale=4")
    assert result.returncode == 0, result.stderr
    assert "9 steps of 24 samples" in result.stdout
    assert "guidance_scale: 4" in result.stdout


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepz=7", "train.stepz"),
        ("train.steps=seven", "train.steps"),
        ("model.path=/nowhere", "/nowhere"),
        ("adapter.init_from=/nowhere", "/nowhere"),
        ("adapter.init_from=/etc", "no adapter in /etc: it has no pytorch_lora_weights.safetensors"),
        (
            "model.path=models/mine",
            "model.path is 'models/mine': there is no such folder here, and the Hugging Face hub does not ",
        ),
        ("reward.components.1.path=owner/judge", "reward.components.1.path is 'owner/judge': there is no such folder here"),
        ("reward.components.1.encoder=owner/judge", "reward.components.1.encoder is 'owner/judge': there is no such folder here"),
        (
            "reward.components.1={name: mine, kind: function, path: 'no_such:score', weight: 0}",
            "the reward no_such:score cannot be imported: ModuleNotFoundError: No module named 'no_such'",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_without_a_traceback(override, sentence):
    result = run(CONFIG, override)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_adapter_of_another_rank_is_no_start_before_anything_is_started(tmp_path):
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps({"transformer.lora_alpha": 16.0})}
    config = load(Path(CONFIG), [f"adapter.init_from={tmp_path}"])
    save_file({"transformer.a.lora_A.weight": torch.zeros(8, 2)}, tmp_path / EXPORT_FILE, metadata)
    with pytest.raises(ValueError, match=r"is another model's: .* has no a in its transformer"):
        align.intended(config)
    name, (out, into) = next((n, s) for n, s in models.headers(BASE / "transformer").items() if n.endswith("attn.to_q.weight"))
    module = f"transformer.{name.removesuffix('.weight')}"
    matrices = {f"{module}.lora_A.weight": torch.zeros(8, into), f"{module}.lora_B.weight": torch.zeros(out, 8)}
    save_file(matrices, tmp_path / EXPORT_FILE, metadata)
    with pytest.raises(ValueError, match=r"has rank 8: set adapter\.rank, which is 4, to that"):
        align.intended(config)


def test_no_password_in_a_dry_run():
    printed = align.intended(load(Path(CONFIG), ["tracking.uri=postgresql://me:secret@host/db"]))
    assert "secret" not in printed
    assert printed.count("postgresql://me:***@host/db") == 2


def test_ctrl_c_before_anything_is_started_is_one_sentence(monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(align, "intended", interrupted)
    monkeypatch.setattr(sys, "argv", ["align", CONFIG])
    with pytest.raises(SystemExit) as caught:
        align.main()
    assert caught.value.code == "\ninterrupted: nothing was started"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["none.yaml"], "none.yaml"),
        (["train.steps=3"], "name a configuration, such as configs/shapes/sparse.yaml"),
        ([CONFIG, "--train.steps=3"], "unrecognized arguments: --train.steps=3 (settings have no dashes: train.steps=3)"),
        ([CONFIG, f"output={CONFIG}/runs"], f"but {CONFIG} is no folder that can be written to: name another one"),
        ([CONFIG, "tracking.uri=http://127.0.0.1:9", "--dry-run"], "the MLflow server http://127.0.0.1:9 does not answer"),
    ],
)
def test_what_is_wrong_with_a_command_is_said(given, sentence):
    result = run(*given)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_storage_that_does_not_answer_as_a_run_ends_does_not_hide_why(monkeypatch, tmp_path):
    def unreachable(*_):
        raise OSError("no route to host")

    monkeypatch.setattr(align.runs.Kept, "_read", unreachable)
    said = align.latest_checkpoint(load(Path(CONFIG), []), tmp_path)
    assert said == "its last checkpoint cannot be named: no route to host"


def test_the_hub_is_asked_for_a_models_file_and_nothing_is_downloaded(monkeypatch, tmp_path):
    def listed(source, **options):
        assert options["dry_run"]
        return options["allow_patterns"] if source == "owner/good" else []

    monkeypatch.setattr(huggingface_hub, "snapshot_download", listed)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    align.check_model("model.path", "owner/good", "f.pt", None)
    with pytest.raises(OSError, match=r"model\.path is 'owner/other': .* does not give its f\.pt: name a repository that has it"):
        align.check_model("model.path", "owner/other", "f.pt", None)
    cached = tmp_path / "models--owner--other"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "f.pt").touch()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    align.check_model("model.path", "owner/other", "f.pt", None)


def test_the_models_that_judge_at_the_end_are_looked_for_at_the_start(monkeypatch, tmp_path):
    entry = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    (tmp_path / "entries.jsonl").write_text(json.dumps(entry) + "\n")
    asked = []
    monkeypatch.setattr(align, "check_model", lambda setting, source, file, revision: asked.append((setting, source)))
    given = [f"evaluation.prompts={tmp_path}/entries.jsonl", "evaluation.geneval={detector: owner/detector, clip: owner/clip}"]
    align.check_rewards(load(Path(CONFIG), given))
    assert asked[-2:] == [("evaluation.geneval.detector", "owner/detector"), ("evaluation.geneval.clip", "owner/clip")]
