"""The reward application of a command: started, started again when it is gone, and ended with the command however that ends."""

import contextlib
import hashlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve.schema import ApplicationStatus, DeploymentStatus

from flowbp_ray.config import AlignConfig, ConfigError
from flowbp_ray.rollouts.stages import service
from pipelines.causes import clean_up
from serve.rewards import OWNERS, application, description


@contextlib.contextmanager
def rewarding(config: AlignConfig, folder: Path) -> Iterator[str]:
    """The name of the application that scores: the running one of the configuration, or one of its own for the ``folder`` of a
    command. This is started again whenever it is gone, and removed at the end; it may still be starting, which `wait_for` is
    for. ConfigError if another command has it.
    """
    if config.reward.application:
        check_application(config, config.reward.application)
        yield config.reward.application
        return
    own = f"rewards-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    owner = make_owner(own)  # the handle is what keeps it
    try:
        if own in serve.status().applications:
            serve.delete(own)  # of a driver that was killed
        start(config, own)
        ended = threading.Event()
        watch = threading.Thread(target=revive, args=(config, own, ended), daemon=True)
        watch.start()
        try:
            yield own
        finally:
            ended.set()
            watch.join(timeout=10)  # else what it starts just now would be there again after it was removed
    finally:
        clean_up("remove the reward service", lambda: serve.delete(own))
        ray.kill(owner)  # what is left of it ends by itself


def make_owner(name: str) -> ActorHandle:
    """The owner of an application; ConfigError if it has one that does not go away, as a killed driver's does in seconds."""

    class Owner:  # here, it is sent to its process as it is, which imports nothing for it
        """Dies with the driver, however that ends, and lets its reward application know."""

    for _ in range(60):
        try:
            return ray.remote(Owner).options(name=name, namespace=OWNERS, num_cpus=0, max_restarts=-1).remote()
        except ValueError:
            time.sleep(0.5)
    raise ConfigError(f"another driver on this cluster has the application {name}: wait for it or stop it")


def start(config: AlignConfig, own: str) -> None:
    """Have the application started. Not by `serve.run`: it would wait for ever for one that is deleted as it starts."""
    target = serve.RunTarget(application(config, own), name=own, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def wait_for(config: AlignConfig, own: str) -> None:
    """Return when the application of `rewarding` runs; RuntimeError, with Serve's message, if it cannot."""
    while config.reward.application is None:  # that one runs
        there = serve.status().applications.get(own)  # None where it was deleted, and `revive` starts it again
        if there and there.status == ApplicationStatus.RUNNING:
            return
        if there and there.status == ApplicationStatus.DEPLOY_FAILED:
            said = [d.message for d in there.deployments.values() if d.status == DeploymentStatus.DEPLOY_FAILED]
            raise RuntimeError("\n".join(said) or there.message)
        time.sleep(0.1)


def revive(config: AlignConfig, own: str, ended: threading.Event) -> None:
    """Start the reward application again whenever it is gone as a whole; its parts are Ray Serve's business."""
    while not ended.wait(2):
        try:
            if own not in serve.status().applications and not ended.is_set():
                print(f"the reward application {own} is gone: starting it again", file=sys.stderr)
                start(config, own)
        except Exception as error:  # Serve's controller may be gone too, for a while: it is asked again
            logging.getLogger(__name__).debug("the reward application cannot be looked after: %s", error)


def check_application(config: AlignConfig, name: str) -> None:
    """ConfigError unless an application of the name runs here and scores as the configuration says."""
    running = serve.status().applications
    if name not in running:
        raise ConfigError(f"reward.application is {name!r}, but on this cluster Ray Serve runs {', '.join(running) or 'none'}")
    theirs, ours = service(name).describe.remote().result(timeout_s=60), description(config.model, config.reward)
    for key in ("decoder", "model"):
        if theirs[key] != ours[key]:
            raise ConfigError(f"the reward application {name!r} has the {key} {theirs[key]}, this configuration {ours[key]}")
    for component, what in ours["components"].items():
        if theirs["components"].get(component) != what:
            there = theirs["components"].get(component, "none of that name")
            raise ConfigError(f"the component {component!r} is {what}, and in the reward application {name!r} {there}")
