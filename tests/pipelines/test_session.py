"""What several machines have to share, on a cluster of one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from flowbp_ray.config import ConfigError, load
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


def test_ray_datas_executor_asks_at_once():
    """Ray's name for it is none that is documented."""
    asked = "from ray.data._internal.execution.metadata_fetcher import make_metadata_fetcher as m; print(type(m()).__name__)"
    run = [sys.executable, "-c", asked]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | session.PROMPT)
    assert done.stdout.strip() == "InlineMetadataFetcher"


def test_a_submitted_job_keeps_nothing_in_its_temporary_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://package.zip"}}')
    with pytest.raises(ConfigError, match=rf"output is {tmp_path}/runs, in the temporary copy of the working directory"):
        session.connect(load(SPARSE, ["output=runs"]))


def test_a_machine_that_does_not_see_a_folder_is_found(two, tmp_path, monkeypatch):
    monkeypatch.setattr(session.os.path, "exists", lambda path: False)
    assert session.blind_to(tmp_path, two) == ["one", "two"]


def test_a_command_on_a_cluster_ends_by_sigterm_as_by_ctrl_c(monkeypatch):
    """Whichever it is: `ray job stop` sends it, and ray.init takes it for itself."""
    monkeypatch.setattr(session, "connect", lambda config: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt), session.cluster(load(SPARSE, [])):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
