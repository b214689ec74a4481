"""What all tests share: one thread a process (two cores are not to be fought over), and a tiny random pipeline."""

import json

import pytest
import torch


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
        model, vae = base.Encoders(base.clip_tokenizer(), base.t5_tokenizer()), new_autoencoder()
        for parameter in model.transformer.parameters():  # its start is the identity, and no test of anything
            torch.nn.init.normal_(parameter, std=0.1)
    vae.register_to_config(shift_factor=0.1, scaling_factor=1.3)
    base.save_pipeline(model, vae, path)
    scheduler = path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"shift": request.param}))
    return path
