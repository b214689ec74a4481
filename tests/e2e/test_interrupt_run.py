"""Ctrl-C, as a person gives it to the command."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flowbp_ray.config import load
from flowbp_ray.training.adapter import adapted
from pipelines.runs import Kept, unfinished

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "shapes" / "sparse.yaml"
OVERRIDES = (
    "train.batch=4",
    "train.micro_batch=4",
    "train.workers=1",
    "cluster.samplers=1",
    "train.checkpoint_every=1",
    "sampling.steps=4",
    "evaluation.before=false",
    "evaluation.preview_prompts=0",
)


def marked(mark):
    """Process numbers of all that descend from the command: they have its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, state = (folder / "environ").read_bytes(), (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it ended meanwhile, or is not ours
            continue
        if mark.encode() in environment and state != "Z":
            found.append(int(folder.name))
    return found


@pytest.mark.drill
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_and_a_usable_checkpoint(tmp_path, number):
    mark = f"interrupt-{uuid.uuid4().hex}"
    overrides = [*OVERRIDES, f"output={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    command = [sys.executable, "-m", "pipelines.align", str(CONFIG), *overrides]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"FLOWBP_TEST": mark}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, cwd=ROOT, env=environment, start_new_session=True) as run:
        until = time.monotonic() + 500
        config = load(CONFIG, overrides)
        while not any(Kept(config, f).newest for f in tmp_path.glob("runs/*")):
            assert run.poll() is None, run.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.2)
        # A terminal interrupts all of its foreground processes, `ray job stop` and `kill` the command alone.
        (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
        try:
            _, errors = run.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            run.kill()
            pytest.fail(f"it goes on after the interruption: {run.communicate()}")
    assert run.returncode == 1
    assert "interrupted: nothing runs any more; its last checkpoint, of " in errors
    assert "; the same command goes on with it" in errors
    assert "Traceback" not in errors
    until = time.monotonic() + 30
    while marked(mark):
        assert time.monotonic() < until, marked(mark)
        time.sleep(0.2)
    (folder,) = tmp_path.glob("runs/*")
    adapted(load(CONFIG, [*overrides, f"adapter.init_from={Kept(config, folder).newest.path}"]), "cpu")
    assert unfinished(config, [folder]) == folder
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("flowbp_ray")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "KILLED"
