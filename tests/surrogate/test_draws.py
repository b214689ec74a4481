"""The distributions of the draws, their limits, and what they refuse."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbp_ray.surrogate.draws import PairDraw, evenly_spaced, late_biased, window_start
from flowbp_ray.surrogate.methods import METHODS
from flowbp_ray.surrogate.methods.bridge import split_count, split_indices

NUMBER = 4000
properties = settings(max_examples=100, deadline=None)


def shares(draws):
    return {value: n / len(draws) for value, n in Counter(draws).items()}


def close(measured, expected, number=NUMBER):
    """Within five standard errors."""
    error = np.sqrt(expected * (1 - expected) / number)
    assert abs(measured - expected) <= 5 * error + 1e-12, (measured, expected)


@pytest.mark.parametrize("origin", [0, 3])
def test_late_bias_draws_in_turn_without_replacement(origin):
    """Every ordered pair's probability p_a · p_b / (1 − p_a), summed over both orders."""
    generator, bias = np.random.default_rng(1), 1.5
    measured = shares([tuple(late_biased(3, 7, 2, bias, origin, generator)) for _ in range(NUMBER)])
    odds = {i: (i - origin + 1) ** bias for i in range(3, 7)}
    p = {i: o / sum(odds.values()) for i, o in odds.items()}
    for a in range(3, 7):
        for b in range(a + 1, 7):
            close(measured.get((a, b), 0), p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b]))


def test_late_bias_zero_is_uniform_and_a_huge_one_takes_the_last():
    generator = np.random.default_rng(2)
    measured = shares([late_biased(0, 5, 1, 0.0, 0, generator)[0] for _ in range(NUMBER)])
    for i in range(5):
        close(measured[i], 0.2)
    assert late_biased(0, 25, 3, 1e6, 0, generator) == [22, 23, 24]
    with pytest.raises(ValueError, match="active_steps is 6: it must be at most 5"):
        late_biased(0, 5, 6, 1.0, 0, generator)


