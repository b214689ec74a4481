"""What every command has on a Ray cluster: the connection, an MLflow run, the rewards, and one sentence for what goes wrong."""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from flowbp_ray.config import AlignConfig, ConfigError, dump
from flowbp_ray.rollouts.stages import service
from flowbp_ray.tracking.store import tracking_uri
from flowbp_ray.tracking.tracker import Tracker
from serve.rewards import application, description


def connect(config: AlignConfig) -> None:
    """Join the cluster of RAY_ADDRESS (every Ray job has it), else start one here. ConfigError if it is too small."""
    variables = {"OMP_NUM_THREADS": str(config.cluster.threads), "TRANSFORMERS_VERBOSITY": "error"}
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {}).get("env_vars", {})
    quiet = {"env_vars": {k: v for k, v in variables.items() if k not in job}}  # Ray refuses what a job has set itself
    for library in ("ray.serve", "ray.data"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env=quiet, log_to_driver=False, logging_level="error")
    else:
        # Logical CPUs: on a laptop the processes take turns. One more than is there would be waited for, for ever.
        cpus = max(os.cpu_count() or 1, math.ceil(config.reserved()["CPU"]))
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, runtime_env=quiet, log_to_driver=False, logging_level="error"
        )
        # Handles only. A cluster's Serve is left as it is, or as it starts by itself: others use it too, over HTTP.
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    there = ray.cluster_resources()
    for kind, number in config.reserved().items():
        if number > there.get(kind, 0):
            raise ConfigError(
                f"the processes of this configuration need {number:g} {kind}s: the cluster has {there.get(kind, 0):g}"
            )


@contextlib.contextmanager
def cluster(config: AlignConfig) -> Iterator[None]:
    """A connected cluster; at the end a local one is gone, and a joined one goes on without this driver."""
    try:
        connect(config)
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Session:
    """What one MLflow run has at hand on the cluster: the tracker, the name of its reward application, what a person is told."""

    tracker: ActorHandle
    rewards: str
    info: dict[str, str]


def quiet_streams() -> None:
    """Have Ray Data hand on blocks and errors as they are, and say nothing."""
    data = DataContext.get_current()
    data.enable_progress_bars = False
    data.issue_detectors_config.detectors = []  # advice for whoever writes a pipeline, not for who runs this one
    data.target_max_block_size = None  # a block is a micro-batch, however large
    data.raise_original_map_exception = True  # else what a stage says of bad input is lost among Ray's errors


@contextlib.contextmanager
def session(config: AlignConfig, folder: Path) -> Iterator[Session]:
    """An MLflow run, the new ``folder`` and the rewards, served. Whatever happens, nothing of it goes on running afterwards."""
    if config.prompts.embeds:
        from flowbp_ray.rollouts import embeds  # with diffusers, which takes seconds

        embeds.check(config)
    quiet_streams()
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    uri = tracking_uri(config.tracking.uri)
    tracker = (
        ray.remote(Tracker)
        .options(num_cpus=0, scheduling_strategy=on_this_node())
        .remote(uri, config.tracking.experiment, config.tracking.run_name, config.model_dump(mode="json"))
    )
    info: dict[str, str] = ray.get(tracker.info.remote())
    own, status = f"rewards-{info['run_id'][:8]}", "FAILED"
    try:
        print(f"MLflow run {info['run_id']}, files in {folder}")
        yield Session(tracker, serve_rewards(config, own), info)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        # The quick one first: `ray job stop` leaves three seconds.
        clean_up("end the MLflow run", lambda: ray.get(tracker.finish.remote(status), timeout=60))
        remove_rewards(config, own)


def serve_rewards(config: AlignConfig, own: str) -> str:
    """The name of the application that scores: the running one of the configuration, or a new one of the name ``own``."""
    if config.reward.application:
        check_application(config, config.reward.application)
        return config.reward.application
    serve.run(application(config), name=own, route_prefix=None)
    return own


def remove_rewards(config: AlignConfig, own: str) -> None:
    """End what `serve_rewards` started."""
    if not config.reward.application:
        clean_up("remove the reward service", lambda: serve.delete(own))


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


def clean_up(what: str, do: Callable[[], object]) -> None:
    """Do it; where that fails, say so, and let what came before be the error."""
    try:
        do()
    except Exception as error:
        print(f"could not {what}: {reason(error)}", file=sys.stderr)


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For what needs the driver's own disk."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def progress(total: int, what: str, unit: str) -> tqdm:
    """A bar; in a log, where each state of it is a line of its own, it moves twice a minute."""
    return tqdm(total=total, desc=what, unit=unit, mininterval=0.5 if sys.stderr.isatty() else 30)


def reason(error: BaseException) -> str:
    """The sentence below Ray's nested errors and remote tracebacks."""
    failures = list(getattr(error, "worker_failures", {}).values())
    # A worker that lost another one says so, and not why that one ended.
    failures.sort(key=lambda failure: "onnection" in str(failure))
    wrapped = failures[0] if failures else getattr(error, "controller_failure", None) or getattr(error, "cause", None)
    if wrapped is None and type(error).__module__.partition(".")[0] == "ray":
        wrapped = error.__cause__
    if isinstance(wrapped, BaseException) and wrapped is not error:
        return reason(wrapped)
    text = str(error).strip()
    if "Traceback (most recent call last)" in text or "ray::" in text:  # of an actor that failed as it was made
        name, _, said = text.splitlines()[-1].strip().partition(": ")
        return said if said and " " not in name else text.splitlines()[-1].strip()
    return text if text and not isinstance(error, LookupError) else f"{type(error).__name__}: {text}"
