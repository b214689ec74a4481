"""How far the orchestration scales: real streams, train workers, policy store and tracker, between stages that only wait.

For each sampler a step has 8 samples, in four micro-batches. Sampling them takes 8 s on one sampler, rewarding them 1 s on one
replica, the update 4 s on one train worker, all times a factor; a sample has 1 MB. So no step can take less than the longest
stage does; at policy_lag 0, where stages of two steps never overlap, than its micro-batches need to go all the way, in order, or,
were that of no account, as they come.
"""

import contextlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray

from flowbp_ray.config import AlignConfig, load
from flowbp_ray.tracking.tracker import METRICS, Tracker
from pipelines import runs
from pipelines.attempts import Parts, attempt
from pipelines.bounds import Pools, alone, stages
from pipelines.machines import SPARSE, Machines
from pipelines.session import Session, on_this_node, progress, quiet_streams
from pipelines.stand_ins import Learner, Pace, Reward, Sampler, paced
from pipelines.without import PARTS

SAMPLES, MICRO_BATCH = 8, 2  # for each sampler and step; in a micro-batch
ROLLOUT, REWARD, UPDATE = 8.0, 1.0, 4.0  # seconds for 8 samples
FIRST, LAST = 2, 1  # steps left out: the first fill the stream, and with the last it runs empty
NODES, STORE = 4, 2 * 2**30  # worker nodes, and the object store's bytes of each
#: What Ray has once for each machine is less than elsewhere, as here all have the same few cores: no processes are kept that wait
#: for tasks to come, 1 % of a core each, and reports for dashboards are not made each 5 s.
ALONE = {"RAY_num_workers_soft_limit": "0", "REPORTER_UPDATE_INTERVAL_MS": "60000"}


@dataclass(frozen=True)
class Case:
    """One measurement: a cluster's pools, what a step has, and how it is."""

    series: str
    samplers: int
    workers: int
    replicas: int
    #: For how many samplers a step has samples.
    shares: int
    lag: int
    factor: float
    stragglers: float = 0.0
    policy_bytes: int = 2**20
    #: The part of the stream that is left out, one of `pipelines.without.PARTS`.
    without: str | None = None

    @property
    def micro_batches(self) -> int:
        """Of a step."""
        return self.shares * SAMPLES // MICRO_BATCH

    @property
    def pace(self) -> Pace:
        """Of a micro-batch."""
        each = self.factor * MICRO_BATCH / SAMPLES
        sizes = {"sample_bytes": 2**20, "policy_bytes": self.policy_bytes}
        return Pace(ROLLOUT * each, REWARD * each, UPDATE * each, **sizes, stragglers=self.stragglers)

    def bound(self, seed: int, steps: range, *, in_order: bool = True) -> float:
        """Seconds that the mean of these steps takes if nothing but the stages takes time, nor, unless ``in_order``, that what
        is sampled waits for what comes before it."""
        pace, pools = self.pace, Pools(self.samplers, self.replicas, self.workers)
        sampling = [[pace.rollout_of(seed, step, part) for part in range(self.micro_batches)] for step in steps]
        if self.lag == 0:
            return statistics.mean(alone(took, pace.reward, pace.update, pools, in_order=in_order) for took in sampling)
        each = statistics.mean(statistics.mean(took) for took in sampling)
        return max(stages(self.micro_batches, each, pace.reward, pace.update, pools).values())