@properties
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 1000))
def test_even_spacing(length, number, seed):
    indices = evenly_spaced(length, number, np.random.default_rng(seed))
    number = min(number, length)
    assert len(indices) == number
    assert {b - a for a, b in pairwise(indices)} <= {length // number}
    assert indices[0] >= 0
    assert indices[-1] < length


def test_even_spacing_has_a_uniform_offset():
    generator = np.random.default_rng(3)
    measured = shares([evenly_spaced(11, 3, generator)[0] for _ in range(NUMBER)])
    assert sorted(measured) == [0, 1, 2, 3, 4]  # 10 − 2·3
    for share in measured.values():
        close(share, 0.2)


def test_tail_window():
    assert window_start(25, None) == window_start(25, 1.0) == 0
    assert window_start(25, 0.7) == 25 - 18
    assert window_start(100, 0.07) == 93
    assert window_start(25, 0.01) == 24
    assert window_start(25, 0.01, least=3) == 22
    assert window_start(2, 0.01, least=3) == 0


@st.composite
def pairs(draw):
    rule = draw(st.sampled_from(["uniform", "dirichlet", "midpoint", "midpoint_j"]))
    low = draw(st.integers(1, 3))
    cap = draw(st.one_of(st.none(), st.integers(low + (rule == "dirichlet"), 12))) if "midpoint" not in rule else None
    concentration = draw(st.tuples(*[st.floats(0.2, 8)] * 3)) if rule == "dirichlet" else None
    return PairDraw(rule, concentration, cap, low, draw(st.one_of(st.none(), st.integers(low + 3, 30))))


@properties
@given(pairs(), st.integers(6, 25), st.one_of(st.none(), st.floats(0.05, 1)), st.integers(0, 1000))
def test_pairs_stay_within_their_bounds(pair, steps, tail, seed):
    start = window_start(steps, tail, least=3)
    end = min(pair.max_idx or steps + 1, steps - start + 1)
    needed = 3 if pair.rule == "dirichlet" else 2
    if end - pair.min_idx < needed:
        with pytest.raises(ValueError, match="reverse indices, but the rule"):
            pair.draw(steps, tail, np.random.default_rng(seed))
        return
    k, j = pair.draw(steps, tail, np.random.default_rng(seed))
    k_rev, j_rev = steps - k, steps - j
    assert 0 <= k < j < steps
    match pair.rule:
        case "midpoint":
            assert j == max(k + 1, (k + steps) // 2)
            assert pair.min_idx < k_rev < end
        case "midpoint_j":
            assert k == j // 2  # not clipped to the window
            assert pair.min_idx <= j_rev <= end - 2
        case _:
            assert pair.min_idx <= j_rev < k_rev < end
    if pair.cap is not None:
        assert j_rev <= pair.cap
    if pair.rule == "dirichlet":
        assert j_rev >= pair.min_idx + 1


def test_uniform_pairs_without_and_with_a_cap():
    generator = np.random.default_rng(4)
    measured = shares([PairDraw().draw(5, None, generator) for _ in range(NUMBER)])
    assert len(measured) == 10
    for share in measured.values():
        close(share, 0.1)
    capped = [PairDraw(cap=2).draw(5, None, generator) for _ in range(NUMBER)]
    for j_rev in (1, 2):
        close(shares([5 - j for _, j in capped])[j_rev], 1 / 2)
        for k_rev in range(j_rev + 1, 6):
            close(shares(capped)[(5 - k_rev, 5 - j_rev)], 1 / 2 / (5 - j_rev))


def test_midpoint_pairs_are_uniform_in_their_own_index():
    generator = np.random.default_rng(5)
    ks = shares([PairDraw("midpoint").draw(6, None, generator)[0] for _ in range(NUMBER)])
    js = shares([PairDraw("midpoint_j").draw(6, None, generator)[1] for _ in range(NUMBER)])
    assert (sorted(ks), sorted(js)) == ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])
    for share in [*ks.values(), *js.values()]:
        close(share, 0.2)


def test_dirichlet_has_the_shares_mean_and_spread():
    """With 1000 indices rounding is small: j_rev / n is Beta(a, b + c) and (k_rev − j_rev) / n is Beta(b, a + c)."""
    generator, steps, (a, b, c) = np.random.default_rng(6), 1000, (2.5, 6.0, 2.0)
    pair = PairDraw("dirichlet", (a, b, c))
    draws = np.array([pair.draw(steps, None, generator) for _ in range(NUMBER)])
    total = a + b + c
    for measured, mine in (((steps - draws[:, 1]) / steps, a), ((draws[:, 1] - draws[:, 0]) / steps, b)):
        variance = mine * (total - mine) / (total**2 * (total + 1))
        assert abs(measured.mean() - mine / total) <= 5 * np.sqrt(variance / NUMBER) + 2 / steps
        assert measured.var() == pytest.approx(variance, rel=0.12)


def parts(shares, n):
    """Three lengths, step by step as method.md has it."""
    lengths = [round(n * p) for p in shares]
    lengths[shares.index(max(shares))] += n - sum(lengths)
    lengths = [max(length, 1) for length in lengths]
    lengths[lengths.index(max(lengths))] -= sum(lengths) - n
    return lengths


@pytest.mark.parametrize("n", range(3, 26))
def test_dirichlet_parts_are_rounded_as_the_paper_has_it(n):
    concentration = (1.2, 1.5, 1.0)
    for seed in range(200):
        low, cap = 1 + seed % 3, None if seed % 2 else 4 + seed % 5
        pair = PairDraw("dirichlet", concentration, cap, low, low + n)
        steps = n + low + 5
        k, j = pair.draw(steps, None, np.random.default_rng(seed))
        first, second, third = parts(np.random.default_rng(seed).dirichlet(concentration).tolist(), n)
        assert first + second + third == n
        if cap is not None:
            first = min(first, max(1, cap - low))
        assert (steps - j, steps - k) == (low + first, low + first + second)


