"""The order in which a train worker fetches and works."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from flowbp_ray.training.worker import one_ahead


def blocks(fetched, number):
    for n in range(number):
        fetched.append(n)
        yield {"step": n}


def test_the_next_block_is_fetched_while_one_is_worked_on_and_none_of_the_next_step():
    fetched, waiting = [], threading.Event()

    def coming():
        yield from blocks(fetched, 2)
        waiting.wait(10)
        yield from blocks(fetched, 2)

    stream = coming()
    with ThreadPoolExecutor(1) as fetching:
        step = one_ahead(stream, 3, fetching)
        assert next(step) == {"step": 0}
        assert next(step) == {"step": 1}  # though the third is not there
        waiting.set()
        assert next(step) == {"step": 0}
        assert next(step, "end") == "end"
        assert fetched == [0, 1, 0]
        assert list(one_ahead(stream, 2, fetching)) == [{"step": 1}, None]


def test_what_goes_wrong_in_the_stream_is_raised_where_the_block_is_asked_for():
    def broken():
        yield {"step": 0}
        raise OSError("the stage died")

    with ThreadPoolExecutor(1) as fetching:
        step = one_ahead(broken(), 2, fetching)
        assert next(step) == {"step": 0}
        with pytest.raises(OSError, match="the stage died"):
            next(step)
