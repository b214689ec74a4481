"""Whole alignments of the embedded default on a real local Ray cluster, with real Serve and a real MLflow store."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from ray import serve
from reference import align_here
from safetensors.torch import load_file, save_file

from flowbp_ray import shapes
from flowbp_ray.backbones.sd3 import SD3Backbone
from flowbp_ray.config import load
from flowbp_ray.training import adapter
from pipelines.alignment import align
from pipelines.causes import reason

CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
SMALL = (
    "train.steps=4",
    "train.batch=8",
    "train.micro_batch=2",
    "train.workers=1",
    "train.policy_lag=0",
    "cluster.samplers=1",
    "train.learning_rate=3e-3",
    "train.checkpoint_every=3",
    "train.velocity_penalty=0.1",
    "adapter.rank=4",
    "sampling.steps=6",
    "evaluation.per_task=2",
    "evaluation.batch=3",
    "evaluation.preview_every=2",
    "evaluation.preview_prompts=3",
    "cluster.sampler_cpus=0.5",
    "cluster.trainer_cpus=0.5",
    "cluster.reward_cpus=0.5",
)


def configured(folder, *overrides):
    return load(CONFIG, [*SMALL, f"output={folder}", f"tracking.uri=sqlite:///{folder}/mlflow.db", *overrides])


@pytest.fixture(scope="module")
def aligned(cluster, tmp_path_factory):
    """Two samplers, two train workers, strictly on-policy."""
    folder = tmp_path_factory.mktemp("aligned")
    config = configured(folder, "cluster.samplers=2", "train.workers=2")
    return config, align(config, folder / "run")


@pytest.fixture(scope="module")
def here(aligned):
    """The same in this process."""
    return align_here(aligned[0])


def states(folder):
    """Raw and averaged weights of a checkpoint."""
    both = load_file(folder / "state_0.safetensors")
    return [{k.removeprefix(which): v for k, v in both.items() if k.startswith(which)} for which in ("raw.", "ema.")]


def flat(state):
    return torch.cat([state[k].flatten() for k in sorted(state)])


def test_two_workers_and_two_samplers_learn_what_one_process_does(aligned, here):
    config, outcome = aligned
    learner, _ = here
    start = flat(adapter.read(adapter.adapted(config, "cpu").transformer))
    raw, averaged = states(outcome.folder / "checkpoint_000004")
    wanted = flat(adapter.read(learner.backbone.transformer))
    moved = (wanted - start).norm()
    assert moved > 0.1
    assert (flat(raw) - wanted).norm() <= 1e-4 * moved
    assert (flat(averaged) - flat(learner.averaged)).norm() <= 1e-4 * moved


@pytest.mark.slow  # with one worker it is shown below
def test_the_same_configuration_gives_bitwise_the_same_adapter(aligned, tmp_path):
    _, first = aligned
    settings = ("cluster.samplers=2", "train.workers=2", "evaluation.before=false", "evaluation.preview_prompts=0")
    again = align(configured(tmp_path, *settings), tmp_path / "run")
    assert again.folder != first.folder
    for one, two in zip(*(states(o.folder / "checkpoint_000004") for o in (first, again)), strict=True):
        assert torch.equal(flat(one), flat(two))


@pytest.mark.parametrize(
    ("samplers", "lag", "started"),
    [
        pytest.param(1, 0, False, marks=pytest.mark.slow),
        pytest.param(2, 0, True, marks=pytest.mark.slow),
        (1, 1, False),
    ],
)
def test_one_worker_learns_bitwise_what_one_process_does(cluster, aligned, tmp_path, samplers, lag, started):
    """Whatever the number of samplers, the lag, and whether it starts from an earlier run's adapter."""
    settings = [f"cluster.samplers={samplers}", f"train.policy_lag={lag}", "evaluation.before=false", "train.steps=3"]
    if started:
        settings.append(f"adapter.init_from={aligned[1].folder / 'adapter'}")
    config = configured(tmp_path, *settings)
    outcome = align(config, tmp_path / "run")
    raw, averaged = states(outcome.folder / "checkpoint_000003")
    learner, _ = align_here(config)
    assert torch.equal(flat(raw), flat(adapter.read(learner.backbone.transformer)))
    assert torch.equal(flat(averaged), flat(learner.averaged))
    assert outcome.base is None