def cases(series: list[str], numbers: list[int], factor: float) -> Iterator[Case]:
    """What is measured."""

    def balanced(name: str, number: int, lag: int, **more: Any) -> Case:
        return Case(name, number, max(1, number // 2), max(1, number // 8), number, lag, factor, **more)

    most = max(numbers)
    if "balanced" in series:
        for number in numbers:
            for lag in (0, 1):
                yield balanced("balanced", number, lag)
    if "samplers" in series:
        for number in numbers:
            yield replace(balanced("samplers", most, 1), samplers=number)
    if "stragglers" in series:
        for lag in (0, 1):
            yield balanced("stragglers", most, lag, stragglers=0.1)
    if "publish" in series:
        for size in (25 * 2**20, 400 * 2**20):
            for number in sorted({numbers[0], most}):
                yield balanced("publish", number, 1, policy_bytes=size)


def configured(case: Case, steps: int, folder: Path) -> AlignConfig:
    """The configuration of an alignment of this shape."""
    settings = {
        "train.steps": steps,
        "train.batch": case.shares * SAMPLES,
        "train.micro_batch": MICRO_BATCH,
        "train.workers": case.workers,
        "train.policy_lag": case.lag,
        "train.checkpoint_every": steps,
        "cluster.samplers": case.samplers,
        "cluster.reward_replicas": case.replicas,
        "cluster.sampler_cpus": 0.25,
        "cluster.trainer_cpus": 0.25,
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "output": folder / "runs",
    }
    return load(SPARSE, [f"{key}={value}" for key, value in settings.items()])


def measure(
    series: list[str], numbers: list[int], factor: float, steps: int, without: list[str], told: Callable[[str], object]
) -> list[dict[str, Any]]:
    """A row for each case, on a local cluster of several nodes; then for each ``without`` one of the stream's parts, on a cluster
    of its own."""
    rows = list[dict[str, Any]]()
    whole = list(cases(series, numbers, factor))
    # What no alignment can be is said before the first one.
    reserved = max(configured(case, FIRST + steps + LAST, Path("/")).reserved()["CPU"] for case in whole)
    cpus = math.ceil(reserved / NODES) + 1
    os.environ |= ALONE
    for part in (None, *without):
        chosen = [replace(case, without=part) for case in whole]
        left_out = contextlib.nullcontext() if part is None else PARTS[part].left_out()
        with left_out, TemporaryDirectory(prefix="scale_") as scratch, Machines(NODES, cpus, STORE):
            quiet_streams()
            for number, case in enumerate(chosen):
                folder = Path(scratch) / f"{number:03d}"
                folder.mkdir()
                row = run(case, range(FIRST, FIRST + steps), folder)
                told(line(row))
                rows.append(row)
    return rows


def run(case: Case, counted: range, folder: Path) -> dict[str, Any]:
    """One alignment, of which some steps count."""
    steps = counted.stop + LAST
    config = configured(case, steps, folder)
    place = folder / "runs" / "run"
    runs.begin(config, place, None)
    tracker = ray.remote(Tracker).options(num_cpus=0, scheduling_strategy=on_this_node())
    there = tracker.remote(config.tracking.uri, "scale", None, config.model_dump(mode="json"), place)
    parts = Parts(paced(Sampler, case.pace), paced(Reward, case.pace), partial(Learner, case.pace))
    at = Session(there, "", ray.get(there.info.remote()))
    with progress(steps, f"{case.samplers} samplers, lag {case.lag}", "step") as bar:
        attempt(config, ["a red ring"], place, at, [], runs.Kept(config, place), bar, parts)
    seconds = ray.get(there.seconds.remote())
    ray.get(there.finish.remote("FINISHED"))
    ray.kill(there)
    ended = [e["time"] for e in map(json.loads, (place / METRICS).read_text("utf-8").splitlines()) if "objective" in e["values"]]
    step = (ended[counted.stop - 1] - ended[counted.start - 1]) / 1000 / len(counted)
    bound = case.bound(config.train.seed, counted)
    mean = {k: statistics.mean(v[counted.start : counted.stop]) for k, v in seconds.items()}
    return asdict(case) | {
        "steps": len(counted),
        "step_s": step,
        "bound_s": bound,
        "any_order_s": case.bound(config.train.seed, counted, in_order=False),
        "of_bound": bound / step,
        "samples_per_s": case.shares * SAMPLES / step,
        "publishing_s": mean["publishing"],
        "loading_s": mean["loading"] / case.samplers,
        "waiting": {
            "samplers": mean["sampling_waiting"] / case.samplers / step,
            "reward": mean["reward_waiting"] / case.replicas / step,
            "train": mean["waiting"] / step,
        },
    }


HEAD = [
    "series", "samplers", "train workers", "reward replicas", "samples a step", "policy_lag", "policy", "step", "bound",
    "in any order", "of the bound", "publishing", "loading", "waited: samplers", "rewards", "train workers",
]  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row."""
    what = row["series"] if row["without"] is None else f"{row['series']}, without {row['without']}"
    cells = [what, row["samplers"], row["workers"], row["replicas"], row["shares"] * SAMPLES, row["lag"]]
    cells.append(f"{row['policy_bytes'] / 2**20:.0f} MB")
    cells += [f"{row[k]:.2f} s" for k in ("step_s", "bound_s", "any_order_s")] + [f"{100 * row['of_bound']:.0f} %"]
    cells += [f"{row[k]:.2f} s" for k in ("publishing_s", "loading_s")]
    cells += [f"{100 * share:.0f} %" for share in row["waiting"].values()]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    factor = rows[0]["factor"]
    said = (
        f"Durations times {factor:g}: 8 samples take {ROLLOUT * factor:g} s on a sampler, {REWARD * factor:g} s on a reward "
        f"replica, {UPDATE * factor:g} s on a train worker. Means of {rows[0]['steps']} steps, without the first {FIRST} and the "
        "last; loading is for each sampler, and the train workers' waiting is rank 0's. Rewards wait in their stage: what "
        "Ray Serve adds to it, `reward` measures."
    )
    for name in dict.fromkeys(row["without"] for row in rows if row["without"]):
        said += f"\n{name}: {PARTS[name].what}; without it {PARTS[name].instead}."
    return "\n".join([f"| {' | '.join(HEAD)} |", "| --- |" + " ---: |" * (len(HEAD) - 1), *map(line, rows), "", said])