def test_dirichlet_cap_keeps_the_gap_between_k_and_j():
    """Overflow of the first part goes to the third: the same draws with and without a cap have the same gap."""
    free, capped = (PairDraw("dirichlet", (2.5, 6.0, 2.0), cap=cap) for cap in (None, 4))
    cut = 0
    for seed in range(200):
        (k, j), (k_capped, j_capped) = (p.draw(25, None, np.random.default_rng(seed)) for p in (free, capped))
        assert j_capped - k_capped == j - k
        assert 25 - j_capped == min(25 - j, 4)
        cut += 25 - j > 4
    assert 50 < cut < 200


@pytest.mark.parametrize(
    ("method", "values", "drawn", "expected"),
    [
        ("refl", {"last_n_steps": 4}, lambda plan: plan.active[0].index, range(2, 6)),
        ("drtune", {"stop_ratio": 0.6}, lambda plan: plan.last_index, range(2, 6)),  # round(3.6) last ones
        ("randomised_truncation", {}, lambda plan: len(plan.active), range(1, 7)),
        ("randomised_truncation", {"least": 2, "most": 4}, lambda plan: len(plan.active), range(2, 5)),
        (
            "composed",
            {
                "reward_input": "posterior_mean",
                "stop_within": 3,
                "active": "last",
                "active_steps": 1,
                "weights": "euler",
                "bridge": "none",
            },
            lambda plan: plan.last_index,
            range(3, 6),
        ),
    ],
)
def test_stops_and_lengths_are_uniform(method, values, drawn, expected):
    made, sigmas, generator = METHODS[method].settings(**values), np.linspace(1, 0, 7), np.random.default_rng(8)
    measured = shares([drawn(METHODS[method].plan(made, sigmas, generator)) for _ in range(NUMBER)])
    assert sorted(measured) == list(expected)
    for share in measured.values():
        close(share, 1 / len(expected))


@properties
@given(st.integers(2, 12), st.integers(1, 12), st.integers(1, 12))
def test_split_counts(number, before, after):
    first, second = split_count(number, before, after)
    assert first + second == min(number, before + after)
    assert 1 <= first <= before
    assert 1 <= second <= after


def test_split_counts_round_half_to_even():
    assert split_count(5, 5, 5) == (2, 3)  # 2.5
    assert split_count(3, 6, 6) == (2, 1)  # 1.5
    assert split_count(4, 1, 24) == (1, 3)
    assert split_count(4, 24, 1) == (3, 1)


def test_split_indices_count_their_bias_from_each_segments_start():
    generator = np.random.default_rng(7)
    draws = [split_indices(4, 6, 9, 3, 2.0, generator) for _ in range(NUMBER)]  # 1 of {4, 5}, j = 6, 1 of {7, 8}
    assert all(i[1] == 6 for i in draws)
    close(shares([i[0] for i in draws])[5], 4 / 5)
    close(shares([i[2] for i in draws])[8], 4 / 5)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rule": "normal"}, "pair rule is 'normal'"),
        ({"min_idx": 0}, "min_idx is 0"),
        ({"max_idx": 2}, "max_idx is 2: it must be a whole number of at least 3"),
        ({"cap": 0}, "cap is 0"),
        ({"rule": "dirichlet", "concentration": (1.0, 1.0, 1.0), "cap": 1}, "cap is 1: it must be a whole number of at least 2"),
        ({"rule": "midpoint", "cap": 3}, "cap is 3: it must be null under the rule midpoint"),
        ({"rule": "dirichlet"}, "concentration is None: it must be three numbers"),
        ({"rule": "dirichlet", "concentration": (1.0, 0.0, 1.0)}, "concentration is 0.0"),
        ({"concentration": (1.0, 1.0, 1.0)}, "null under the rule uniform"),
    ],
)
def test_pairs_refuse(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        PairDraw(**values)
