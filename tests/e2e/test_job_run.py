"""The README's cluster, command by command: a head with token authentication, and jobs that are submitted, stopped and go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from flowbp_ray.config import load
from pipelines.runs import Kept

pytestmark = [
    pytest.mark.drill,
    pytest.mark.skipif(not Path("/proc").exists(), reason="the driver is found in /proc"),
]

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
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "FLOWBP_TOKEN": "secret"}

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
    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{account.home}/other.db", "OMP_NUM_THREADS": "1"}
    variables |= {"PYTHONPATH": "tests", "OF_A_JOB": "yes"}  # which this reward's process has to have
    own = "reward.components.0.kind=function reward.components.0.path=odd_rewards:of_a_job"
    submitted = short.replace(" --working-dir", f" --runtime-env-json '{json.dumps({'env_vars': variables})}' --working-dir")
    again = account(*exports, f"{submitted} {own}")
    assert "| **mean** |" in again.stdout
    assert (account.home / "other.db").exists()  # what the job's environment says reaches its processes
    runs = account.home / ".flowbp_ray" / "runs"
    assert len(list(runs.iterdir())) == 2
    assert (account.home / ".flowbp_ray" / "mlflow.db").exists()

    refused = account(*exports, f"{submit} cluster.sampler_gpus=1", check=False)
    assert refused.returncode != 0
    assert "failed with exit code 2" in refused.stdout + refused.stderr
    assert "the processes of this configuration need 2 GPUs: the cluster has 0" in refused.stdout + refused.stderr

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
    # A driver that is killed takes its reward application with it, whoever comes next.
    (driver,) = drivers(account.home)
    assert "rewards-" in account(*exports, "serve status").stdout
    os.kill(driver, signal.SIGKILL)
    wait_for(lambda: "rewards-" not in account(*exports, "serve status").stdout, time.monotonic() + 120)
    reached = kept.steps
    account(*exports, longer.replace("id stopped", "id third"))
    wait_for(lambda: kept.steps > reached, time.monotonic() + 400)
    account(*exports, "ray job stop third")

    # The reward service of the same cluster, over HTTP.
    account(*exports, "serve deploy configs/serve/rewards.yaml")
    wait_for(lambda: running(account(*exports, "serve status").stdout), time.monotonic() + 300)
    answer = score("secret")
    assert set(answer["scores"][0]) == {"preference", "judge"}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        score("other")
    account(*exports, commands[-1])

    # The same where `make demo`, which runs this, was there first, and twice in a row.
    demo = f"export HOME={account.home}/demo"
    account(demo, "mkdir $HOME", f"python -m pipelines.align configs/shapes/sparse.yaml train.steps=2 {' '.join(SMALL)}")
    account(demo, *commands[1 : start + 1])
    for _ in range(2):
        assert "| **mean** |" in account(demo, *exports, short).stdout
    account(demo, *exports, commands[-1])
    assert len(list((account.home / "demo" / ".flowbp_ray" / "runs").iterdir())) == 3


def running(status):
    """Whether `serve status` says that the reward service and its deployments are there."""
    return yaml.safe_load(status)["applications"].get("rewards", {}).get("status") == "RUNNING"


def score(token):
    """What the service answers of a picture."""
    picture = (ROOT / "docs" / "before_after.png").read_bytes()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "image/png"}
    url = "http://127.0.0.1:8000/rewards/v1/score?prompt=a%20red%20ring"
    with urllib.request.urlopen(urllib.request.Request(url, picture, headers), timeout=120) as response:
        return json.load(response)


def drivers(home):
    """The align commands of an account."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue  # it ended meanwhile, or is not ours
        if b"\0-m\0pipelines.align" in command and f"HOME={home}\0".encode() in environment:
            found.append(int(folder.name))
    return found


def is_of(folder, steps):
    config = folder / "config.yaml"
    return config.exists() and yaml.safe_load(config.read_text("utf-8"))["train"]["steps"] == steps


def wait_for(found, until):
    while not (value := found()):
        assert time.monotonic() < until
        time.sleep(0.5)
    return value
