"""Updates at full size, on tiny models: gradients, bytes on the meta device beside those of real tensors, and the sentences."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import FluxPipeline
from mlflow import MlflowClient
from torch import nn
from transformers import CLIPConfig

from flowbp_ray.backbones import published
from flowbp_ray.training.memory import Needs, held, peak
from pipelines import benchmark, fits, full_size, rollout_cost, stage_cost
from pipelines.update_cost import Update

SMALL = {"height": 64, "width": 64}


@pytest.fixture(scope="module", autouse=True)
def _tiny_models():
    with pytest.MonkeyPatch.context() as patch:
        for name, entry in tiny.published().items():
            patch.setitem(published.PUBLISHED, name, entry)
        yield


def made(name, device="cpu", **settings):
    """A tiny model's update whose adapter is not at its start, where half of its gradients are 0."""
    update = full_size.build(name, device, torch.float32, **SMALL, **settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in update.trained:
        if device == "cpu":
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return update


@pytest.mark.parametrize(("name", "full"), [("sd35", False), ("sd35", True), ("flux1", False), ("flux2", False)])
def test_the_gradient_is_the_whole_graphs_at_the_memory_of_one_velocity(name, full):
    update = made(name, full=full, batch=2)
    one, eight = (full_size.compare(update, active, 1) for active in (1, 8))
    assert one.difference <= 1e-5
    assert eight.difference <= 1e-5
    assert eight.walk.bytes == pytest.approx(one.walk.bytes, rel=0.02)
    assert eight.whole.bytes > 6 * one.whole.bytes


@pytest.mark.parametrize("name", ["sd35", "flux1", "flux2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_on_the_meta_device_are_those_of_real_tensors(name, checkpointing):
    real, meta = (made(name, device, checkpointing=checkpointing) for device in ("cpu", "meta"))
    plan = real.plan("sparse", active_steps=2)
    assert peak(lambda: meta.walk(plan)) == pytest.approx(peak(lambda: real.walk(plan)), rel=0.02)


def test_several_samples_take_no_more_than_so_many_times_one_and_checkpointing_less():
    settings = {"one": {}, "three": {"batch": 3}, "checkpointed": {"batch": 3, "checkpointing": True}}
    updates = {k: made("sd35", "meta", **given) for k, given in settings.items()}
    plan = updates["one"].plan("sparse", active_steps=1)
    one, three, checkpointed = (peak(lambda u=u: u.walk(plan)) for u in updates.values())
    assert 2 * one < three <= 3 * one
    assert checkpointed < 0.8 * three


def test_the_largest_micro_batch_by_hand():
    needs = Needs(held=10, step=6, update=3, others=1)
    assert needs.micro_batch(9) == 0
    assert needs.micro_batch(15) == 0  # one sample would fit, but not the optimizer's step
    assert needs.micro_batch(17) == 1
    assert needs.micro_batch(26) == 4
    assert needs.micro_batch(29) == 4


def test_what_a_trainer_holds_by_hand():
    """Blocks of 16 and 4 weights in bfloat16, computed in it too; 2 values of a buffer."""
    transformer = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)).to(torch.bfloat16)
    transformer.register_buffer("places", torch.zeros(2, dtype=torch.bfloat16))
    backbone = SimpleNamespace(transformer=transformer, dtype=torch.bfloat16, blocks=list)
    # 4 + 4 + 8 + 4 bytes a weight, 4 a buffer's value; of the larger block two copies and gradients twice: 2 + 2 + 2 + 4.
    assert held(backbone) == (20 * 20 + 2 * 4 + 16 * 10, 20 * 4)
    transformer[0].requires_grad_(False)
    # 2 bytes for each of 22 values; gradients, two moments and the average of 4 values in bfloat16, their sums in float64.
    assert held(backbone) == (22 * 2 + 4 * (4 * 2 + 8), 4 * 4)


def test_running_out_of_memory_is_a_row(monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Update, "whole_graph", too_much)
    row = full_size.compare(made("sd35"), 2, 1)
    assert row.walk.bytes > 0
    assert row.whole is None
    last = full_size.update_table([row]).splitlines()[-1]
    assert last.startswith("| 2 | 0.")
    assert last.count("out of memory") == 2


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("update --model sd35", "required: --random-weights"),
        ("update --model sd36 --random-weights", "--model sd36: the published configurations are sd35, flux1, flux2"),
        ("update --model sd35 --random-weights --batch 0", "--batch 0: at least 1 is needed"),
        ("update --model sd35 --random-weights --active 2 26", "--active 26: the sampler has 25 steps"),
        ("update --model sd35 --random-weights --height 60", "pictures of 60×512 pixels: this model makes sizes"),
        ("fits --caps 24 -1", "--caps -1: a GPU has more than 0 GB"),
        ("wire --model sd36", "--model sd36: the published configurations are sd35, flux1, flux2"),
        ("rollout --repeats 0", "--repeats 0: at least 1 is needed"),
        ("rollout --model sd36 --random-weights", "--model sd36: the published configurations are sd35, flux1, flux2"),
        ("rollout --width 512", "--model NAME --random-weights is a published model"),
        ("rollout --model flux2 --height 512", "--model NAME --random-weights is a published model"),
        ("rollout --model flux2 --random-weights --height 0", "--height 0: at least 1 is needed"),
        ("rollout --model flux2 --random-weights --height 60", "pictures of 60×512 pixels: this model makes sizes"),
        ("stages --model sd36 --random-weights", "--model sd36: the published configurations are sd35, flux1, flux2"),
        ("stages --model sd35 --random-weights --width 60", "pictures of 512×60 pixels: this model makes sizes"),
        ("scale --factor 0", "--factor 0: it has to be more than 0"),
        ("scale --samplers 4 0", "--samplers 0: at least 1 is needed"),
        ("pipeline train.stepz=1 --steps 1", "train.stepz"),
    ],
)
def test_bad_input_ends_in_one_sentence(given, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(given.split())
    said = str(stopped.value.code) if isinstance(stopped.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert sentence in said
    assert "\n" not in said


def test_sampling_here_is_the_stock_pipelines(capsys):
    benchmark.main(["rollout", "--batch", "2", "--repeats", "1"])
    (found,) = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    rows = found["rows"]
    assert (found["device"], found["batch"], found["height"]) == ("CPU", 2, 64)
    assert [row["way"] for row in rows[:5]] == [
        "stock diffusers pipeline",
        "here, branches in one batch",
        "here, one branch after the other",
        "here, modulation from a cache",
        "here, modulation of all steps at once",
    ]
    assert rows[1]["difference"] == rows[3]["difference"] <= 1e-5
    assert rows[4]["difference"] <= 1e-5
    assert rows[2]["difference"] <= 1e-4
    steps = {row["way"].split("'")[0].removeprefix("as far as "): row["velocities"] for row in rows[5:]}
    assert steps["sparse"] == 25  # the finished latent
    assert steps["refl"] < 25


@pytest.mark.parametrize("name", ["sd35", "flux1", "flux2"])
def test_sampling_of_a_published_model_is_the_stock_pipelines(name):
    subject = rollout_cost.published(name, 2, 64, 64)
    stock, here = subject.stock(), subject.own()
    if name == "flux1":  # packed
        stock = FluxPipeline._unpack_latents(stock, 64, 64, subject.backbone.pipeline.vae_scale_factor)
    if name == "flux2":  # patches apart, by the decoder's statistics
        stock = nn.functional.pixel_unshuffle(stock / math.sqrt(1 + subject.backbone.pipeline.vae.config.batch_norm_eps), 2)
    assert here.std() > 0.1
    torch.testing.assert_close(here, stock, rtol=0, atol=1e-4)
    torch.testing.assert_close(subject.apart().own(), here, rtol=0, atol=1e-4)
    cached, at_once = subject.keeping().values()
    assert all(torch.equal(cached(), here) for _ in range(2))
    torch.testing.assert_close(at_once(), here, rtol=0, atol=1e-4)
    compiled = subject.compiled()
    blocks = compiled.backbone.blocks(compiled.backbone.transformer)
    assert all(block._compiled_call_impl for block in blocks)
    assert not any(block._compiled_call_impl for block in subject.backbone.blocks(subject.backbone.transformer))
    torch.testing.assert_close(compiled.own(), here, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "makers"), [("sd35", 6), ("flux1", 7), ("flux2", 5)])  # of tiny ones
def test_the_modulation_is_made_by_these_modules(name, makers):
    names = [n for n, _ in published.PUBLISHED[name].backbone("meta", torch.bfloat16).transformer.named_modules()]
    found = [n for n in names if rollout_cost.MODULATION.search(n)]
    assert len(found) == makers
    assert "norm_out.linear" in found
    assert any(n.startswith("time_") for n in found)


@pytest.mark.parametrize("more", [[], ["--peft-cast"]])
def test_stages_of_a_published_model(monkeypatch, capsys, more):
    """By the same sampler, rewards and learner as a run's, from the disk."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPConfig(text_config=small, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=16)
    for module in (fits, stage_cost):
        monkeypatch.setattr(module, "VIT_H", clip)
    benchmark.main(["stages", "--model", "flux2", "--random-weights", "--batch", "2", "--height", "32", "--width", "48", *more])
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-2])
    assert found["texts"] > 0
    assert found["peft_cast"] == ("with PEFT's cast" in said) == bool(more)
    assert [row["stage"] for row in found["rows"]] == ["sampling", "reward", "update"]
    assert all(row["seconds"] > 0 and row["flops"] > 0 for row in found["rows"])
    assert (found["active"], found["velocities"], found["height"], found["width"]) == (4, 25, 32, 48)
    assert found["peak"] is None
    assert "micro-batch of 2 of 32×48 pixels" in said


def test_what_is_on_the_wire_and_an_mlflow_run_of_it(tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    benchmark.main(["wire", "--model", "sd35", "--mlflow", uri])
    said = capsys.readouterr().out
    rows = json.loads(next(line for line in said.splitlines() if line.startswith("[")))
    sparse = next(row for row in rows if (row["pixels"], row["method"]) == (512, "sparse"))
    latent = 4 * math.prod(published.PUBLISHED["sd35"].backbone("meta", torch.bfloat16).latent_shape(512, 512))
    assert sparse["bytes"] == latent * sparse["latents"]
    assert sparse["of_trajectory"] == sparse["latents"] / 27
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("flowbp_ray benchmarks").experiment_id])
    assert run.info.run_id in said
    assert len(client.get_metric_history(run.info.run_id, "0/bytes")) == len(rows)
    assert {f.path for f in client.list_artifacts(run.info.run_id)} >= {"0.md", "0.json"}


ALONE = """
import socket, sys
sys.modules["ray"] = sys.modules["mlflow"] = None  # any import of them fails
def refused(*_): raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refused
import torch
torch.set_num_threads(1)
torch.cuda.is_available = lambda: False
sys.path.insert(0, sys.argv[1])
import tiny
from flowbp_ray.backbones import published
from pipelines import benchmark, fits
published.PUBLISHED.update(tiny.published())
fits.SIZES = (64,)
benchmark.main("update --model flux2 --random-weights --active 1 4 --repeats 1 --height 64 --width 64 --caps 6 24".split())
benchmark.main("fits --model flux2 --caps 24".split())
"""


def test_the_command_needs_neither_ray_nor_network():
    tests = str(Path(tiny.__file__).parent)
    done = subprocess.run([sys.executable, "-c", ALONE, tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured, fits, again, decoders = (json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{" and line)
    assert [entry["held"] for entry in again] == [entry["held"] for entry in fits]
    (decoder,) = decoders
    assert 0 < decoder["checkpointed"] <= decoder["plain"]
    assert decoder["flops"] < decoder["with_more"] < 2 * decoder["flops"]
    assert [row["active"] for row in measured["rows"]] == [1, 4]
    assert measured["device"] == "CPU"
    assert len(fits) == 4
    # A decoder so small costs little; the reward model of 4 GB and three processes' 1.5 GB are there.
    assert all(5.4e9 < entry["held"] < 5.5e9 for entry in fits)
    assert all(entry["micro_batch"]["24"] > entry["micro_batch"]["6"] >= 0 for entry in fits)
    assert "| active steps | peak, GB |" in done.stdout
    assert "| flux2 | all weights | on | 64² |" in done.stdout
