"""Whole alignments of tiny random models of each published family, on a real local Ray cluster: two FSDP2 workers."""

from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from mlflow import MlflowClient
from reference import align_here
from safetensors.torch import load_file

from flowbp_ray import backbones
from flowbp_ray.config import load
from pipelines.alignment import align

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
SMALL = (
    "train.steps=3",
    "train.batch=8",
    "train.micro_batch=2",
    "train.workers=2",
    "train.sharded=true",
    "train.policy_lag=0",
    "train.learning_rate=3e-3",
    "adapter.rank=2",
    "sampling.steps=4",
    "sampling.height=32",
    "sampling.width=48",
    "surrogate={method: bridge, active_steps: 2, pair: {rule: uniform}}",
    "evaluation.before=false",
    "evaluation.per_task=2",
    "evaluation.preview_prompts=1",
    "evaluation.preview_every=2",
    "cluster.sampler_cpus=0.5",
    "cluster.trainer_cpus=0.5",
    "cluster.reward_cpus=0.5",
)
pytestmark = pytest.mark.slow
WHAT = {"adapter": ("train.velocity_penalty=0.1",), "all": ("adapter=null", "train.velocity_penalty=0")}
#: Each family, and each way to train it, on two workers; tests/training/test_sharded.py has all combinations on one.
RUNS = [(tiny.sd3, "adapter"), (tiny.sd3, "all"), (tiny.flux1, "all"), (tiny.flux2, "adapter")]


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("family", "what"), RUNS, ids=[f"{family.__name__}-{what}" for family, what in RUNS])
def test_two_sharded_workers_learn_what_one_does(cluster, family, what, group, tmp_path):
    folder, prompts = tiny.saved(family, tmp_path / "model"), tmp_path / "prompts.txt"
    prompts.write_text("a red ring\ntwo circles\na blue cross\n", encoding="utf-8")
    paths = [f"model.path={folder}", f"prompts.path={prompts}", f"evaluation.prompts={prompts}", f"output={tmp_path}"]
    settings = [*SMALL, *paths, *WHAT[what], f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    config = load(SPARSE, settings)
    outcome = align(config, tmp_path / "run")

    learner, _ = align_here(load(SPARSE, [*settings, "train.workers=1"]))
    assert [p.device_mesh.size() for p in learner.weights.parameters.values()] == [1] * len(learner.weights.parameters)
    parts = [load_file(outcome.folder / "checkpoint_000003" / f"state_{rank}.safetensors") for rank in (0, 1)]
    start = {
        n: p.full_tensor() for n, p in type(learner)(load(SPARSE, [*settings, "train.workers=1"])).weights.parameters.items()
    }
    for which, wanted in (("raw", learner.weights.read()), ("ema", learner.averaged)):
        found = {name: torch.cat([part[f"{which}.{name}"] for part in parts]) for name in wanted}
        moved = torch.cat([(wanted[n] - start[n]).flatten() for n in wanted]).norm()
        apart = torch.cat([(wanted[n] - found[n]).flatten() for n in wanted]).norm()
        assert moved > 0.01
        assert apart <= 1e-4 * moved

    client = MlflowClient(config.tracking.uri)
    for metric in ("policy_bytes", "seconds/publishing", "seconds/loading"):
        assert [p.step for p in client.get_metric_history(outcome.info["run_id"], metric)] == [0, 1, 2]
    trained = sum(p.numel() for p in learner.weights.parameters.values())
    bytes_ = client.get_metric_history(outcome.info["run_id"], "policy_bytes")[0].value
    assert bytes_ == 4 * trained
    if what == "all":
        size = {"height": 32, "width": 48, "steps": 4, "guidance_scale": config.sampling.guidance_scale}
        exported = backbones.load(outcome.exported)
        shown = learner.preview(["a red ring"], [1])
        torch.testing.assert_close(exported.sample_latents(["a red ring"], [1], **size), shown, rtol=0, atol=1e-3)
