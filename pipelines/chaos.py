"""Kill parts of alignments at random moments, and compare what becomes of them with an undisturbed run.

    python -m pipelines.chaos --kills 30
    python -m pipelines.chaos --kills 4 --roles sampler driver
    python -m pipelines.chaos configs/shapes/bridge.yaml train.steps=10

A cluster of three raylets is started on this machine. Runs are commands as a person gives them; when the command itself is
killed it is given again. From a seed come the parts, steps and moments. At the end: whether any final weight, metric point or
checkpoint is other than the undisturbed run's, what was left running, and how long it took until the next step was done.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from flowbp_ray.config import AlignConfig, ConfigError, dump, load
from pipelines import files_and_overrides, refuse
from pipelines.align import interrupt

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
#: Parts, by what Ray calls their processes. The first three need no command of their own to be killed.
PROCESSES = {
    "sampler": "SamplerStage)",
    "reward stage": "RewardStage)",
    "admission": "Admission)",
    "reward replica": "ray::ServeReplica:rewards-",
    "train worker": "ray::RayTrainWorker",
    "train controller": "ray::TrainController",
    "policy store": "ray::PolicyStore",
    "tracker": "ray::Tracker",
}
ROLES = (*PROCESSES, "reward application", "driver", "worker node")
MARK = "FLOWBP_CHAOS"
PATIENCE = 600  # seconds for a run to get on


@dataclass(frozen=True)
class Kill:
    """What was killed, after which step, and how many seconds went by until the next one was done."""

    role: str
    step: int
    seconds: float


@dataclass(frozen=True)
class Left:
    """What a run left: a digest of the final weights, its metrics by name and step, its checkpoints, and what still ran."""

    weights: str
    points: dict[str, list[tuple[int, float]]]
    checkpoints: list[str]
    orphans: list[str]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "given", nargs="*", metavar="config | section.setting=value", help="YAML files (default: sparse.yaml), and what to change"
    )
    parser.add_argument("--kills", type=int, default=30, help="over all runs (default: %(default)s)")
    parser.add_argument("--per-run", type=int, default=2, help="kills in one run (default: %(default)s)")
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES), metavar="ROLE", help=f"of {', '.join(ROLES)}")
    parser.add_argument("--seed", type=int, default=0, help="of parts, steps and moments (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of runs and results (default: chaos/ beside the runs)")
    args = parser.parse_intermixed_args()
    args.files, args.overrides = files_and_overrides(args.given)
    return args


def main() -> None:
    """Run, kill, compare."""
    args = arguments()
    try:
        files = args.files or [SPARSE]
        config = load(files[0], [*SMALL, *args.overrides], files[1:])
        if args.kills < 1 or not 1 <= args.per_run < config.train.steps:
            raise ConfigError(f"--kills {args.kills} --per-run {args.per_run}: at least one, and fewer than steps in a run")
    except (ConfigError, OSError) as error:
        refuse(error)
    folder = (args.output or config.output.parent / "chaos").expanduser().absolute()
    shutil.rmtree(folder / "runs", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    randomly = random.Random(args.seed)
    order = [role for _ in range(-(-args.kills // len(args.roles))) for role in randomly.sample(args.roles, len(args.roles))]
    planned = [order[: args.kills][i : i + args.per_run] for i in range(0, args.kills, args.per_run)]
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with Machines() as machines:
            print("the undisturbed run")
            undisturbed, _ = run(config, folder, 0, [], machines, randomly)
            if undisturbed.orphans:
                raise RuntimeError(f"the undisturbed run left {undisturbed.orphans}")
            kills, lines = list[Kill](), list[str]()
            for number, roles in enumerate(planned, 1):
                print(f"run {number} of {len(planned)}: {', '.join(roles)}")
                found, done = run(config, folder, number, roles, machines, randomly)
                kills += done
                lines += [f"run {number} ({', '.join(roles)}): {line}" for line in different(undisturbed, found)]
                print("  " + ("\n  ".join(lines[-3:]) if lines else "nothing is different"))
                (folder / "kills.json").write_text(json.dumps([asdict(k) for k in kills], indent=1) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: nothing runs any more")
    text = table(kills, lines, config)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {folder / 'table.md'}")
    if lines:
        sys.exit(1)


class Machines:
    """A head, where commands run, and two workers, where all else does, as raylets on this machine."""

    def __enter__(self) -> Self:
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        self.mark = uuid.uuid4().hex
        os.environ[MARK] = self.mark  # which all of the cluster's processes inherit
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - so Ray spells it
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.workers = [self.cluster.add_node(num_cpus=4) for _ in range(2)]
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

    def kill(self, role: str, randomly: random.Random, command: "Command") -> None:
        """Kill a process of a role, as soon as there is one. RuntimeError if the command ends before."""
        while not (found := [pid for pid, line in self.processes() if line.startswith("ray::") and PROCESSES[role] in line]):
            if command.process.poll() is not None:
                raise RuntimeError(f"the run ended before there was a {role} to kill: give it more train.steps")
            time.sleep(0.05)
        os.kill(randomly.choice(found), signal.SIGKILL)

    def lose(self, randomly: random.Random) -> None:
        """Lose a worker node with all that is on it; another one comes in its place."""
        node = self.workers.pop(randomly.randrange(2))
        self.cluster.remove_node(node, allow_graceful=False)
        self.workers.append(self.cluster.add_node(num_cpus=4))

    def orphans(self) -> list[str]:
        """What of a run is still there some seconds after it ended."""
        import ray
        from ray import serve

        for _ in range(30):
            found = [
                line for _, line in self.processes() if line.startswith("ray::") and any(p in line for p in PROCESSES.values())
            ]
            groups = ray.util.placement_group_table().values()
            found += [f"placement group {g['placement_group_id']}" for g in groups if g["state"] != "REMOVED"]
            found += [f"application {name}" for name in serve.status().applications]
            if not found:
                break
            time.sleep(1)
        return found


class Command:
    """An alignment as a person starts it, and starts it again where it was killed."""

    def __init__(self, config: AlignConfig, folder: Path, machines: Machines) -> None:
        file = folder / "config.yaml"
        file.write_text(dump(config), encoding="utf-8")
        self.command = [sys.executable, "-m", "pipelines.align", str(file)]
        self.environment = os.environ | {"RAY_ADDRESS": machines.cluster.address}
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


def run(
    config: AlignConfig, folder: Path, number: int, roles: list[str], machines: Machines, randomly: random.Random
) -> tuple[Left, list[Kill]]:
    """One alignment in which parts of the roles are killed after random steps, one after the other."""
    from ray import serve

    place = folder / "runs" / f"{number:03d}"
    place.mkdir(parents=True)
    own = config.model_copy(
        update={
            "output": place / "runs",
            "tracking": config.tracking.model_copy(update={"uri": f"sqlite:///{place}/mlflow.db"}),
        }
    )
    # Its first step may be the one that is waited for longest, and after the last one nothing would come.
    steps = sorted(randomly.sample(range(config.train.steps - 1), len(roles)))
    kills = []
    command = Command(own, place, machines)
    try:
        for role, step in zip(roles, steps, strict=True):
            command.wait_for(step)
            time.sleep(randomly.random() * 3)
            reached, began = newest(place), time.monotonic()
            if role == "driver":
                command.kill()
            elif role == "worker node":
                machines.lose(randomly)
            elif role == "reward application":
                for name in serve.status().applications:
                    serve.delete(name)
            else:
                machines.kill(role, randomly, command)
            command.wait_for(reached + 1)
            kills.append(Kill(role, reached, time.monotonic() - began))
        command.wait_for(None)
    finally:
        command.process.kill()
        command.log.close()
    return left(own, machines), kills


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


def left(config: AlignConfig, machines: Machines) -> Left:
    """What a finished run left."""
    import hashlib

    from mlflow import MlflowClient

    from flowbp_ray.tracking.tracker import RUN_FILE
    from pipelines.runs import LIST

    (folder,) = config.output.iterdir()
    listed = json.loads((folder / LIST).read_text("utf-8"))
    final = folder / listed["latest_checkpoint_result"]["checkpoint_dir_name"] / "state_0.safetensors"
    client, run_id = MlflowClient(config.tracking.uri), json.loads((folder / RUN_FILE).read_text("utf-8"))["run_id"]
    points = {
        key: [(p.step, p.value) for p in client.get_metric_history(run_id, key)] for key in client.get_run(run_id).data.metrics
    }
    (one,) = client.search_runs([client.get_experiment_by_name(config.tracking.experiment).experiment_id])
    if one.info.status != "FINISHED":
        points["status"] = [(0, float("nan"))]
    checkpoints = sorted(entry["checkpoint_dir_name"] for entry in listed["checkpoint_results"])
    return Left(hashlib.sha256(final.read_bytes()).hexdigest(), points, checkpoints, machines.orphans())


def different(undisturbed: Left, disturbed: Left) -> list[str]:
    """In what a run is not as the undisturbed one; how long things take may be other."""
    found = []
    if disturbed.weights != undisturbed.weights:
        found.append("the final weights are others")
    if disturbed.checkpoints != undisturbed.checkpoints:
        found.append(f"the checkpoints are {disturbed.checkpoints}, not {undisturbed.checkpoints}")
    if disturbed.orphans:
        found.append(f"left running: {disturbed.orphans}")
    for key in sorted(undisturbed.points.keys() | disturbed.points.keys()):
        theirs, ours = undisturbed.points.get(key, []), disturbed.points.get(key, [])
        counts, wanted = Counter(step for step, _ in ours), Counter(step for step, _ in theirs)
        if counts != wanted:
            found.append(
                f"{key}: lost points {sorted((wanted - counts).elements())}, more {sorted((counts - wanted).elements())}"
            )
        elif not key.startswith("seconds/") and sorted(theirs) != sorted(ours):
            found.append(f"{key} has other values")
    return found


def table(kills: list[Kill], lines: list[str], config: AlignConfig) -> str:
    """Kills by role, with the time until the next step, and every difference."""
    rows = ["| killed | times | after steps | seconds to the next step: median | longest |", "| --- | ---: | --- | ---: | ---: |"]
    for role in ROLES:
        if own := [k for k in kills if k.role == role]:
            seconds, steps = [k.seconds for k in own], ", ".join(str(k.step) for k in own)
            rows.append(f"| {role} | {len(own)} | {steps} | {statistics.median(seconds):.0f} | {max(seconds):.0f} |")
    what = f"{len(kills)} kills in runs of {config.train.steps} steps, a checkpoint each {config.train.checkpoint_every}"
    said = "final weights bit by bit, metric points and checkpoints as of the undisturbed run, nothing left running"
    return (
        "\n".join([*rows, "", f"{what}: {said}." if not lines else f"{what}. Different:", *(f"- {line}" for line in lines)])
        + "\n"
    )


if __name__ == "__main__":
    main()
