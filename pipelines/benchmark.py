"""Measure the parts of an alignment, without checkpoints or network.

    python -m pipelines.benchmark update --model sd35 --random-weights
    python -m pipelines.benchmark update --model flux1 --random-weights --full --gradient-checkpointing --batch 2
    python -m pipelines.benchmark fits --caps 24 48 80
    python -m pipelines.benchmark rollout
    python -m pipelines.benchmark rollout --model sd35 --random-weights --compile
    python -m pipelines.benchmark stages --model sd35 --random-weights --batch 4
    python -m pipelines.benchmark attention --model flux1 --random-weights --height 1024 --width 1024
    python -m pipelines.benchmark wire
    python -m pipelines.benchmark reward
    python -m pipelines.benchmark publish
    python -m pipelines.benchmark pipeline train.batch=24
    python -m pipelines.benchmark scale --series balanced --factor 1
    python -m pipelines.benchmark scale --series balanced --samplers 8 --without looks rewards
    python -m pipelines.benchmark images --clients 32 --seconds 60

`update` measures one step at a time against the whole graph, on the GPU if there is one, and says what fits for its model;
`fits` counts that for all models, without a GPU, and what `reward.decoder` saves; `rollout` compares sampling with the stock
diffusers pipeline, of a published model on the GPU if there is one; `stages` times a micro-batch through the sampler, rewards
and learner of a published model, in one process; `attention` times its velocities by each of diffusers' backends; `wire` counts
what a sample has on its way to the trainer. The others start a local cluster: `reward` compares the reward service with a call
in one process, and kills a replica of it under load; `publish` times weights on their way to samplers; `pipeline` compares the
whole system with a loop in one process; `scale` has the real orchestration drive stages that only wait, up to 16 samplers, and
with --without leaves out one part of it after the other; `images` asks the text-to-image service one by one and with many
clients at once, while a replica is killed and an adapter replaced.

Each table in Markdown is followed by its figures as one line of JSON; --mlflow keeps both in an MLflow run too.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from flowbp_ray.config import ConfigError
from pipelines import refuse

STEPS = 25  # of the published samplers
RANK = 16
#: Options that are numbers of something.
COUNTS = {"batch", "repeats", "active", "clients", "replicas", "seconds", "samplers", "steps", "height", "width"}
SERIES = ("balanced", "samplers", "stragglers", "publish")
#: Of the stream of rollouts, what `scale` can leave out: the names in `pipelines.without`.
PARTS = ("looks", "sizes", "rewards", "samplers", "room")
#: A text, and its figures.
Result = tuple[str, Any]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    update = commands.add_parser("update", help="memory and time of an update against the active steps, and what fits")
    stages = commands.add_parser(
        "stages", help="what sampling, rewards and an update take of a micro-batch, at full size; writes the model to $TMPDIR"
    )
    stages.add_argument("--peft-cast", action="store_true", help="with the adapter computed as PEFT does, not as here")
    update.add_argument("--full", action="store_true", help=f"train all weights (default: an adapter of rank {RANK})")
    update.add_argument("--gradient-checkpointing", action="store_true", help="keep what enters each block and no more")
    update.add_argument(
        "--active", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K", help="active steps (default: 1 2 4 8)"
    )
    update.add_argument("--repeats", type=int, default=3, help="timed runs, whose median is taken (default: %(default)s)")
    rollout = commands.add_parser("rollout", help="sampling beside the stock diffusers pipeline, for equal work")
    rollout.add_argument("--repeats", type=int, default=10, help="runs of each, in turn (default: %(default)s)")
    attention = commands.add_parser(
        "attention", help="what cluster.attention gains: a velocity and an active step by each backend"
    )
    attention.add_argument("--repeats", type=int, default=5, help="timed runs, whose median is taken (default: %(default)s)")
    for command, batch in ((update, 1), (stages, 2), (rollout, 4), (attention, 1)):
        embedded = " (default: the embedded default, of 64×64 pixels)" if command is rollout else ""
        models = "flux1 or flux2" if command is attention else "sd35, flux1 or flux2"
        command.add_argument("--model", required=command is not rollout, help=f"{models}{embedded}")
        command.add_argument(
            "--random-weights",
            action="store_true",
            required=command is not rollout,
            help="no checkpoint: what is measured does not depend on values",
        )
        command.add_argument("--batch", type=int, default=batch, help="samples of a micro-batch (default: %(default)s)")
        command.add_argument("--height", type=int, help="of a published model's pictures, in pixels (default: 512)")
        command.add_argument("--width", type=int, help="of a published model's pictures, in pixels (default: 512)")
        if command is not attention:
            compiled = "with cluster.compile" if command is stages else "what cluster.compile gains too"
            command.add_argument("--compile", action="store_true", help=compiled)
    fits = commands.add_parser("fits", help="the largest micro-batch under caps of memory, counted: needs no GPU")
    fits.add_argument("--model", help="one of sd35, flux1, flux2 (default: all)")
    wire = commands.add_parser("wire", help="what a sample has on its way to the trainer, counted")
    wire.add_argument("--model", help="one of sd35, flux1, flux2 (default: all)")
    reward = commands.add_parser("reward", help="milliseconds and bytes of the reward service over a call in one process")
    reward.add_argument("--repeats", type=int, default=20, help="requests whose median is taken (default: %(default)s)")
    reward.add_argument("--clients", type=int, default=4, help="that ask at once, later on (default: %(default)s)")
    publish = commands.add_parser("publish", help="weights on their way to samplers, beside a plain copy")
    publish.add_argument("--samplers", type=int, nargs="+", default=[1, 4], help="that load at once (default: 1 4)")
    pipeline = commands.add_parser("pipeline", help="the whole system beside a loop in one process")
    pipeline.add_argument(
        "changes", nargs="*", metavar="section.setting=value", help="what to change in configs/shapes/sparse.yaml"
    )
    pipeline.add_argument("--steps", type=int, default=10, help="measured steps a run (default: %(default)s)")
    scale = commands.add_parser("scale", help="the real orchestration between stages that only wait")
    scale.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES), help="what to vary (default: all)")
    scale.add_argument("--samplers", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="how many (default: 1 2 4 8 16)")
    scale.add_argument("--factor", type=float, default=0.25, help="on all durations (default: %(default)s)")
    scale.add_argument(
        "--without", nargs="+", choices=PARTS, default=[], help="then all of it without each of these parts (default: none)"
    )
    scale.add_argument("--steps", type=int, default=8, help="measured steps a run (default: %(default)s)")
    images = commands.add_parser("images", help="the text-to-image service under load, and what of it fails")
    images.add_argument("--clients", type=int, default=32, help="that ask at once (default: %(default)s)")
    images.add_argument("--seconds", type=float, default=60, help="of load (default: %(default)s)")
    images.add_argument("--replicas", type=int, default=2, help="that sample (default: %(default)s)")
    for command in (update, fits):
        command.add_argument(
            "--caps", type=float, nargs="+", default=[24, 48, 80], metavar="GB", help="GPUs' memory (default: 24 48 80)"
        )
    for command in commands.choices.values():
        command.add_argument(
            "--mlflow", nargs="?", const="", metavar="URI", help="keep the result in MLflow too (default: where alignments are)"
        )
    args = parser.parse_args(given)
    for name, value in vars(args).items():
        numbers = value if isinstance(value, list) else [value]
        if name == "caps" and min(numbers) <= 0:
            parser.error(f"--caps {min(numbers):g}: a GPU has more than 0 GB")
        if name == "factor" and value <= 0:
            parser.error(f"--factor {value:g}: it has to be more than 0")
        if name in COUNTS and None not in numbers and min(numbers) < 1:
            parser.error(f"--{name} {min(numbers):g}: at least 1 is needed")
    if args.command == "rollout" and (
        bool(args.model) != args.random_weights or (not args.model and (args.height or args.width))
    ):
        parser.error("--model NAME --random-weights is a published model; without, the embedded default makes 64×64 pixels")
    if args.command in {"update", "stages", "rollout", "attention"}:
        args.height, args.width = args.height or 512, args.width or 512
    if args.command == "update" and max(args.active) > STEPS:
        parser.error(f"--active {max(args.active)}: the sampler has {STEPS} steps, and no more can be active")
    return args


def results(args: argparse.Namespace) -> Iterator[Result]:
    """What a command finds. ConfigError or ValueError for bad input."""

    def told(text: str) -> None:
        print(text, file=sys.stderr)

    if args.command == "rollout":
        from pipelines import rollout_cost

        if args.model:
            (name,) = named(args)
            subject = rollout_cost.published(name, args.batch, args.height, args.width)
        else:
            subject = rollout_cost.embedded(args.batch)
        found = rollout_cost.measure(subject, args.repeats, args.compile, told)
        yield rollout_cost.table(found), found
    elif args.command == "stages":
        from pipelines import stage_cost

        (name,) = named(args)
        how = {"compiled": args.compile, "peft_cast": args.peft_cast}
        found = stage_cost.measure(name, args.batch, args.height, args.width, **how, told=told)
        yield stage_cost.table(found), found
    elif args.command == "attention":
        from pipelines import attention_cost

        (name,) = named(args)
        found = attention_cost.measure(name, args.batch, args.height, args.width, args.repeats, told)
        yield attention_cost.table(found), found
    elif args.command == "reward":
        from pipelines import reward_cost

        rows = reward_cost.measure(args.repeats, args.clients, told)
        yield reward_cost.table(rows), rows
    elif args.command == "publish":
        from pipelines import publish_cost

        rows = publish_cost.measure(args.samplers, told)
        yield publish_cost.table(rows), rows
    elif args.command == "pipeline":
        from pipelines import monolith

        rows = monolith.measure(args.changes, args.steps, told)
        yield monolith.table(rows), rows
    elif args.command == "scale":
        from pipelines import scale

        rows = scale.measure(args.series, args.samplers, args.factor, args.steps, args.without, told)
        yield scale.table(rows), rows
    elif args.command == "images":
        from pipelines import image_load

        row = image_load.measure(args.clients, args.seconds, args.replicas, told)
        yield image_load.table(row), row
    else:
        yield from counted(args)


def named(args: argparse.Namespace) -> list[str]:
    """The published model that is asked for, or all; ValueError for another one."""
    from flowbp_ray.backbones.published import PUBLISHED

    if args.model not in (None, *PUBLISHED):
        raise ValueError(f"--model {args.model}: the published configurations are {', '.join(PUBLISHED)}")
    return [args.model] if args.model else list(PUBLISHED)


def counted(args: argparse.Namespace) -> Iterator[Result]:
    """Of the published models: what needs neither ray nor MLflow."""
    from pipelines import fits, full_size, wire

    names = named(args)
    if args.command == "wire":
        rows = wire.counted(names)
        yield wire.table(rows), rows
        return
    if args.command == "update":
        yield full_size.update(args)
    yield fits.fits(names, args.caps)
    if args.command == "fits":
        yield fits.decoders(names)


def keep(uri: str, command: str, given: dict[str, Any], found: list[Result]) -> str:
    """Log the tables, the figures and, of each row, its numbers by its position as the step; where that is."""
    from mlflow import MlflowClient

    from flowbp_ray.tracking.run import CHECKOUT, TrackedRun, code_version
    from flowbp_ray.tracking.store import tracking_uri

    store = tracking_uri(uri or None)
    client = MlflowClient(store)
    with TrackedRun.new(store, "flowbp_ray benchmarks", f"{command} {time.strftime('%Y-%m-%d %H:%M')}") as run:
        for key, value in given.items():
            client.log_param(run.run_id, key, value)
        for key, value in code_version(CHECKOUT).items():
            client.set_tag(run.run_id, key, value)
        for number, (text, figures) in enumerate(found):
            run.text(text, f"{number}.md")
            run.text(json.dumps(figures), f"{number}.json")
            rows = figures if isinstance(figures, list) else figures.get("rows", [figures])
            for step, row in enumerate(rows):
                for key, value in row.items():
                    if isinstance(value, int | float) and not isinstance(value, bool):
                        client.log_metric(run.run_id, f"{number}/{key}", value, step=step)
    return run.info()["page"]


def main(given: list[str] | None = None) -> None:
    """Run one command."""
    args = arguments(given)
    from pipelines import quiet_libraries

    quiet_libraries()
    found = []
    try:
        for text, figures in results(args):
            print(f"{text}\n")
            print(json.dumps(figures), end="\n\n")
            found.append((text, figures))
        if args.mlflow is not None:
            print(f"kept in {keep(args.mlflow, args.command, {k: v for k, v in vars(args).items() if k != 'mlflow'}, found)}")
    except (ConfigError, ValueError, OSError) as error:
        refuse(error)
    except Exception as error:  # the boundary to the user, as in align
        if "ray" not in sys.modules:
            raise
        from pipelines.causes import reason

        sys.exit(f"\nstopped: {reason(error)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: nothing runs any more")
