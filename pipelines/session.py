"""What every command has on a Ray cluster: the connection, streams, bars, and for a run its folder, MLflow run and rewards."""

import contextlib
import logging
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from flowbp_ray.config import AlignConfig, ConfigError
from flowbp_ray.tracking.store import tracking_uri
from flowbp_ray.tracking.tracker import Tracker
from pipelines import check_lasts, interrupt, job_environment, runs
from pipelines.causes import clean_up
from pipelines.rewarding import rewarding, wait_for

#: Of a cluster's processes, so that no memory grows with the steps. A block that is small enough to come in a message, at most
#: 100,000 bytes, stays for ever in the process that runs Ray Data's stream; and Ray's GCS keeps 100,000 finished tasks.
MEMORY = {"RAY_max_direct_call_object_size": "8192", "RAY_task_events_max_num_task_in_gcs": "1000"}
#: Of the processes that a run trains with, and of a driver that starts the cluster itself. Ray Data's executor asks for the size
#: of what a stage made itself: a thread of its own has the answer just after the executor has looked, and it looks again a turn
#: later. At policy_lag 0 a step waits for that in all stages. And Ray Train's controller looks more often than each 2 s for train
#: workers that have ended, or are no more.
PROMPT = {"RAY_DATA_METADATA_PREFETCH_ON_THREAD": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


def bound_memory() -> None:
    """Have a cluster that this process starts not grow, unless its environment says otherwise."""
    for name, value in MEMORY.items():
        os.environ.setdefault(name, value)


def connect(config: AlignConfig) -> None:
    """Join the cluster of RAY_ADDRESS (every Ray job has it), else start one here. ConfigError if it is too small, or if what a
    submitted job makes would be lost."""
    variables = {"OMP_NUM_THREADS": str(config.cluster.threads), "TRANSFORMERS_VERBOSITY": "error"} | PROMPT
    check_lasts("output", config.output)
    for library in ("ray.serve", "ray.data"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if os.environ.get("RAY_ADDRESS"):
        given = job_environment().get("env_vars", {})
        ours = {"env_vars": {k: v for k, v in variables.items() if k not in given}}  # Ray refuses a job's own
        ray.init(runtime_env=ours, log_to_driver=False, logging_level="error")
    else:
        # Logical CPUs: on a laptop the processes take turns. One more than is there would be waited for, for ever.
        cpus = max(os.cpu_count() or 1, math.ceil(config.reserved()["CPU"]))
        bound_memory()
        # So many processes may start at once; by itself Ray goes by the CPUs, and warns when four times as many are there.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(cpus, 8)))
        os.environ.update(variables)  # of a runtime_env, the processes that Ray has at hand have nothing, and would be of no use
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="error")
    there = ray.cluster_resources()
    for kind, number in config.reserved().items():
        if number > there.get(kind, 0):
            raise ConfigError(
                f"the processes of this configuration need {number:g} {kind}s: the cluster has {there.get(kind, 0):g}"
            )
    check_machines(config)
    if not os.environ.get("RAY_ADDRESS"):
        # Handles only. A cluster's Serve is left as it is, or as it starts by itself: others use it too, over HTTP.
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})


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


def unused(config: AlignConfig, *kinds: Literal["trainer", "reward", "judge"]) -> AlignConfig:
    """The configuration without what processes of these kinds reserve: nothing has to be free for what is not started."""
    nothing = {f"{kind}_{what}": 0.0 for kind in kinds for what in ("cpus", "gpus")}
    changed = {
        name: section.model_copy(update={key: nothing[key] for key in nothing.keys() & type(section).model_fields})
        for name, section in (("cluster", config.cluster), ("evaluation", config.evaluation))
    }
    return config.model_copy(update=changed)


@contextlib.contextmanager
def cluster(config: AlignConfig) -> Iterator[None]:
    """A connected cluster; at the end a local one is gone, and a joined one goes on without this driver."""
    try:
        connect(config)
        signal.signal(signal.SIGTERM, interrupt)
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
    # A sampler of a pool that may grow has room for two tasks. The pool grows when each has one (by Ray's default it never would)
    # and shrinks when half of them have none.
    data.autoscaling_config.actor_pool_util_upscaling_threshold = 0.5
    data.autoscaling_config.actor_pool_util_downscaling_threshold = 0.25
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
    runs.begin(config, folder, config.model.revision)
    with runs.alone(folder):
        uri = tracking_uri(config.tracking.uri)
        tracker = (
            ray.remote(Tracker)
            # Its state is in the folder: another one goes on where it was.
            .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=on_this_node())
            .remote(uri, config.tracking.experiment, config.tracking.run_name, config.model_dump(mode="json"), folder)
        )
        info: dict[str, str] = {}
        ended = False

        def end(error: BaseException) -> None:
            nonlocal ended
            if info and not ended:  # else there is no tracker yet, or cannot be one
                ended, status = True, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
                clean_up("end the MLflow run", lambda: ray.get(tracker.finish.remote(status), timeout=60))

        try:
            with rewarding(config, folder) as rewards:
                try:
                    info |= ray.get(tracker.info.remote())  # meanwhile the rewards start
                    print(f"MLflow run {info['run_id']}, files in {folder}")
                    wait_for(config, rewards)
                    yield Session(tracker, rewards, info)
                except BaseException as error:
                    end(error)  # the quick one first: `ray job stop` leaves three seconds
                    raise
        except BaseException as error:
            end(error)
            raise
        else:
            ray.get(tracker.finish.remote("FINISHED"))
            runs.finished(folder)
        finally:
            ray.kill(tracker)  # an error's traceback may hold its handle for as long as that is looked at


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For what needs the driver's own disk."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def progress(total: int, what: str, unit: str, done: int = 0) -> tqdm:
    """A bar; in a log, where each state of it is a line of its own, it moves twice a minute."""
    return tqdm(total=total, desc=what, unit=unit, initial=done, mininterval=0.5 if sys.stderr.isatty() else 30)
