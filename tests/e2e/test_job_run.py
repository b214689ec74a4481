"""The README's cluster, command by command: a head with token authentication, and jobs that are submitted, stopped and go on."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from flowbp_ray.config import load
from pipelines.runs import Kept

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = (
    "train.batch=4",
    "train.micro_batch=2",
    "train.checkpoint_every=1",
    "sampling.steps=4",
    "surrogate.active_steps=2",
    "evaluation.per_task=1",
    "evaluation.before=false",
    "evaluation.preview_prompts=0",
    "cluster.samplers=1",
    "cluster.sampler_cpus=0.3",
    "cluster.trainer_cpus=0.3",
    "cluster.reward_cpus=0.3",
)


def readme_commands():
    """What stands below the README's heading, without comments."""
    section = (ROOT / "README.md").read_text("utf-8").partition("## On a cluster\n")[2]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)[1]
    return [line.partition("  #")[0].strip() for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    """A shell of an account that never had Ray: its commands share one environment, and a home of their own."""
    home = tmp_path_factory.mktemp("home")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(*commands, timeout=600, check=True):
        script = "set -e\n" + "\n".join(commands)
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=timeout
        )
        if check:
            assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    run.home = home
    yield run
    run("ray stop --force", check=False)


def test_the_readmes_commands_twice_in_a_row_and_a_job_that_is_stopped(account):
    commands = readme_commands()
    assert commands[0] == "source .venv/bin/activate"
    assert commands[-1] == "ray stop"
    start = next(i for i, c in enumerate(commands) if c.startswith("ray start"))
    submit = next(c for c in commands if c.startswith("ray job submit"))
    exports = [c for c in commands if c.startswith("export")]
    assert not (account.home / ".ray").exists()
    account(*commands[1 : start + 1])
    assert (account.home / ".ray" / "auth_token").exists()
    without = account(submit, check=False)  # without the exported mode, as a new shell
    assert without.returncode != 0

    short = f"{submit} train.steps=2 {' '.join(SMALL)}"
    first = account(*exports, short)
    assert "| **mean** |" in first.stdout
    # Whatever a run of this account has left, such as a token, the same commands work again.
    again = account(*exports, short)
    assert "| **mean** |" in again.stdout
    runs = account.home / ".flowbp_ray" / "runs"
    assert len(list(runs.iterdir())) == 2
    assert (account.home / ".flowbp_ray" / "mlflow.db").exists()

    named = submit.replace("ray job submit", "ray job submit --no-wait --submission-id stopped")
    longer = f"{named} train.steps=500 {' '.join(SMALL)}"
    account(*exports, longer)
    until = time.monotonic() + 400
    (folder,) = wait_for(lambda: [f for f in runs.iterdir() if is_of(f, 500)], until)
    kept = Kept(load(folder / "config.yaml", []), folder)
    wait_for(lambda: kept.steps >= 2, until)
    account(*exports, "ray job stop stopped")
    log = account(*exports, "ray job logs stopped").stdout
    assert "interrupted: nothing runs any more; its last checkpoint, of " in log
    assert "the same command goes on with it" in log
    reached = kept.steps
    account(*exports, longer.replace("id stopped", "id again"))
    wait_for(lambda: kept.steps > reached, time.monotonic() + 400)
    assert "going on with the run in" in account(*exports, "ray job logs again").stdout
    account(*exports, "ray job stop again")
    account(*exports, commands[-1])


def is_of(folder, steps):
    config = folder / "config.yaml"
    return config.exists() and yaml.safe_load(config.read_text("utf-8"))["train"]["steps"] == steps


def wait_for(found, until):
    while not (value := found()):
        assert time.monotonic() < until
        time.sleep(0.5)
    return value
