"""A real MLflow server: one that is killed in the middle of a run and comes back, and one that goes by another name."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from mlflow import MlflowClient

from flowbp_ray.tracking import tracker
from flowbp_ray.tracking.store import check_server
from flowbp_ray.tracking.tracker import Tracker

pytestmark = pytest.mark.drill

CONFIG = {"model": {"path": "shapes"}, "surrogate": {"method": "sparse"}, "tracking": {"uri": None}}


class Server:
    def __init__(self, folder, *more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        self.command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
        self.command += more
        self.start()

    def start(self):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, **quiet, start_new_session=True)
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.3)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    one = Server(tmp_path)
    yield one
    one.kill()


def test_training_goes_on_without_it_and_it_gets_every_point_once_in_the_end(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracker, "AGAIN", 0.5)
    (tmp_path / "run").mkdir()
    check_server(server.uri)
    one = Tracker(server.uri, "tests", None, CONFIG, tmp_path / "run")
    picture = np.full((1, 8, 8, 3), 7, np.uint8)
    for step in range(9):
        if step == 3:
            server.kill()
            with pytest.raises(OSError, match=r"the MLflow server http://127.0.0.1:\d+ does not answer .*: start it, or set"):
                check_server(server.uri)
        if step == 4:  # another one comes in the place of a tracker that died
            one = Tracker(server.uri, "tests", None, CONFIG, tmp_path / "run")
        if step == 6:
            server.start()
            time.sleep(1)
        one.metrics({"objective": step / 10, "seconds/step": 1.0}, step)
        if step in (0, 4, 8):
            one.previews(["a red ring"], picture, step)
    one.finish("FINISHED")
    client = MlflowClient(server.uri)
    history = client.get_metric_history(one.run.run_id, "objective")
    assert [(p.step, p.value) for p in history] == [(step, step / 10) for step in range(9)]
    assert {f.path.split("+")[2] for f in client.list_artifacts(one.run.run_id, "images")} == {"0", "4", "8"}
    assert client.get_run(one.run.run_id).info.status == "FINISHED"
    assert len(one.warnings()) >= 1


def test_a_server_that_refuses_this_name_is_no_server(tmp_path):
    other = Server(tmp_path, "--allowed-hosts", "mlflow.example.org:5000")
    with pytest.raises(OSError, match=r"the MLflow server http://127.0.0.1:\d+ refuses \(403 Invalid Host.*--allowed-hosts"):
        check_server(other.uri)
    other.kill()
