"""What the stream of rollouts is without one of the parts that make it faster: the "before" of each, for `pipelines.scale`."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

from ray.data import ExecutionOptions
from ray.data._internal.execution.execution_callback import ExecutionCallback

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts import stream
from pipelines import session


@dataclass(frozen=True)
class Part:
    """One of them: what it is, and what is there without it."""

    what: str
    instead: str
    #: While it is left out.
    left_out: Callable[[], contextlib.AbstractContextManager[object]]


AT_HAND = stream.at_hand


def other_at_hand(config: AlignConfig) -> int:
    """One instead of two, two instead of one."""
    return 3 - AT_HAND(config)


def by_machine(**options: bool) -> ExecutionOptions:
    """As given, but that a process on a micro-batch's own machine gets it."""
    return ExecutionOptions(**options | {"actor_locality_enabled": True})


@contextlib.contextmanager
def sizes_by_thread() -> Iterator[None]:
    """As Ray Data has it."""
    with patch.dict(session.PROMPT, {"RAY_DATA_METADATA_PREFETCH_ON_THREAD": "1"}):
        yield


PARTS = {
    "looks": Part(
        "Ray Data's executor looks when something is done",
        "each 0.1 s",
        lambda: patch.object(stream, "AtOnce", ExecutionCallback),
    ),
    "sizes": Part("the executor asks for the size of what a stage made itself", "a thread asks", sizes_by_thread),
    "rewards": Part(
        "a process of rewards has four micro-batches at hand",
        "one",
        lambda: patch.object(stream, "REWARDS_AT_HAND", 1),
    ),
    "samplers": Part(
        "a sampler has its next micro-batch at hand at lag 1, and where there are others none at lag 0",
        "the other way round",
        lambda: patch.object(stream, "at_hand", other_at_hand),
    ),
    "room": Part(
        "a micro-batch goes to the process that has least to do",
        "to one on its own machine",
        lambda: patch.object(stream, "ExecutionOptions", by_machine),
    ),
}