def test_mlflow_has_one_point_a_step_the_pictures_and_the_adapter(aligned, here):
    config, outcome = aligned
    client = MlflowClient(config.tracking.uri)
    run = client.get_run(outcome.info["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["surrogate.active_steps"] == "4"
    for metric in (
        "reward/preference",
        "reward/judge",
        "objective",
        "grad_norm",
        "policy_version",
        "active/0",
        "seconds/waiting",
    ):
        assert [p.step for p in client.get_metric_history(run.info.run_id, metric)] == [0, 1, 2, 3]
    assert [p.value for p in client.get_metric_history(run.info.run_id, "policy_version")] == [0, 1, 2, 3]
    measured = [p.value for p in client.get_metric_history(run.info.run_id, "objective")]
    np.testing.assert_allclose(measured, here[1], rtol=1e-3)
    images = {f.path.split("+")[2] for f in client.list_artifacts(run.info.run_id, "images")}
    assert images == {"0", "2", "4"}
    artifacts = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"adapter", "before_after.png", "resolved_config.yaml", "plans.txt", "trained_parameters.txt"} <= artifacts
    plans = client.download_artifacts(run.info.run_id, "plans.txt")
    logged = [[int(row.split()[0]) for row in plan.splitlines()[2:]] for plan in Path(plans).read_text().split("\n\n")]
    drawn = [client.get_metric_history(run.info.run_id, f"active/{k}") for k in range(4)]
    assert logged == [[int(points[step].value) for points in drawn] for step in range(4)]
    assert run.data.metrics["eval/aligned/mean"] == pytest.approx(outcome.aligned["mean"].value)
    assert set(outcome.base) == {*outcome.aligned}
    assert {"mean", "position", "watermarked", "reward/preference", "reward/judge"} <= set(outcome.aligned)


def test_what_a_person_finds_in_the_folder(aligned):
    _, outcome = aligned
    assert "| **mean** |" in (outcome.folder / "table.md").read_text()
    assert Image.open(outcome.folder / "before_after.png").width > 300
    note = json.loads((outcome.folder / "adapter" / "adapter.json").read_text())
    assert note["weights"] == "ema"
    assert load(outcome.folder / "config.yaml", []) == aligned[0]


def test_plain_diffusers_makes_the_pictures_of_the_trained_weights(aligned, here, plain_diffusers):
    config, outcome = aligned
    learner, _ = here
    prompts, seeds, guidance = ["a red ring", "two circles"], [3, 4], config.sampling.guidance_scale
    settings = {"steps": config.sampling.steps, "guidance_scale": guidance}
    plain = plain_diffusers(shapes.BASE, prompts, seeds, lora=outcome.folder / "adapter", **settings)
    own = learner.backbone.decode(learner.preview(prompts, seeds))
    assert (plain - own).abs().max() <= 1e-4
    base = SD3Backbone.from_pretrained(shapes.BASE).sample(prompts, seeds, height=64, width=64, **settings)
    assert (plain - base).abs().max() > 1e-2


def test_a_run_starts_from_an_earlier_ones_adapter(aligned, tmp_path):
    config = configured(tmp_path, f"adapter.init_from={aligned[1].folder / 'adapter'}")
    _, averaged = states(aligned[1].folder / "checkpoint_000004")
    assert torch.equal(flat(adapter.read(adapter.adapted(config, "cpu").transformer)), flat(averaged))
    other = configured(tmp_path, f"adapter.init_from={aligned[1].folder / 'adapter'}", "adapter.rank=8")
    with pytest.raises(ValueError, match=r"has rank 4: set adapter\.rank, which is 8, to that"):
        adapter.adapted(other, "cpu")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("evaluation.per_task=1",), marks=pytest.mark.slow, id="before"),
        pytest.param(("evaluation.before=false", "evaluation.preview_prompts=0"), id="training"),
    ],
)
def test_a_dead_reward_stops_the_run_with_one_sentence(cluster, tmp_path, settings):
    dead = tmp_path / "dead"
    dead.mkdir()
    for file in shapes.REWARD.iterdir():
        (dead / file.name).write_bytes(file.read_bytes())
    weights = load_file(dead / "model.safetensors")
    weights["logit_scale"] = torch.full_like(weights["logit_scale"], torch.nan)
    save_file(weights, dead / "model.safetensors", metadata={"format": "pt"})
    config = configured(tmp_path, f"reward.components.0.path={dead}", *settings)
    with pytest.raises(Exception, match=r".") as caught:
        align(config, tmp_path / "run")
    assert reason(caught.value).startswith("the reward 'preference' is not finite for the prompts ['")
    (run,) = MlflowClient(config.tracking.uri).search_runs([_experiment(config)])
    assert run.info.status == "FAILED"
    assert not serve.status().applications


def _experiment(config):
    return MlflowClient(config.tracking.uri).get_experiment_by_name("flowbp_ray").experiment_id
