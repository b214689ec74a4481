"""Measure where a step's seconds go, at policy_lag 0 and 1: sampling, reward, update, and what orchestration adds.

    python -m pipelines.step_times configs/shapes/sparse.yaml
    python -m pipelines.step_times configs/shapes/sparse.yaml train.batch=12 --steps 10

Two short alignments with one sampler, one train worker and one micro-batch a step, so that nothing of a step runs beside
itself and the stages' seconds can be compared with the step's. Prints a table and leaves nothing behind.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from flowbp_ray.config import AlignConfig, ConfigError, load
from pipelines import refuse

FIRST = 3  # steps left out: the first fill the stream and load what is loaded late
#: One process a stage, and nothing but steps.
ALONE = (
    "train.workers=1",
    "cluster.samplers=1",
    "cluster.reward_replicas=1",
    "evaluation.before=false",
    "evaluation.per_task=1",
    "evaluation.preview_prompts=0",
)
STAGES = ("sampling", "reward", "update")
#: What of a step passes weights on, which is a part of its orchestration.
WEIGHTS = ("publishing", "loading")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.step_times", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/shapes/sparse.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value", help="what to change in it")
    parser.add_argument("--steps", type=int, default=20, help="measured steps a run (default: %(default)s)")
    args = parser.parse_intermixed_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: at least one step is needed")
    return args


def settings(args: argparse.Namespace, lag: int, store: Path) -> AlignConfig:
    """The configuration of one of the two runs."""
    batch = load(args.config, args.overrides).train.batch
    return load(
        args.config,
        [
            *args.overrides,
            f"train.steps={FIRST + args.steps}",
            f"train.micro_batch={batch}",
            f"train.policy_lag={lag}",
            f"tracking.uri=sqlite:///{store}/mlflow.db",
            f"output={store}",
            *ALONE,
        ],
    )


def row(lag: int, seconds: dict[str, float]) -> str:
    """A run's medians. At lag 1 a step is sampled while the one before it is rewarded and updated, so two steps need what one
    after the other would, or twice the longest stage."""
    stages = [seconds[stage] for stage in STAGES]
    needed = sum(stages) if lag == 0 else max(*stages, sum(stages) / 2)
    rest = seconds["step"] - needed
    cells = [str(lag), *(f"{seconds[s]:.2f}" for s in STAGES), f"{seconds['step']:.2f}", f"{rest:.2f}"]
    return "| " + " | ".join([*cells, f"{100 * rest / seconds['step']:.0f} %", *(f"{seconds[s]:.2f}" for s in WEIGHTS)]) + " |"


def main() -> None:
    """Run at both lags and print the table."""
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="step_times_") as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, store: Path) -> None:
    """Both runs, with MLflow's and their own files in ``store``."""
    try:
        configs = {lag: settings(args, lag, store) for lag in (0, 1)}
    except ConfigError as error:
        refuse(error)
    from pipelines import quiet_libraries
    from pipelines.alignment import align
    from pipelines.causes import reason
    from pipelines.session import cluster

    quiet_libraries()
    head = ["policy_lag", *STAGES, "step", "orchestration", "its share", *(f"of it {s}" for s in WEIGHTS)]
    lines = ["| " + " | ".join(head) + " |", "|" + " ---: |" * len(head)]
    for lag, config in configs.items():
        try:
            with cluster(config):
                outcome = align(config, store / f"lag{lag}")
        except ConfigError as error:  # of what the cluster is
            refuse(error)
        except Exception as error:  # the boundary to the user, as in align
            sys.exit(f"\nstopped at policy_lag {lag}: {reason(error)}")
        lines.append(row(lag, {s: statistics.median(outcome.seconds[s][FIRST:]) for s in (*STAGES, *WEIGHTS, "step")}))
    said = f"Seconds, medians of {args.steps} steps of {configs[0].train.batch} samples; one sampler, one train worker."
    print("", *lines, "", said, sep="\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: nothing runs any more")
