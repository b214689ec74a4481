"""What a run exports as a version: plain MLflow loads it, and it is there once."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow.diffusers
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.models import Model

from flowbp_ray.config import ConfigError, dump, load
from flowbp_ray.tracking import registry
from flowbp_ray.tracking.run import TrackedRun
from flowbp_ray.training import adapter

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
STEP = {"prompt": "a red ring", "num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store, from a working directory in which nothing may be kept."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(None)
    assert not list((tmp_path / "cwd").iterdir())


@pytest.fixture
def run(store, tmp_path, tiny_pipeline):
    config = load(SPARSE, [f"model.path={tiny_pipeline}", f"tracking.uri={store}", "adapter.rank=2", f"output={tmp_path}/runs"])
    tracked = TrackedRun(store, "flowbp_ray", "align", config=config.model_dump(mode="json"))
    tracked.metrics({"eval/aligned/mean": 0.5}, 7)
    tracked.metrics({"objective": 3.0}, 6)
    return tracked, config


@pytest.fixture
def exported(run, tmp_path):
    _, config = run
    backbone = adapter.adapted(config, "cpu")
    folder = tmp_path / "adapter"
    adapter.export(backbone, {k: v + 0.05 for k, v in adapter.read(backbone.transformer).items()}, folder, weights="ema")
    picture = tmp_path / "before_after.png"
    picture.write_bytes(b"a picture")
    return registry.Exported(folder, config, dump(config), 7, "| | base |\n", (picture,))


def test_plain_mlflow_loads_a_version_and_it_is_the_adapter(store, run, exported):
    tracked, config = run
    uri = registry.register(store, tracked.run_id, exported)
    assert uri == f"models:/{exported.name}/1"
    assert exported.name == f"{Path(config.model.path).name}-aligned"
    mlflow.set_tracking_uri(store)
    pipeline = mlflow.diffusers.load_model(uri).load_pipeline(torch_dtype=torch.float32, device="cpu")
    own = adapter.adapted(config, "cpu").pipeline  # rank and targets alone
    own.unload_lora_weights()
    own.load_lora_weights(exported.folder)
    ours, theirs = (p(**STEP, generator=torch.Generator().manual_seed(3), output_type="np").images[0] for p in (own, pipeline))
    assert np.abs(ours - theirs).max() < 1e-4
    own.unload_lora_weights()
    base = own(**STEP, generator=torch.Generator().manual_seed(3), output_type="np").images[0]
    assert np.abs(base - theirs).max() > 1e-2

    assert {column.name for column in Model.load(uri).signature.inputs} == {"prompt"}
    kept = Path(mlflow.artifacts.download_artifacts(uri))
    assert {f.name for f in kept.rglob("*")} >= {"before_after.png", "evaluation.md", "resolved_config.yaml", "adapter.json"}
    client = MlflowClient(store)
    version = client.get_model_version(exported.name, "1")
    assert version.description == exported.table
    assert version.tags["base_model"] == config.model.path
    assert version.tags["steps"] == "7"
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert {m.key: m.value for m in model.metrics} == {"eval/aligned/mean": 0.5}
    assert model.params["adapter.rank"] == "2"
    assert model.artifact_location.startswith(f"file://{Path(store.removeprefix('sqlite:///')).parent}/artifacts/")
    assert [p.value for p in client.get_metric_history(tracked.run_id, "eval/aligned/mean")] == [0.5]


def test_a_version_is_made_once_and_another_adapter_is_another_version(store, run, exported):
    tracked, _ = run
    assert registry.register(store, tracked.run_id, exported) == registry.register(store, tracked.run_id, exported)
    assert "MLFLOW_TRACKING_URI" not in os.environ  # child processes would take that store for theirs
    (exported.folder / "pytorch_lora_weights.safetensors").write_bytes(
        (exported.folder / "pytorch_lora_weights.safetensors").read_bytes()[:-4] + b"\0\0\0\0"
    )
    assert registry.register(store, tracked.run_id, exported).endswith("/2")


def test_the_base_is_pinned_to_the_revision_that_was_trained_on(store, run, exported, monkeypatch):
    tracked, config = run
    monkeypatch.setattr("mlflow.diffusers._resolve_base_model_revision", lambda _: "the newest")
    for revision, noted in (("abc", "abc"), (None, None)):
        model = config.model.model_copy(update={"revision": revision})
        of = replace(exported, config=config.model_copy(update={"model": model}))
        (exported.folder / "adapter.json").write_text("{}")
        registry.register(store, tracked.run_id, of)
        mlflow.set_tracking_uri(store)
        assert mlflow.diffusers.load_model(f"models:/{of.name}/1").base_model_revision == noted
        MlflowClient(store).delete_model_version(of.name, "1")
        MlflowClient(store).delete_registered_model(of.name)


def test_a_version_and_an_alias_and_a_run_are_found_again(store, run, exported, tmp_path):
    tracked, _ = run
    uri = registry.register(store, tracked.run_id, exported)
    MlflowClient(store).set_registered_model_alias(exported.name, "champion", "1")
    tracked.artifact(exported.folder)
    file = "pytorch_lora_weights.safetensors"
    for number, what in enumerate((uri, f"models:/{exported.name}@champion", tracked.run_id)):
        found = registry.find(store, what)
        (tmp_path / str(number)).mkdir()
        config, folder = found.fetch(tmp_path / str(number))
        assert found.run_id == tracked.run_id
        assert (folder / file).read_bytes() == (exported.folder / file).read_bytes()
        assert "rank: 2" in config.read_text()
    for wrong in ("models:/nothing/1", f"models:/{exported.name}@nobody", f"models:/{exported.name}", "0" * 32):
        with pytest.raises(ConfigError, match="is no folder here, and MLflow"):
            registry.find(store, wrong)


def under(exported, name):
    tracking = exported.config.tracking.model_copy(update={"registered_model": name})
    return replace(exported, config=exported.config.model_copy(update={"tracking": tracking}))


def test_of_a_whole_model_there_is_a_reference(store, run, exported, tiny_pipeline, tmp_path):
    tracked, config = run
    whole = replace(exported, folder=tiny_pipeline, config=config.model_copy(update={"adapter": None}))
    uri = registry.register(store, tracked.run_id, whole)
    assert registry.register(store, tracked.run_id, whole) == uri
    name, _, version = uri.removeprefix("models:/").partition("/")
    client = MlflowClient(store)
    got = Path(mlflow.artifacts.download_artifacts(client.get_model_version_download_uri(name, version), tracking_uri=store))
    reference = json.loads((got / "reference.json").read_text())
    assert reference["path"] == str(tiny_pipeline)
    assert reference["steps"] == whole.version
    for what in (uri, tracked.run_id):
        assert registry.find(store, what).fetch(tmp_path)[1] == tiny_pipeline

    # The run goes on, and writes its model to where it was: weights of the same size.
    more = replace(whole, folder=tmp_path / "model", version=9)
    shutil.copytree(tiny_pipeline, more.folder)
    (weights,) = (more.folder / "transformer").glob("*.safetensors")
    whole = replace(whole, folder=more.folder, version=8)
    first = registry.register(store, tracked.run_id, under(whole, "another"))
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    other = registry.register(store, tracked.run_id, more)
    assert other not in {uri, first}
    for number, what in enumerate((other, tracked.run_id)):
        (tmp_path / str(number)).mkdir()
        assert registry.find(store, what).fetch(tmp_path / str(number))[1] == more.folder
    with pytest.raises(ConfigError, match=f"is the whole model in {more.folder}, which is gone, or has other weights than"):
        registry.find(store, first).fetch(tmp_path)
