"""The command as a person runs it, on a real cluster: a base and an adapter, interrupted and taken up again, side by side."""

import json
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tiny
from mlflow import MlflowClient
from PIL import Image
from tiny_detector import saved_clip, saved_detector

from flowbp_ray.backbones.sd3 import SD3Backbone
from flowbp_ray.config import load
from flowbp_ray.pictures import to_uint8
from flowbp_ray.tracking.run import TrackedRun
from flowbp_ray.training import adapter
from pipelines import evaluate, session

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
SMALL = (
    "sampling.steps=4",
    "evaluation.per_task=4",
    "evaluation.batch=3",
    "adapter.rank=2",
    "cluster.samplers=1",
    "cluster.sampler_cpus=0.5",
    "cluster.reward_cpus=0.5",
)

pytestmark = pytest.mark.slow


@pytest.fixture
def command(cluster, tmp_path, monkeypatch, capsys):
    """Runs it on the cluster that is there and gives what it says."""

    def run(*more):
        settings = [*SMALL, f"output={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
        monkeypatch.setattr(sys, "argv", ["evaluate", *settings, *map(str, more)])
        monkeypatch.setattr(session, "cluster", lambda _: nullcontext())
        before = signal.getsignal(signal.SIGTERM)
        try:
            evaluate.main()
        except SystemExit as end:
            return capsys.readouterr().err if end.code == 2 else end.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A random adapter, exported as an alignment's."""
    config = load(SPARSE, [*SMALL])
    backbone = adapter.adapted(config, "cpu")
    state = {k: v + 0.05 for k, v in adapter.read(backbone.transformer).items()}
    folder = tmp_path_factory.mktemp("adapter")
    adapter.export(backbone, state, folder, weights="ema")
    return folder


def shown(folder):
    return {file.name: np.asarray(Image.open(file)) for file in (folder / "pictures").iterdir()}


def test_base_and_adapter_side_by_side_after_an_interruption(command, tuned, tmp_path):
    base = tmp_path / "base"
    printed = command(SPARSE, "--output", base)
    assert "report    " in printed
    pictures = shown(base)
    assert len(pictures) == 24
    rows = json.loads((base / "pictures.json").read_text())
    own = SD3Backbone.from_pretrained(load(SPARSE, []).model.source).sample(
        rows["prompt"][:3], rows["seed"][:3], steps=4, guidance_scale=3.0, height=64, width=64
    )
    for seed, picture in zip(rows["seed"], to_uint8(own), strict=False):
        assert np.abs(pictures[f"{seed:08d}.png"].astype(int) - picture).max() <= 1

    # What an interruption leaves: some blocks are whole, one has pictures and no scores, one is not begun.
    whole = (base / "pictures.json").read_text()
    scores = sorted((base / "scores").iterdir())
    assert len(scores) == 12
    kept = {file: file.stat().st_mtime_ns for file in scores[2:]}
    for file in scores[:2]:
        file.unlink()
    for name in sorted(pictures)[:1]:
        (base / "pictures" / name).unlink()
    command(SPARSE, "--output", base)
    assert (base / "pictures.json").read_text() == whole
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert {k: v.tobytes() for k, v in shown(base).items()} == {k: v.tobytes() for k, v in pictures.items()}

    printed = command(SPARSE, "--adapter", tuned, "--beside", base)
    (folder,) = (tmp_path / "evaluations").iterdir()
    assert folder.name.startswith("adapter-")
    assert "| | adapter | base | base − adapter |" in printed
    assert not np.array_equal(shown(folder)["00000000.png"], pictures["00000000.png"])
    assert "../../base/pictures/" in (folder / "report.html").read_text()

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "flowbp_ray"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3
    assert {"eval/mean", "eval/mean_error", "eval/reward/judge"} <= set(runs[0].data.metrics)
    assert {f.path for f in client.list_artifacts(runs[0].info.run_id, "evaluation")} >= {
        "evaluation/report.html",
        "evaluation/table.md",
        "evaluation/protocol.json",
    }


def test_an_mlflow_run_and_a_registered_model_are_their_adapters(command, tuned, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = load(SPARSE, [*SMALL, f"output={tmp_path}/runs", f"tracking.uri={uri}"])
    run = TrackedRun(uri, "flowbp_ray", "align", config=config.model_dump(mode="json"))
    kept = tmp_path / "adapter"
    kept.mkdir()
    for file in tuned.iterdir():
        (kept / file.name).write_bytes(file.read_bytes())
    run.artifact(kept)
    run.finish("FINISHED")
    client = MlflowClient(uri)
    client.create_registered_model("mine")
    source = f"{client.get_run(run.run_id).info.artifact_uri}/adapter"
    version = client.create_model_version("mine", source, run.run_id).version
    client.set_registered_model_alias("mine", "champion", version)

    by_folder = command(SPARSE, "--adapter", tuned, "--output", tmp_path / "a")
    for number, what in enumerate((run.run_id, f"models:/mine/{version}", "models:/mine@champion")):
        printed = command("--adapter", what, "--output", tmp_path / str(number))
        assert (tmp_path / str(number) / "pictures.json").read_text() == (tmp_path / "a" / "pictures.json").read_text()
        assert printed.splitlines()[3] == by_folder.splitlines()[3]
    assert command("--adapter", run.run_id, "model.path=nowhere").splitlines()[-1].startswith("model.path")


def test_geneval_judges_by_its_tags(command, tmp_path):
    model = tiny.saved(tiny.sd3, tmp_path / "model")
    detector, clip = saved_detector(tmp_path / "detector"), saved_clip(tmp_path / "clip")
    entries = [
        {"tag": tag, "include": [{"class": "dog", "count": 1}], "prompt": f"a photo of a dog, {tag}"}
        for tag in ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    ]
    file = tmp_path / "metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)))
    judges = f"{{detector: {detector}, clip: {clip}}}"
    command(
        SPARSE,
        f"model.path={model}",
        f"evaluation.prompts={file}",
        f"evaluation.geneval={judges}",
        "evaluation.per_prompt=2",
        "sampling.height=32",
        "sampling.width=32",
        "--output",
        tmp_path / "out",
    )
    rows = json.loads((tmp_path / "out" / "pictures.json").read_text())
    assert rows["task"] == [tag["tag"] for tag in entries for _ in range(2)]
    assert len(set(rows["seed"])) == 12
    assert all(isinstance(right, bool) for right in rows["right"])
    assert set(json.loads((tmp_path / "out" / "result.json").read_text())) >= {
        "single_object",
        "color_attr",
        "mean",
        "reward/judge",
    }
