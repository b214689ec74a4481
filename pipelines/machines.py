"""A cluster of several raylets on this machine, and alignments on it as a person starts them: what chaos and soak are made of."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from flowbp_ray.config import AlignConfig, dump, load
from pipelines import files_and_overrides, interrupt

ROOT = Path(__file__).resolve().parents[1]
SPARSE = ROOT / "configs" / "shapes" / "sparse.yaml"
#: A run of a minute; overrides change it.
SMALL = (
    "train.steps=8",
    "train.batch=4",
    "train.micro_batch=2",
    "train.checkpoint_every=2",
    "sampling.steps=6",
    "evaluation.per_task=1",
    "evaluation.before=false",
    "evaluation.preview_every=4",
    "evaluation.preview_prompts=2",
    "cluster.samplers=2",
    "cluster.sampler_cpus=0.5",
    "cluster.trainer_cpus=0.5",
    "cluster.reward_cpus=0.5",
)
#: Parts, by what Ray calls their processes.
PROCESSES = {
    "sampler": "SamplerStage)",
    "reward stage": "RewardStage)",
    "reward replica": "ray::ServeReplica:rewards-",
    "train worker": "ray::RayTrainWorker",
    "train controller": "ray::TrainController",
    "policy store": "ray::PolicyStore",
    "tracker": "ray::Tracker",
}
MARK = "FLOWBP_CHAOS"
PATIENCE = 600  # seconds for a run to get on


def small(given: list[str], *more: str) -> AlignConfig:
    """The configuration of a command line's YAML files, sparse.yaml if there are none, as small as ``more`` and it say. Errors as
    `load`'s."""
    files, overrides = files_and_overrides(given)
    first, *others = files or [SPARSE]
    return load(first, [*SMALL, *more, *overrides], others)


def kept_in(folder: Path, config: AlignConfig) -> AlignConfig:
    """The configuration with its runs and MLflow's store in a folder, where it is written too."""
    tracking = config.tracking.model_copy(update={"uri": f"sqlite:///{folder}/mlflow.db"})
    own = config.model_copy(update={"output": folder / "runs", "tracking": tracking})
    (folder / "config.yaml").write_text(dump(own), encoding="utf-8")
    return own


def metrics(place: Path) -> list[dict[str, Any]]:
    """What the run's tracker has been given so far."""
    found = []
    for file in place.glob("runs/*/metrics.jsonl"):
        for line in file.read_text("utf-8").splitlines():
            if line.endswith("}}"):
                found.append(json.loads(line))
    return found


def newest(place: Path) -> int:
    """The last step that was done; −1 before the first."""
    return max((entry["step"] for entry in metrics(place) if "objective" in entry["values"]), default=-1)


class Machines:
    """A head, where commands run, and workers, where all else does, as raylets on this machine."""

    def __init__(self, workers: int = 2, cpus: int = 4, store: int | None = None) -> None:
        """So many workers, of so many logical CPUs each; ``store`` is the object store's bytes, if not Ray's own for tests."""
        self.number = workers
        self.each: dict[str, Any] = {"num_cpus": cpus} | ({"object_store_memory": store} if store else {})

    def __enter__(self) -> Self:
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        from pipelines.session import PROMPT, bound_memory

        self.mark = uuid.uuid4().hex
        os.environ[MARK] = self.mark  # which all of the cluster's processes inherit
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - so Ray spells it
        bound_memory()
        os.environ.update(PROMPT)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.workers = [self.cluster.add_node(**self.each) for _ in range(self.number)]
        signal.signal(signal.SIGTERM, interrupt)  # a node takes it for itself
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="error")
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        return self

    def __exit__(self, *_: object) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()
        for number in [pid for pid, _ in self.processes() if pid != os.getpid()]:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(number, signal.SIGKILL)
        del os.environ[MARK]

    def processes(self) -> Iterator[tuple[int, str]]:
        """Numbers and command lines of what belongs to this cluster."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    yield int(entry.name), (entry / "cmdline").read_text("utf-8", "replace").replace("\0", " ").strip()
            except OSError:
                continue  # it ended meanwhile, or is not ours

    def kill(self, role: str, randomly: random.Random, command: "Command") -> bool:
        """Kill a process of a role, as soon as there is one; whether there was one before the command ended."""
        while not (found := [pid for pid, line in self.processes() if line.startswith("ray::") and PROCESSES[role] in line]):
            if command.process.poll() is not None:
                return False
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):  # as good as killed
            os.kill(randomly.choice(found), signal.SIGKILL)
        return True

    def lose(self, randomly: random.Random) -> None:
        """Lose a worker node with all that is on it; another one comes in its place."""
        node = self.workers.pop(randomly.randrange(self.number))
        self.cluster.remove_node(node, allow_graceful=False)
        self.workers.append(self.cluster.add_node(**self.each))
        signal.signal(signal.SIGTERM, interrupt)

    def orphans(self) -> list[str]:
        """What of a run is still there some seconds after it ended."""
        import ray
        from ray import serve

        parts = ("ray::MapWorker", *PROCESSES.values())
        for _ in range(30):
            found = [line for _, line in self.processes() if line.startswith("ray::") and any(p in line for p in parts)]
            groups = ray.util.placement_group_table().values()
            found += [f"placement group {g['placement_group_id']}" for g in groups if g["state"] != "REMOVED"]
            found += [f"application {name}" for name in serve.status().applications]
            if not found:
                break
            time.sleep(1)
        return found


class Command:
    """An alignment as a person starts it, and starts it again where it was killed."""

    def __init__(self, folder: Path, machines: Machines | None = None) -> None:
        """By the configuration in the folder, on these machines or on a cluster of its own."""
        self.command = [sys.executable, "-m", "pipelines.align", str(folder / "config.yaml")]
        self.environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        if machines:
            self.environment["RAY_ADDRESS"] = machines.cluster.address
        self.place, self.log = folder, (folder / "output.txt").open("a", encoding="utf-8")
        self.start()

    def start(self) -> None:
        """Give the command."""
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=subprocess.STDOUT, cwd=ROOT, env=self.environment, start_new_session=True
        )

    def kill(self) -> None:
        """Kill it, as the kernel does when memory is short, and give it again."""
        self.process.kill()
        self.process.wait()
        self.start()

    def wait_for(self, step: int | None) -> None:
        """Return when a step is done or the command ended; None waits for its end. RuntimeError if it takes too long, or the
        command fails."""
        began = time.monotonic()
        while self.process.poll() is None and (step is None or newest(self.place) < step):
            if time.monotonic() - began > PATIENCE:
                raise RuntimeError(f"nothing came for {PATIENCE} s: see {self.log.name}")
            time.sleep(0.1)
        if self.process.poll():
            raise RuntimeError(f"a run ended with exit code {self.process.returncode}: see {self.log.name}")
