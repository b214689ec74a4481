"""What a step reports, from two micro-batches of two samples."""

import numpy as np
import pytest

from flowbp_ray.training.metrics import means, totals


def block(reward, seconds):
    return {
        "step": np.zeros(2, int),
        "prompt": np.array(["a", "b"], dtype=object),
        "latents": np.ones((2, 1, 4, 2, 2), np.float32),
        "objective": np.array(reward),
        "reward/judge": 10 * np.array(reward),
        "weight/judge": np.full(2, 0.5),
        "reward/file_bytes": np.array(reward),
        "reward/its_seconds": np.array(reward),
        "sampling_seconds": np.full(2, seconds / 2),
        "sampling_bytes": np.full(2, 100.0),
    }


def test_samples_are_averaged_and_a_stages_seconds_added_up():
    names, sums = totals([block([1.0, 2.0], 3.0), block([3.0, 6.0], 5.0)])
    assert set(names) == {
        *("objective", "reward/judge", "reward/file_bytes", "reward/its_seconds", "weight/judge"),
        *("sampling_bytes", "sampling_seconds"),
    }
    metrics = means(dict(zip(names, sums.tolist(), strict=True)) | {"policy_bytes": 7.0}, {"update": 0.25}, 4)
    assert metrics == pytest.approx(
        {
            "objective": 3.0,
            "reward/judge": 30.0,
            "reward/file_bytes": 3.0,
            "reward/its_seconds": 3.0,
            "weight/judge": 0.5,
            "sample_bytes/sampling": 100.0,
            "policy_bytes": 7.0,
            "seconds/sampling": 8.0,
            "seconds/update": 0.25,
        }
    )
