"""The reward application of a command, whatever becomes of it."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import serve
from ray.serve.schema import ApplicationStatus

from flowbp_ray.config import ConfigError, load
from flowbp_ray.rollouts.stages import service
from pipelines.causes import reason
from pipelines.rewarding import rewarding, wait_for

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


def status():
    there = next((of for name, of in serve.status().applications.items() if name.startswith("rewards-")), None)
    return there and there.status


def wait_until(wanted):
    until = time.monotonic() + 120
    while status() not in wanted:
        assert time.monotonic() < until, status()
        time.sleep(0.05)


def test_deleted_again_while_it_is_started_again_it_comes_back_and_is_gone_at_the_end(cluster, capsys, tmp_path, monkeypatch):
    config = load(SPARSE, ["cluster.reward_cpus=0.1"])
    with rewarding(config, tmp_path) as name:
        wait_for(config, name)
        # Not waited for: Serve looks once a second whether it is gone, and by then it may be there again.
        serve.delete(name, _blocking=False)
        wait_until({ApplicationStatus.DEPLOYING})
        serve.delete(name, _blocking=False)
        wait_until({ApplicationStatus.RUNNING})
        assert service(name).describe.remote().result(timeout_s=60)["components"].keys() == {"preference", "judge"}
        # Another command of the same folder leaves it alone.
        monkeypatch.setattr("pipelines.rewarding.time", SimpleNamespace(sleep=lambda seconds: None))
        with pytest.raises(ConfigError, match="another driver on this cluster has the application"), rewarding(config, tmp_path):
            pass
        assert status() == ApplicationStatus.RUNNING
    assert status() is None
    assert capsys.readouterr().err.count("is gone: starting it again") == 2


def test_one_that_cannot_start_says_why(cluster, tmp_path):
    config = load(SPARSE, ["cluster.reward_cpus=0.1"])
    component = config.reward.components[0].model_copy(update={"kind": "function", "path": "math:no_such_reward"})
    broken = config.model_copy(update={"reward": config.reward.model_copy(update={"components": (component,)})})
    with pytest.raises(RuntimeError) as caught, rewarding(broken, tmp_path) as name:
        wait_for(broken, name)
    assert "no_such_reward" in reason(caught.value)
    assert len(reason(caught.value).splitlines()) == 1
    assert status() is None
