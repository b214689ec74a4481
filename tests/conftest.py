"""What all tests share: one thread a process (two cores are not to be fought over), and a tiny random pipeline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# Two busy cores may stop anywhere for a second: how long an example took says nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser):
    parser.addoption("--screenshots", help="a folder for what the browser shows (tests/e2e/test_studio_run.py)")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=[3.0], ids=["shift3"])
def tiny_pipeline(request, tmp_path_factory):
    """The folder of a random pipeline of the embedded default's classes, sizes and on-disk format."""
    from flowbp_ray.shapes.build import base
    from flowbp_ray.shapes.build.autoencoder import new_autoencoder

    path = tmp_path_factory.mktemp("pipeline")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizers = base.clip_tokenizer(), base.t5_tokenizer()
        model, vae = base.Encoders(*tokenizers), new_autoencoder()
        for parameter in model.transformer.parameters():  # its start is the identity, and no test of anything
            torch.nn.init.normal_(parameter, std=0.1)
    vae.register_to_config(shift_factor=0.1, scaling_factor=1.3)
    base.save_pipeline(model, vae, tokenizers, path)
    scheduler = path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"shift": request.param}))
    return path


PLAIN = """
import json, sys
sys.modules["flowbp_ray"] = None  # any import of the project fails
import numpy, torch
from diffusers import StableDiffusion3Pipeline
folder, output, lora, prompts, seeds, steps, guidance_scale = json.loads(sys.argv[1])
pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
if lora:
    pipeline.load_lora_weights(lora)
pictures = pipeline(
    prompts,
    generator=[torch.Generator().manual_seed(s) for s in seeds],
    sigmas=numpy.linspace(1, 1 / steps, steps).tolist(),
    num_inference_steps=steps,
    guidance_scale=guidance_scale,
    height=64,
    width=64,
    max_sequence_length=8,
    output_type="np",
).images
numpy.save(output, pictures)
"""


@pytest.fixture
def plain_diffusers(tmp_path):
    """Pictures (B, 3, 64, 64) of the stock pipeline, made in a process and a folder without this project."""

    def sample(folder, prompts, seeds, *, steps, guidance_scale, lora=None):
        output = tmp_path / "plain.npy"
        arguments = [str(folder), str(output), lora and str(lora), prompts, seeds, steps, guidance_scale]
        subprocess.run([sys.executable, "-I", "-c", PLAIN, json.dumps(arguments)], check=True, cwd=tmp_path)
        return torch.from_numpy(np.load(output)).permute(0, 3, 1, 2)

    return sample


@pytest.fixture(scope="session")
def cluster():
    """One real local Ray cluster for the whole session, with more logical CPUs than this machine may have."""
    import ray
    from ray import serve

    from pipelines.session import PROMPT

    # Rewards of the tests' own are imported in replicas.
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | PROMPT}
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    serve.start(proxy_location="Disabled")  # nothing is asked over HTTP, and on two busy cores the proxy starts too late
    yield
    serve.shutdown()
    ray.shutdown()
