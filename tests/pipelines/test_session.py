"""What several machines have to share, on a cluster of one; and what was lost when something is lost."""

from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from flowbp_ray.config import ConfigError, load
from flowbp_ray.rollouts.asking import GivenUpError
from pipelines import session

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


@pytest.fixture
def two(cluster, monkeypatch):
    """This machine, as if it were two."""
    (node,) = ray.nodes()
    nodes = [node | {"NodeManagerHostname": name} for name in ("one", "two")]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    return {n["NodeManagerHostname"]: n["NodeID"] for n in nodes}


def test_several_machines_need_a_tracking_server_and_a_folder_that_all_see(two, tmp_path, monkeypatch):
    local = load(SPARSE, [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"output={tmp_path}/runs"])
    with pytest.raises(ConfigError, match=r"the cluster has 2 machines, and MLflow's store is sqlite:.*: start an MLflow server"):
        session.check_machines(local)
    served = load(SPARSE, ["tracking.uri=http://mlflow:5000", f"output={tmp_path}/runs"])
    session.check_machines(served)
    assert session.blind_to(tmp_path, two) == []
    monkeypatch.setattr(session, "blind_to", lambda folder, machines: ["two"])
    with pytest.raises(ConfigError, match=r"two cannot see .*/runs: set output to a folder that all machines share"):
        session.check_machines(served)


def test_a_machine_that_does_not_see_a_folder_is_found(two, tmp_path, monkeypatch):
    monkeypatch.setattr(session.os.path, "exists", lambda path: False)
    assert session.blind_to(tmp_path, two) == ["one", "two"]


def remote(error):
    """As Ray hands on what a task raised."""
    return RayTaskError("fit", "Traceback (most recent call last): ...", error).as_instanceof_cause()


DIED = ActorDiedError()
SILENT = WorkerHealthCheckFailedError("A worker health check failed.", failure=DIED)
CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize(
    ("error", "lost"),
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
def test_what_is_lost_and_what_would_go_wrong_again(error, lost):
    assert session.lost(error) is lost
