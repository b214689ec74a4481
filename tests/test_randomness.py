import itertools

import pytest

from flowbp_ray.randomness import generator_of, prompt_indices, seed_of


def test_every_argument_matters_and_nothing_else():
    seeds = {seed_of(*a) for a in itertools.product(range(3), range(5), range(-1, 5), ("noise", "plan"))}
    assert len(seeds) == 3 * 5 * 6 * 2
    assert all(0 <= s < 2**63 for s in seeds)
    assert seed_of(1, 2, 3, "noise") == 6585892572168612283  # a resumed run of another day draws the same
    assert (
        generator_of(0, 1, "plan").integers(1000, size=3).tolist() == generator_of(0, 1, "plan").integers(1000, size=3).tolist()
    )


def test_each_prompt_is_used_once_before_any_twice():
    drawn = [i for step in range(7) for i in prompt_indices(0, step, batch=4, number=14)]
    assert sorted(drawn[:14]) == sorted(drawn[14:]) == list(range(14))
    assert drawn[:14] != drawn[14:]
    assert [i for step in range(14) for i in prompt_indices(0, step, 2, 14)] == drawn  # the batch size does not matter


def test_no_prompts_are_an_error():
    with pytest.raises(ValueError, match="no prompts"):
        prompt_indices(0, 0, 1, 0)
