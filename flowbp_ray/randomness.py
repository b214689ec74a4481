"""Every random draw is a function of (seed, step, sample, purpose), wherever and in whatever order it is made."""

import hashlib

import numpy as np


def seed_of(seed: int, step: int, sample: int, purpose: str) -> int:
    """A 63-bit seed for one draw; any two different argument lists give unrelated seeds."""
    digest = hashlib.sha256(f"{seed}/{step}/{sample}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_of(seed: int, step: int, purpose: str) -> np.random.Generator:
    """A numpy generator for draws that a whole step shares, such as its plan."""
    return np.random.default_rng(seed_of(seed, step, -1, purpose))


def prompt_indices(seed: int, step: int, batch: int, number: int) -> list[int]:
    """Which of ``number`` prompts the ``batch`` samples of a step take.

    The prompts are gone through in a new order each epoch, so each is used once before any is used twice.
    """
    if number < 1:
        raise ValueError("there are no prompts to choose from: give at least one")
    places = range(step * batch, (step + 1) * batch)
    orders = {e: generator_of(seed, e, "prompt order").permutation(number) for e in {n // number for n in places}}
    return [int(orders[n // number][n % number]) for n in places]
