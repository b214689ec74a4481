"""What every stage notes of itself."""

import time

import numpy as np

from flowbp_ray.rollouts.stages import Timed, sample_bytes


class Stage(Timed):
    name = "stage"

    def work(self, block):
        return block | {"latents": np.zeros((2, 3), np.float32)}


def block():
    return {"step": np.zeros(2, np.int64), "prompt": np.array(["a ring", "zwölf"], dtype=object)}


def test_waiting_is_from_one_block_to_the_next_and_bytes_are_of_what_is_handed_on():
    stage = Stage()
    first = stage(block())
    assert first["stage_waiting_seconds"].tolist() == [0, 0]
    assert first["stage_bytes"].tolist() == [(2 * 8 + 6 + 6 + 2 * 3 * 4) / 2] * 2
    time.sleep(0.2)
    assert stage(block())["stage_waiting_seconds"].sum() >= 0.2


def test_bytes_of_texts_are_utf_8():
    assert sample_bytes(block()) == (2 * 8 + 6 + 6) / 2
