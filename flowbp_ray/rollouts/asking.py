"""Requests to deployments on Ray Serve that outlive a replica: what fails in one is asked of another.

Serve itself sends no request twice. A replica that died is replaced by Serve, and one that fails or gives no answer is avoided.
"""

import contextlib
import functools
import inspect
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from flowbp_ray.errors import DeadRewardError

TRIES = 3
ANSWER_WITHIN = 600.0  # seconds, for one batch
BACK_WITHIN = 180.0  # seconds, for an application that is gone as a whole, which whoever runs it may start again


class AvoidedError(RuntimeError):
    """This replica is not asked again."""


class ReplicaFailedError(RuntimeError):
    """What failed, and in which replica; ``complete`` if it says all that there is to say."""

    def __init__(self, replica: str, said: str, complete: bool) -> None:
        super().__init__(replica, said, complete)
        self.replica, self.said, self.complete = replica, said, complete


class GivenUpError(RuntimeError):
    """A request failed as often as it is tried; the text says which and why."""


def answering(method: Callable[..., Any]) -> Callable[..., Any]:
    """A replica's method, plain or a coroutine's, that `Request` can ask.

    ValueError, of bad input, goes to the asker as it is: it would be the same in every replica. Called without ``avoid``, as in
    one's own process, it is the plain method.
    """
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def answer_later(self: Any, *arguments: Any, avoid: Sequence[str] | None = None) -> Any:
            if avoid is None:
                return await method(self, *arguments)
            with _telling_which(avoid):
                return await method(self, *arguments)

        return answer_later

    @functools.wraps(method)
    def answer(self: Any, *arguments: Any, avoid: Sequence[str] | None = None) -> Any:
        if avoid is None:
            return method(self, *arguments)
        with _telling_which(avoid):
            return method(self, *arguments)

    return answer


@contextlib.contextmanager
def _telling_which(avoid: Sequence[str]) -> Iterator[None]:
    """Refuse in a replica that is to be avoided; say which one it was if something fails."""
    replica = serve.get_replica_context().replica_id.unique_id
    if replica in avoid:
        raise AvoidedError(replica)
    try:
        yield
    except (ValueError, GivenUpError):
        raise
    except DeadRewardError as error:
        raise ReplicaFailedError(replica, str(error), complete=True) from error
    except Exception as error:  # of models and libraries, which may raise anything
        raise ReplicaFailedError(replica, f"{type(error).__name__}: {error}", complete=False) from error


class Request:
    """A call that is under way from when this is made; ``what`` and the prompts name it where it fails."""

    def __init__(
        self,
        handle: DeploymentHandle,
        method: str,
        *arguments: Any,
        what: str,
        prompts: Sequence[str],
        within: float = ANSWER_WITHIN,
    ) -> None:
        self.send = lambda avoid: getattr(handle, method).remote(*arguments, avoid=avoid)
        self.what, self.prompts, self.within = what, prompts, within
        self.response = self.send([])

    def result(self) -> Any:
        """The answer. ValueError for bad input; GivenUpError, one sentence, after `TRIES` failures."""
        failures: list[str] = []
        complete = True
        avoided: list[str] = []
        turns = 0
        gone_since: float | None = None
        while True:
            try:
                return self.response.result(timeout_s=self.within)
            except TimeoutError:
                self.response.cancel()
                failures.append(f"no answer within {self.within:g} s")
                complete = False
            except DeploymentUnavailableError:
                now = time.monotonic()
                gone_since = now if gone_since is None else gone_since
                if now - gone_since > BACK_WITHIN:
                    failures.append(f"its application is gone, and was not started again within {BACK_WITHIN:g} s")
                    raise GivenUpError(self._said(failures)) from None
                time.sleep(1)
            except RequestCancelledError:
                raise  # nobody waits for the answer any more
            except RayServeException as error:
                failures.append(f"no replica takes it: {error}")
                complete = False
            except RayError as error:  # a replica's own error, or what happened to the replica
                cause = error.cause if isinstance(error, RayTaskError) else error
                if isinstance(cause, AvoidedError) and turns < 50:
                    turns += 1  # the others may all be busy
                    time.sleep(0.1)
                elif isinstance(cause, AvoidedError):
                    avoided = []  # there is no other
                elif isinstance(cause, ReplicaFailedError):
                    failures.append(cause.said)
                    complete &= cause.complete
                    avoided.append(cause.replica)
                elif isinstance(cause, RayError):
                    failures.append(f"the replica is gone: {str(cause).splitlines()[0]}")
                    complete = False
                else:
                    raise cause from None
            if len(failures) == TRIES:
                said = "; ".join(dict.fromkeys(failures))
                raise GivenUpError(f"{said} ({TRIES} tries)" if complete else self._said(failures))
            self.response = self.send(avoided)

    def _said(self, failures: list[str]) -> str:
        some = textwrap.shorten(", ".join(map(repr, self.prompts)), 300, placeholder=" …")
        times = f"{len(failures)} times" if len(failures) > 1 else "once"
        return f"{self.what} failed {times} for the prompts {some}: {'; '.join(dict.fromkeys(failures))}"
