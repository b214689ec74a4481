"""What is below Ray's nested errors: one sentence of it, and whether it is only that something was lost."""

import re
import sys
from collections.abc import Callable

from ray.exceptions import RayError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from torch.distributed import DistError

from flowbp_ray.tracking.store import masked


def inside(error: BaseException) -> list[BaseException]:
    """The errors that an error of Ray's is around."""
    match error:
        case RayTaskError():
            found = [error.cause]
        case WorkerGroupError():
            found = list(error.worker_failures.values())
        case ControllerError():
            found = [error.controller_failure]
        case _:
            found = [error.__cause__] if type(error).__module__.partition(".")[0] == "ray" else []
    return [e for e in found if isinstance(e, BaseException) and e is not error]


def lost(error: BaseException) -> bool:
    """Whether all that went wrong is that a process or machine was lost: what a new attempt may not meet."""
    if wrapped := inside(error):
        return all(map(lost, wrapped))
    # Workers whose group has lost one say so: NCCL by its own error, gloo of a connection that was closed or reset.
    if isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return True
    # Ray Train's own words are of workers that do not answer, or that are taken away.
    of_train = type(error).__module__.startswith("ray.train")
    return of_train or (isinstance(error, RayError) and not isinstance(error, RayTaskError))


def reason(error: BaseException) -> str:
    """The sentence below nested errors and remote tracebacks, without passwords."""
    # A worker that lost another one says so, and not why that one ended.
    if wrapped := sorted(inside(error), key=lambda e: "onnection" in str(e)):
        return reason(wrapped[0])
    text = masked(str(error).strip())
    # Ray's pages of what it knows of an actor.
    if died := re.search(r"class_name: (\w+).*?ip: (\S+)", text, re.DOTALL):
        return f"the process of {died[1]} on {died[2]} died"
    if silent := re.search(r"Actor\((\w+),.*?node_ip='([^']+)'", text, re.DOTALL):
        return f"the process of {silent[1]} on {silent[2]} does not answer"
    if "Traceback (most recent call last)" in text or "ray::" in text:  # of an actor that failed as it was made
        name, _, said = text.splitlines()[-1].strip().partition(": ")
        return said if said and " " not in name else text.splitlines()[-1].strip()
    return text if text and not isinstance(error, LookupError) else f"{type(error).__name__}: {text}"


def clean_up(what: str, do: Callable[[], object]) -> None:
    """Do it; where that fails, say so, and let what came before be the error."""
    try:
        do()
    except Exception as error:
        print(f"could not {what}: {reason(error)}", file=sys.stderr)
