"""The whole thing beside a loop in one process with the same mathematics.

The loop has the same sampler, rewards and learner, one after the other, without Ray, Serve and MLflow. A loop that is written by
hand would have one model for sampling and learning: what handing the weights from one to the other takes is told apart. At the
same policy_lag and with one thread it ends with the same weights, bit by bit.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowbp_ray.config import AlignConfig, load
from flowbp_ray.rollouts.batches import Chunk, policy_version
from flowbp_ray.rollouts.prompts import read_prompts
from flowbp_ray.rollouts.sampler import Sampler
from flowbp_ray.rollouts.stages import rewarded
from flowbp_ray.training.learner import Learner
from pipelines.alignment import align
from pipelines.machines import SPARSE
from pipelines.session import cluster
from pipelines.step_times import ALONE, FIRST
from serve.rewards import here


def measure(given: list[str], steps: int, told: Callable[[str], object]) -> list[dict[str, Any]]:
    """Rows: the loop with one thread and with all, then the whole system at policy_lag 0 and 1."""
    rows = list[dict[str, Any]]()
    ends = dict[str, dict[str, Tensor]]()
    with TemporaryDirectory(prefix="pipeline_") as folder:
        tracking = [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"output={folder}"]
        configs = {
            lag: load(SPARSE, [*ALONE, *given, *tracking, f"train.policy_lag={lag}", f"train.steps={FIRST + steps}"])
            for lag in (0, 1)
        }
        threads = torch.get_num_threads()
        for number in sorted({1, threads}):
            told(f"a loop in one process, {number} threads")
            seconds, handing, weights = loop(configs[0], number)
            ends.setdefault("loop", weights)
            middle = {"seconds": statistics.median(seconds[FIRST:]), "handing": statistics.median(handing[FIRST:])}
            rows.append({"way": f"a loop in one process, {number} threads"} | middle)
        fastest = min(row["seconds"] - row["handing"] for row in rows)
        for lag, config in configs.items():
            told(f"the whole system, policy_lag {lag}")
            if lag:
                *_, ends["loop"] = loop(config, 1)
            with cluster(config):
                outcome = align(config, Path(folder) / f"lag{lag}")
            final = load_file(outcome.folder / f"checkpoint_{config.train.steps:06d}" / "state_0.safetensors")
            same = all(torch.equal(final[f"raw.{name}"], value) for name, value in ends["loop"].items())
            middle = {stage: statistics.median(values[FIRST:]) for stage, values in outcome.seconds.items()}
            rows.append(
                {"way": f"flowbp_ray, policy_lag {lag}", "seconds": middle["step"], "same_weights": same, "stages": middle}
            )
    return [row | {"ratio": row["seconds"] / fastest, "steps": steps} for row in rows]


def loop(config: AlignConfig, threads: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Seconds of each step, those of them in which weights are handed over, and the final weights."""
    policies: dict[int, list[Chunk]] = {}
    learner = Learner(config)
    sampler = Sampler(config, read_prompts(config.prompts), policies.__getitem__)
    rewards = here(config)
    torch.set_num_threads(threads)
    policies[0] = list(learner.policy())
    parts, seconds, handing = config.train.batch // config.train.micro_batch, list[float](), list[float]()
    for step in range(config.train.steps):
        began, loading = time.perf_counter(), 0.0
        for part in range(parts):
            block = sampler({"number": np.array([step * parts + part])})
            loading += float(block["loading_seconds"].sum())
            learner.accumulate(rewarded(config, block, lambda *asked: partial(rewards.score, *asked)))
        learner.update()
        updated = time.perf_counter()
        for version in [v for v in policies if v < policy_version(config, step + 1)]:
            del policies[version]
        policies[learner.version] = list(learner.policy())
        ended = time.perf_counter()
        seconds.append(ended - began)
        handing.append(ended - updated + loading)
    torch.set_num_threads(1)
    return seconds, handing, learner.weights.read()


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    lines = [
        "| | seconds a step | of these handing weights over | of the faster loop's without that | the loop's weights |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        same = {True: "bit by bit", False: "others", None: ""}[row.get("same_weights")]
        handing = f"{row['handing']:.3f}" if "handing" in row else ""
        lines.append(f"| {row['way']} | {row['seconds']:.2f} | {handing} | {row['ratio']:.2f} | {same} |")
    for row in rows:
        if "stages" in row:
            parts = ", ".join(f"{name} {value:.2f}" for name, value in sorted(row["stages"].items()))
            lines += ["", f"{row['way']}, seconds: {parts}."]
    return "\n".join([*lines, "", f"Medians of {rows[0]['steps']} steps. {json.dumps(ALONE)}"])
