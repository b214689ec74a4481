"""What every stage notes of itself, and how a sampler has its policies."""

import time

import numpy as np
import ray

from flowbp_ray.config import load
from flowbp_ray.rollouts.policy import PolicyStore
from flowbp_ray.rollouts.stages import Sampling, Stage, sample_bytes
from pipelines.machines import SPARSE


class Noted(Stage):
    name = "stage"

    def work(self, block):
        return block | {"latents": np.zeros((2, 3), np.float32)}


def block():
    return {"step": np.zeros(2, np.int64), "prompt": np.array(["a ring", "zwölf"], dtype=object)}


def test_waiting_is_from_one_block_to_the_next_and_bytes_are_of_what_is_handed_on():
    stage = Noted()
    first = stage(block())
    assert first["stage_waiting_seconds"].tolist() == [0, 0]
    assert first["stage_bytes"].tolist() == [(2 * 8 + 6 + 6 + 2 * 3 * 4) / 2] * 2
    time.sleep(0.2)
    assert stage(block())["stage_waiting_seconds"].sum() >= 0.2


def test_bytes_of_texts_are_utf_8():
    assert sample_bytes(block()) == (2 * 8 + 6 + 6) / 2


def test_a_sampler_has_what_the_store_told_it_or_asks_again_and_keeps_none_of_what_it_has_loaded(cluster):
    store = ray.remote(PolicyStore).options(num_cpus=0).remote(1)
    for version in (0, 1):
        ray.get(store.publish.remote(version, 0, [ray.put(f"chunk {version} {n}") for n in (0, 1)]))
    loaded = []

    class Loading(Sampling):
        """Loads the version of each step."""

        def work(self, block):
            version = int(block["number"][0]) // parts
            loaded.append(list(self.chunks(version)))
            return {"step": np.zeros(1)}

    config = load(SPARSE, ["train.policy_lag=0"])
    parts = config.train.batch // config.train.micro_batch
    sampling = Loading(config, store)
    for number in (0, parts, 1):  # the last one again, as where a machine was lost
        sampling({"number": np.array([number])})
        assert not sampling.told
    ray.kill(store)
    assert loaded == [[f"chunk {version} {n}" for n in (0, 1)] for version in (0, 1, 0)]
