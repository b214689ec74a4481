"""Half of the bytes: torch's own rounding, and what it does to a step's gradient, method by method."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from flowbp_ray.config import load
from flowbp_ray.rollouts.prompts import read_prompts
from flowbp_ray.rollouts.sampler import Sampler
from flowbp_ray.rollouts.stages import rewarded
from flowbp_ray.rollouts.wire import narrow, widen
from flowbp_ray.training.learner import Learner
from serve.rewards import here

FOLDER = Path(__file__).parents[2] / "configs" / "shapes"
SETTINGS = ("train.batch=6", "train.micro_batch=6")
#: What bfloat16 moves a step's gradient by, at most, of its norm.
BOUND = 0.01


def test_bfloat16_is_torchs():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38], np.float32)])
    values = values[: len(values) // 2 * 2].reshape(-1, 2)
    wanted = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    sent = narrow(values, "bfloat16")
    assert (sent.dtype, sent.shape, sent.nbytes) == (np.uint16, values.shape, values.nbytes // 2)
    np.testing.assert_array_equal(widen(sent), wanted)
    assert not np.isfinite(widen(sent)[~np.isfinite(values)]).any()  # what is not finite stays so, for whoever looks for it


def test_float32_is_not_touched():
    values = np.ones(3, np.float32)
    assert narrow(values, "float32") is values
    assert widen(values) is values


@pytest.fixture(scope="module")
def rewards():
    return here(load(FOLDER / "sparse.yaml", SETTINGS))


@pytest.mark.parametrize("method", sorted(f.stem for f in FOLDER.glob("*.yaml")))
def test_a_steps_gradient_stays_within_the_bound(rewards, method):
    gradients, sizes = {}, {}
    for dtype in ("float32", "bfloat16"):
        config = load(FOLDER / f"{method}.yaml", [*SETTINGS, f"train.wire_dtype={dtype}"])
        learner, generator = Learner(config), torch.Generator().manual_seed(0)
        for parameter in learner.weights.parameters.values():  # at its start half of an adapter's gradients are 0
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        policy = list(learner.policy())
        block = Sampler(config, read_prompts(config.prompts), lambda _, policy=policy: policy)({"number": np.array([0])})
        block = rewarded(config, block, lambda *asked: partial(rewards.score, *asked))
        sizes[dtype] = block["latents"].nbytes + block["gradients"].nbytes
        learner.accumulate(block)
        gradients[dtype] = learner.weights.gradient.clone()
    exact, rounded = gradients["float32"], gradients["bfloat16"]
    assert 0 < (exact - rounded).norm() <= BOUND * exact.norm()
    assert sizes["bfloat16"] == sizes["float32"] / 2
