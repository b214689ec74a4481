"""Measure the parts of an alignment, without checkpoints or network; all but `reward` and `images` without ray.

    python -m pipelines.benchmark update --model sd35 --random-weights
    python -m pipelines.benchmark update --model flux1 --random-weights --full --gradient-checkpointing --batch 2
    python -m pipelines.benchmark fits --caps 24 48 80
    python -m pipelines.benchmark reward
    python -m pipelines.benchmark images --clients 32 --seconds 60

`update` measures one step at a time against the whole graph, on the GPU if there is one, and says what fits for its model;
`fits` counts that for all models, without a GPU; `reward` compares the reward service, on a local cluster, with a call in one
process, and kills a replica of it under load; `images` asks the text-to-image service, on a local cluster, one by one and with
many clients at once, while a replica is killed and an adapter replaced. Each table in Markdown is followed by its figures as one
line of JSON.
"""

import argparse
import json
import sys

from pipelines import refuse

STEPS = 25  # of the published samplers
RANK = 16


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    update = commands.add_parser("update", help="memory and time of an update against the active steps, and what fits")
    update.add_argument("--model", required=True, help="sd35, flux1 or flux2")
    update.add_argument(
        "--random-weights", action="store_true", required=True, help="no checkpoint: what is measured does not depend on values"
    )
    update.add_argument("--full", action="store_true", help=f"train all weights (default: an adapter of rank {RANK})")
    update.add_argument("--gradient-checkpointing", action="store_true", help="keep what enters each block and no more")
    update.add_argument("--batch", type=int, default=1, help="samples of the micro-batch (default: %(default)s)")
    update.add_argument(
        "--active", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K", help="active steps (default: 1 2 4 8)"
    )
    update.add_argument("--height", type=int, default=512, help="of the pictures, in pixels (default: %(default)s)")
    update.add_argument("--width", type=int, default=512, help="of the pictures, in pixels (default: %(default)s)")
    update.add_argument("--repeats", type=int, default=3, help="timed runs, whose median is taken (default: %(default)s)")
    fits = commands.add_parser("fits", help="the largest micro-batch under caps of memory, counted: needs no GPU")
    fits.add_argument("--model", help="one of sd35, flux1, flux2 (default: all)")
    reward = commands.add_parser("reward", help="milliseconds and bytes of the reward service over a call in one process")
    reward.add_argument("--repeats", type=int, default=20, help="requests whose median is taken (default: %(default)s)")
    reward.add_argument("--clients", type=int, default=4, help="that ask at once, later on (default: %(default)s)")
    images = commands.add_parser("images", help="the text-to-image service under load, and what of it fails")
    images.add_argument("--clients", type=int, default=32, help="that ask at once (default: %(default)s)")
    images.add_argument("--seconds", type=float, default=60, help="of load (default: %(default)s)")
    images.add_argument("--replicas", type=int, default=2, help="that sample (default: %(default)s)")
    for command in (update, fits):
        command.add_argument(
            "--caps", type=float, nargs="+", default=[24, 48, 80], metavar="GB", help="GPUs' memory (default: 24 48 80)"
        )
    args = parser.parse_args(given)
    if args.command == "update":
        for name, numbers in {"batch": [args.batch], "repeats": [args.repeats], "active": args.active}.items():
            if min(numbers) < 1:
                parser.error(f"--{name} {min(numbers)}: at least 1 is needed")
        if max(args.active) > STEPS:
            parser.error(f"--active {max(args.active)}: the sampler has {STEPS} steps, and no more can be active")
    if args.command == "reward":
        if min(args.repeats, args.clients) < 1:
            parser.error(f"--repeats {args.repeats} --clients {args.clients}: at least 1 of each is needed")
        return args
    if args.command == "images":
        if min(args.clients, args.replicas, args.seconds) < 1:
            parser.error(
                f"--clients {args.clients} --replicas {args.replicas} --seconds {args.seconds:g}: at least 1 of each is needed"
            )
        return args
    if min(args.caps) <= 0:
        parser.error(f"--caps {min(args.caps):g}: a GPU has more than 0 GB")
    return args


def main(given: list[str] | None = None) -> None:
    """Run one command."""
    args = arguments(given)
    from pipelines import quiet_libraries

    quiet_libraries()
    if args.command == "reward":
        from pipelines import reward_cost

        rows = reward_cost.measure(args.repeats, args.clients, lambda text: print(text, file=sys.stderr))
        print(reward_cost.table(rows))
        print(json.dumps(rows))
        return
    if args.command == "images":
        from pipelines import image_load

        row = image_load.measure(args.clients, args.seconds, args.replicas, lambda text: print(text, file=sys.stderr))
        print(image_load.table(row))
        print(json.dumps(row))
        return
    from flowbp_ray.backbones.published import PUBLISHED
    from pipelines import full_size

    if args.model not in (None, *PUBLISHED):
        sys.exit(f"--model {args.model}: the published configurations are {', '.join(PUBLISHED)}")
    if args.command == "update":
        try:
            full_size.update(args)
        except ValueError as error:  # a size that the model does not make
            refuse(error)
    full_size.fits([args.model] if args.model else list(PUBLISHED), args.caps)


if __name__ == "__main__":
    main()
