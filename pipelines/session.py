"""What every command has on a Ray cluster: the connection, an MLflow run, the rewards, and one sentence for what goes wrong."""

import contextlib
import json
import logging
import math
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.data import DataContext
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed import DistError
from tqdm import tqdm

from flowbp_ray.config import AlignConfig, ConfigError
from flowbp_ray.rollouts.stages import service
from flowbp_ray.tracking.store import tracking_uri
from flowbp_ray.tracking.tracker import Tracker
from pipelines import runs
from serve.rewards import OWNERS, application, description


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
    check_machines(config)


def check_machines(config: AlignConfig) -> None:
    """ConfigError where a cluster of several machines does not share what a run leaves. A submitted job's driver is on one of
    them, and which one may be another when the job goes on."""
    machines = {node["NodeManagerHostname"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    if len(machines) == 1:
        return
    uri = tracking_uri(config.tracking.uri)
    if uri.startswith("sqlite"):
        raise ConfigError(
            f"the cluster has {len(machines)} machines, and MLflow's store is {uri}, a file on one of them: start an MLflow "
            "server, and set tracking.uri or MLFLOW_TRACKING_URI to its address"
        )
    config.output.mkdir(parents=True, exist_ok=True)
    if blind := blind_to(config.output, machines):
        raise ConfigError(f"{', '.join(blind)} cannot see {config.output}: set output to a folder that all machines share")


def blind_to(folder: Path, machines: Mapping[str, str]) -> list[str]:
    """Which of the machines, given by name and Ray's node id, do not see a file that is written to the folder here."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-") as probe:
        sees = ray.remote(num_cpus=0)(os.path.exists)
        at = [NodeAffinitySchedulingStrategy(node, soft=False) for node in machines.values()]
        seen = ray.get([sees.options(scheduling_strategy=place).remote(probe.name) for place in at])
    return [name for name, there in zip(machines, seen, strict=True) if not there]


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
    # With one task an actor a pool is in full use at 1.0; above that, which is Ray's default, it would never grow.
    data.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    data.issue_detectors_config.detectors = []  # advice for whoever writes a pipeline, not for who runs this one
    data.target_max_block_size = None  # a block is a micro-batch, however large
    data.raise_original_map_exception = True  # else what a stage says of bad input is lost among Ray's errors


@contextlib.contextmanager
def session(config: AlignConfig, folder: Path) -> Iterator[Session]:
    """An MLflow run, its ``folder`` and the rewards, served: new ones, or those of a run that was not finished.

    Whatever happens, nothing of it goes on running afterwards. ConfigError if the folder's run is another one, or going on.
    """
    if config.prompts.embeds:
        from flowbp_ray.rollouts import embeds  # with diffusers, which takes seconds

        embeds.check(config)
    quiet_streams()
    runs.begin(config, folder)
    with runs.alone(folder):
        uri = tracking_uri(config.tracking.uri)
        tracker = (
            ray.remote(Tracker)
            # Its state is in the folder: another one goes on where it was.
            .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=on_this_node())
            .remote(uri, config.tracking.experiment, config.tracking.run_name, config.model_dump(mode="json"), folder)
        )
        info: dict[str, str] = ray.get(tracker.info.remote())
        own, ended = f"rewards-{info['run_id'][:8]}", False

        def end(error: BaseException) -> None:
            nonlocal ended
            if not ended:
                ended, status = True, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
                clean_up("end the MLflow run", lambda: ray.get(tracker.finish.remote(status), timeout=60))

        try:
            print(f"MLflow run {info['run_id']}, files in {folder}")
            with rewarding(config, own) as rewards:
                try:
                    yield Session(tracker, rewards, info)
                except BaseException as error:
                    end(error)  # the quick one first: `ray job stop` leaves three seconds
                    raise
        except BaseException as error:
            end(error)
            raise
        ray.get(tracker.finish.remote("FINISHED"))
        runs.finished(folder)


class Owner:
    """Dies with the driver, however that ends, and lets its reward application know."""


@contextlib.contextmanager
def rewarding(config: AlignConfig, own: str) -> Iterator[str]:
    """The name of the application that scores: the running one of the configuration, or a new one of the name ``own``, which is
    started again whenever it is gone, and removed at the end."""
    if config.reward.application:
        check_application(config, config.reward.application)
        yield config.reward.application
        return
    if own in serve.status().applications:
        serve.delete(own)  # of a driver that was killed
    owner = make_owner(own)  # the handle is what keeps it
    try:
        serve.run(application(config, own), name=own, route_prefix=None)
        ended = threading.Event()
        watch = threading.Thread(target=revive, args=(config, own, ended), daemon=True)
        watch.start()
        try:
            yield own
        finally:
            ended.set()
    finally:
        clean_up("remove the reward service", lambda: serve.delete(own))
        ray.kill(owner)  # what `revive` may have started just now ends by itself


def make_owner(name: str) -> ActorHandle:
    """The owner of an application; ConfigError if it has one that does not go away, as a killed driver's does in seconds."""
    for _ in range(60):
        try:
            owner = ray.remote(Owner).options(name=name, namespace=OWNERS, num_cpus=0, max_restarts=-1).remote()
            ray.get(owner.__ray_ready__.remote())
            return owner
        except ValueError:
            time.sleep(0.5)
    raise ConfigError(f"another driver on this cluster has the application {name}: wait for it or stop it")


def revive(config: AlignConfig, own: str, ended: threading.Event) -> None:
    """Start the reward application again whenever it is gone as a whole; its parts are Ray Serve's business."""
    while not ended.wait(2):
        try:
            if own not in serve.status().applications and not ended.is_set():
                print(f"the reward application {own} is gone: starting it again", file=sys.stderr)
                serve.run(application(config, own), name=own, route_prefix=None)
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


def clean_up(what: str, do: Callable[[], object]) -> None:
    """Do it; where that fails, say so, and let what came before be the error."""
    try:
        do()
    except Exception as error:
        print(f"could not {what}: {reason(error)}", file=sys.stderr)


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For what needs the driver's own disk."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def progress(total: int, what: str, unit: str, done: int = 0) -> tqdm:
    """A bar; in a log, where each state of it is a line of its own, it moves twice a minute."""
    return tqdm(total=total, desc=what, unit=unit, initial=done, mininterval=0.5 if sys.stderr.isatty() else 30)


def lost(error: BaseException) -> bool:
    """Whether all that went wrong is that a process or machine was lost: what a new attempt may not meet."""
    failures = list(getattr(error, "worker_failures", {}).values())
    inside = failures or [e for e in (getattr(error, "controller_failure", None), getattr(error, "cause", None)) if e is not None]
    if not inside and error.__cause__ is not None and type(error).__module__.partition(".")[0] == "ray":
        inside = [error.__cause__]
    if inside := [e for e in inside if isinstance(e, BaseException) and e is not error]:
        return all(map(lost, inside))
    # Workers whose group has lost one say so: NCCL by its own error, gloo of a connection that was closed or reset.
    if isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return True
    # Ray Train's own words are of workers that do not answer, or that are taken away.
    of_train = type(error).__module__.startswith("ray.train")
    return of_train or (isinstance(error, RayError) and not isinstance(error, RayTaskError))


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
    # Ray's pages of what it knows of an actor.
    if died := re.search(r"class_name: (\w+).*?ip: (\S+)", text, re.DOTALL):
        return f"the process of {died[1]} on {died[2]} died"
    if silent := re.search(r"Actor\((\w+),.*?node_ip='([^']+)'", text, re.DOTALL):
        return f"the process of {silent[1]} on {silent[2]} does not answer"
    if "Traceback (most recent call last)" in text or "ray::" in text:  # of an actor that failed as it was made
        name, _, said = text.splitlines()[-1].strip().partition(": ")
        return said if said and " " not in name else text.splitlines()[-1].strip()
    return text if text and not isinstance(error, LookupError) else f"{type(error).__name__}: {text}"
