"""Requests, without Serve. tests/serve has replicas that fail."""

from types import SimpleNamespace

import pytest
from ray.serve.exceptions import RequestCancelledError

from flowbp_ray.rollouts.asking import Request


def test_what_nobody_waits_for_any_more_is_not_asked_again():
    sent = []

    class Cancelled:
        def result(self, timeout_s):
            raise RequestCancelledError("its id")

    def remote(*arguments, avoid):
        sent.append(arguments)
        return Cancelled()

    request = Request(SimpleNamespace(draw=SimpleNamespace(remote=remote)), "draw", 1, what="sampling", prompts=["a cat"])
    with pytest.raises(RequestCancelledError):
        request.result()
    assert sent == [(1,)]
