"""Kill parts of alignments at random moments, and compare what becomes of them with an undisturbed run.

    python -m pipelines.chaos --kills 30
    python -m pipelines.chaos --kills 4 --roles sampler driver
    python -m pipelines.chaos configs/shapes/bridge.yaml train.steps=10

A cluster of three raylets is started on this machine. Runs are commands as a person gives them; when the command itself is
killed it is given again. From a seed come the parts, steps and moments. At the end: whether any final weight, metric point or
checkpoint is other than the undisturbed run's, what was left running, and how long it took until the next step was done.
"""

import argparse
import hashlib
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from flowbp_ray.config import AlignConfig, ConfigError
from pipelines import check_lasts, checking, ending
from pipelines.machines import PROCESSES, Command, Machines, kept_in, newest, small

#: What is killed.
ROLES = (*PROCESSES, "reward application", "driver", "worker node")
SPARED = 4  # last steps of a run, after which nothing is killed


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
    parser.add_argument("--output", type=Path, help="where a folder of results is made (default: chaos/ beside the runs)")
    return parser.parse_intermixed_args()


def main() -> None:
    """Run, kill, compare."""
    args = arguments()
    with checking():
        config = small(args.given)
        if args.kills < 1 or not 1 <= args.per_run <= config.train.steps - SPARED:
            raise ConfigError(
                f"--kills {args.kills} --per-run {args.per_run}: at least one, and in a run at most train.steps − {SPARED}, "
                f"which is {config.train.steps - SPARED}"
            )
        folder = (args.output or config.output.parent / "chaos").expanduser().absolute() / time.strftime("%Y%m%d-%H%M%S")
        check_lasts("--output", folder)
    folder.mkdir(parents=True)
    randomly = random.Random(args.seed)
    order = [role for _ in range(-(-args.kills // len(args.roles))) for role in randomly.sample(args.roles, len(args.roles))]
    order = order[: args.kills]
    with ending(f"what was found so far is in {folder}", folder / "error.txt"), Machines() as machines:
        print(f"the undisturbed run; all goes to {folder}")
        undisturbed, _ = run(config, folder, 0, [], machines, randomly)
        if undisturbed.orphans:
            raise RuntimeError(f"the undisturbed run left {undisturbed.orphans}")
        kills, lines = list[Kill](), list[str]()
        number = 0
        while len(kills) < args.kills:
            number, roles = number + 1, order[: args.per_run]
            print(f"run {number}, {len(kills)} of {args.kills} kills: {', '.join(roles)}")
            found, done = run(config, folder, number, roles, machines, randomly)
            if not done:
                raise RuntimeError("a run ended before there was anything to kill: give it more train.steps")
            order = order[len(done) :]  # what it ended before is killed in the next one
            kills += done
            said = different(undisturbed, found)
            lines += [f"run {number} ({', '.join(k.role for k in done)}): {line}" for line in said]
            print("  " + ("\n  ".join(said) or "nothing is different"))
            (folder / "table.md").write_text(table(kills, lines, config), encoding="utf-8")
    print(f"\n{table(kills, lines, config)}\nwritten to {folder / 'table.md'}")
    if lines:
        sys.exit(1)


def run(
    config: AlignConfig, folder: Path, number: int, roles: list[str], machines: Machines, randomly: random.Random
) -> tuple[Left, list[Kill]]:
    """One alignment in which parts of the roles are killed after random steps, one after the other."""
    from ray import serve

    place = folder / "runs" / f"{number:03d}"
    place.mkdir(parents=True)
    own = kept_in(place, config)
    # From its start on; with the last ones all samples are there, and no sampler any more.
    steps = sorted(randomly.sample(range(-1, config.train.steps - SPARED), len(roles)))
    kills = []
    command = Command(place, machines)
    try:
        for role, step in zip(roles, steps, strict=True):
            command.wait_for(step)
            time.sleep(randomly.random() * 3)
            reached, began = newest(place), time.monotonic()
            if command.process.poll() is not None or reached >= config.train.steps - 1:
                break  # there is no next step
            if role == "driver":
                command.kill()
            elif role == "worker node":
                machines.lose(randomly)
            elif role == "reward application":
                while not (there := serve.status().applications) and command.process.poll() is None:
                    time.sleep(0.05)
                if not there:
                    break
                for name in there:
                    serve.delete(name, _blocking=False)  # it may be there again before Serve has seen that it was gone
            elif not machines.kill(role, randomly, command):
                break
            command.wait_for(reached + 1)
            kills.append(Kill(role, reached, time.monotonic() - began))
        command.wait_for(None)
    finally:
        command.process.kill()
        command.log.close()
    return left(own, machines), kills


def left(config: AlignConfig, machines: Machines) -> Left:
    """What a finished run left."""
    from mlflow import MlflowClient

    from flowbp_ray.tracking.tracker import RUN_FILE
    from pipelines.runs import BEGAN, LIST

    (folder,) = (file.parent for file in config.output.glob(f"*/{BEGAN}"))  # a driver killed early may leave an empty one
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
