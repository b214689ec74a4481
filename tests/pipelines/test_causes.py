"""What is below Ray's nested errors."""

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from flowbp_ray.rollouts.asking import GivenUpError
from pipelines import causes

DIED_PAGE = """A worker health check failed.
The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
\tpid: 1
\tip: 10.0.0.2
The actor is dead because its worker process has died. Some common causes include: …"""

SILENT_PAGE = """A worker health check failed.
Worker info: Worker(
  actor=Actor(RayTrainWorker, cb9aa9b8),
  metadata=ActorMetadata(hostname='vm', node_ip='10.0.0.2', pid=1))
The actor cb9aa9b8 is unavailable."""


def remote(error):
    """As Ray hands on what a task raised."""
    return RayTaskError("fit", "Traceback (most recent call last): ...", error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("prompts.jsonl, line 2: write one object a line"), "prompts.jsonl, line 2: write one object a line"),
        (remote(ValueError("too long")), "too long"),
        (remote(ControllerError(remote(ValueError("too long")))), "too long"),
        (remote(WorkerGroupError("", {0: RuntimeError("Connection closed by peer"), 1: ValueError("not finite")})), "not finite"),
        (KeyError("nothing"), "KeyError: 'nothing'"),
        (
            RuntimeError("Deploying failed:\nTraceback (most recent call last):\n  f()\nOSError: no model in x: y"),
            "no model in x: y",
        ),
        (RuntimeError(), "RuntimeError: "),
        (
            remote(WorkerGroupError("", {0: RuntimeError(DIED_PAGE)})),
            "the process of RayTrainWorker on 10.0.0.2 died",
        ),
        (
            remote(WorkerGroupError("", {0: RuntimeError(SILENT_PAGE)})),
            "the process of RayTrainWorker on 10.0.0.2 does not answer",
        ),
    ],
)
def test_one_sentence_for_whatever_went_wrong(error, sentence):
    assert causes.reason(error) == sentence


def test_the_sentence_is_the_one_that_was_written_and_not_what_caused_it():
    error = ValueError("state.json has no step: it is no checkpoint")
    error.__cause__ = KeyError("step")
    assert causes.reason(remote(error)) == "state.json has no step: it is no checkpoint"


def test_no_password_in_what_is_said():
    error = RuntimeError("API request to https://me:secret@mlflow/api failed")
    assert causes.reason(error) == "API request to https://me:***@mlflow/api failed"


DIED = ActorDiedError()
SILENT = WorkerHealthCheckFailedError("A worker health check failed.", failure=DIED)
CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize(
    ("error", "was_lost"),
    [
        (DIED, True),
        (remote(DIED), True),
        (remote(WorkerGroupError("", {0: DIED, 1: CLOSED})), True),
        (remote(WorkerGroupError("", {0: remote(DIED)})), True),
        (remote(ControllerError(DIED)), True),
        (remote(WorkerGroupError("", {0: SILENT})), True),
        (remote(WorkerGroupError("", {0: SILENT, 1: CLOSED})), True),
        (remote(WorkerGroupError("", {0: SILENT, 1: ValueError("bad")})), False),
        (remote(WorkerGroupError("", {0: GivenUpError("a judge failed 3 times: ConnectionError: refused")})), False),
        (remote(WorkerGroupError("", {0: ValueError("bad"), 1: CLOSED})), False),
        (remote(WorkerGroupError("", {0: remote(GivenUpError("the reward 'x' failed 3 times"))})), False),
        (remote(ControllerError(ValueError("bad"))), False),
        (ValueError("bad"), False),
        (FloatingPointError("not finite"), False),
    ],
)
def test_what_is_lost_and_what_would_go_wrong_again(error, was_lost):
    assert causes.lost(error) is was_lost
