"""What the command says before it starts anything; tests/e2e has it evaluate."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flowbp_ray.config import load
from flowbp_ray.training import EXPORT_FILE
from pipelines import evaluate

BASE = Path(__file__).parents[2] / "flowbp_ray" / "shapes" / "models" / "base"
SPARSE = str(Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml")
SMALL = ["evaluation.per_task=2"]


@pytest.fixture
def said(monkeypatch, capsys):
    """Runs the command and gives what it prints, or ends with."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        try:
            evaluate.main()
        except SystemExit as end:
            printed = capsys.readouterr()
            own = "\n".join(line for line in printed.err.splitlines() if " INFO " not in line)  # and not what MLflow says
            return own if end.code == 2 else end.code or printed.out
        return capsys.readouterr().out

    return run


def test_help_shows_commands_to_copy(said):
    assert "python -m pipelines.evaluate configs/shapes/sparse.yaml --adapter" in said("--help")


def test_a_dry_run_says_the_protocol_and_starts_nothing(said, tmp_path):
    printed = said(SPARSE, *SMALL, "--dry-run", "--output", tmp_path / "out")
    assert printed.endswith(f"12 pictures to {tmp_path}/out. Nothing was started.\n")
    assert '"prompts": "sha256 ' in printed
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_one_sentence(said, tmp_path):
    uri = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    assert said().startswith("name a configuration")
    assert said(SPARSE, "--adapter", tmp_path) == (
        f"--adapter {tmp_path} has no pytorch_lora_weights.safetensors: name the folder adapter/ of a run, or one like it"
    )
    assert said(uri, "--adapter", "nothing").startswith("nothing is no folder here, and MLflow (sqlite:///")
    assert said(uri, "--adapter", "models:/mine@champion").startswith("models:/mine@champion is no folder here, and")
    assert said(SPARSE, "--beside", tmp_path).startswith(f"{tmp_path} has no finished evaluation")
    (tmp_path / "file").write_text("")
    assert said(SPARSE, "--output", tmp_path) == f"{tmp_path} is not empty and no evaluation: name another folder"
    assert "set it to a file, for geneval to one in its format" in said(SPARSE, "evaluation.geneval={}")


def test_a_folder_is_not_filled_with_pictures_of_another_protocol(said, tmp_path):
    config = load(Path(SPARSE), SMALL)
    evaluate.begin(tmp_path / "out", "base", evaluate.protocol_of(config), {"adapter": None}, config)
    assert json.loads((tmp_path / "out" / "protocol.json").read_text())["protocol"]["per_task"] == 2
    assert f"{tmp_path}/out has an evaluation with sampling " in said(
        SPARSE, *SMALL, "sampling.steps=20", "--output", tmp_path / "out"
    )
    assert f"{tmp_path}/out has an evaluation with per_task 2, not 3" in said(
        SPARSE, "evaluation.per_task=3", "--output", tmp_path / "out"
    )


def test_prompts_are_part_of_the_protocol(tmp_path):
    file, protocols = tmp_path / "p.txt", []
    for text in ("a cat", "a dog"):
        file.write_text(text)
        protocols.append(evaluate.protocol_of(load(Path(SPARSE), [f"evaluation.prompts={file}"])))
    assert [k for k in protocols[0] if protocols[0][k] != protocols[1][k]] == ["prompts"]


def test_weights_of_the_judges_are_part_of_the_protocol(tmp_path):
    import tiny_rewards

    folder, protocols = tiny_rewards.saved_clip(tmp_path / "clip"), []
    config = load(Path(SPARSE), [f"reward.components.1.path={folder}"])
    for weights in (None, b"other"):
        if weights:
            (folder / "model.safetensors").write_bytes(weights)
        protocols.append(evaluate.protocol_of(config)["rewards"])
    assert protocols[0]["preference"] == protocols[1]["preference"]
    differ = [k for k in protocols[0]["judge"] if protocols[0]["judge"][k] != protocols[1]["judge"][k]]
    assert differ == ["path", "encoder"]  # the tokenizer is in the same folder


def test_contents_of_the_model_and_of_a_function_decide_whether_pictures_are_there_already(tmp_path, monkeypatch):
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "mine_here.py").write_text("def score(images, prompts):\n    return images.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    component = "reward.components.1={name: mine, kind: function, path: 'mine_here:score', weight: 0}"
    config = load(Path(SPARSE), [component, f"model.path={tmp_path}/model", f"output={tmp_path}/runs"])
    folders = [evaluate.prepared(config, None, "base", None, make=False)]
    assert folders == [evaluate.prepared(config, None, "base", None, make=False)]
    (file,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    folders.append(evaluate.prepared(config, None, "base", None, make=False))
    (tmp_path / "mine_here.py").write_text("def score(images, prompts):\n    return -images.mean((1, 2, 3))\n")
    folders.append(evaluate.prepared(config, None, "base", None, make=False))
    assert len(set(folders)) == 3


def test_a_model_that_is_not_whole_and_an_adapter_of_another_one_are_refused(said, tmp_path):
    shutil.copytree(BASE, tmp_path / "model")
    (weights,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    weights.unlink()
    out = ["--output", tmp_path / "out", "--dry-run"]
    assert "has to have its weights in .safetensors, and has none" in said(SPARSE, f"model.path={tmp_path}/model", *out)
    save_file({"transformer.a.lora_A.weight": torch.zeros(8, 2)}, tmp_path / EXPORT_FILE)
    assert "is another model's" in said(SPARSE, "--adapter", tmp_path, *out)


def test_no_password_is_kept(tmp_path):
    judge = "evaluation.unified_reward={url: 'http://me:secret@x:1/v1'}"
    config = load(Path(SPARSE), [judge, "tracking.uri=postgresql://me:secret@db/mlflow", f"output={tmp_path}/runs"])
    folder = evaluate.prepared(config, None, "base", None)
    kept = [file.read_text() for file in folder.iterdir() if file.is_file()]
    assert len(kept) == 2
    assert (folder / "config.yaml").read_text().count(":***@") == 2
    assert not any("secret" in text for text in kept)


def test_where_a_judge_is_does_not_change_what_it_says():
    def protocol(url):
        return evaluate.protocol_of(load(Path(SPARSE), [f"evaluation.unified_reward={{url: {url}}}"]))

    assert protocol("http://one/v1") == protocol("http://other/v1")
    assert protocol("http://one/v1")["unified_reward"] == {"model": "CodeGoat24/UnifiedReward-7b-v1.5"}


def test_looking_for_what_is_not_there_makes_no_database(said, tmp_path):
    uri = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    assert said(uri, "--adapter", "nothing", "--dry-run").endswith("the database does not exist")
    assert not list(tmp_path.iterdir())


def test_embeddings_that_lack_a_prompt_are_refused_before_anything_is_started(said, tmp_path):
    from flowbp_ray.rollouts import embeds

    config = load(Path(SPARSE), [])
    embeds.start(config, tmp_path / "embeds")
    sentence = said(SPARSE, *SMALL, f"prompts.embeds={tmp_path}/embeds", "--dry-run", "--output", tmp_path / "out")
    assert "is not among the" in sentence
