"""Hypothesis strategies for worlds: random fields, grids, batches and guidance."""

from hypothesis import strategies as st
from literal import World

from flowbp_ray.surrogate.backward import Guidance

GUIDANCES = st.one_of(
    st.just(Guidance()),
    st.builds(Guidance, scale=st.floats(1.1, 6), detach_negative=st.booleans(), compensate=st.booleans()),
)
SEEDS = st.integers(0, 2**20)


def worlds(least=3, most=9):
    return st.builds(
        World,
        seed=SEEDS,
        increments=st.lists(st.floats(0.2, 1), min_size=least, max_size=most),
        guidance=GUIDANCES,
        batch=st.integers(1, 3),
    )
