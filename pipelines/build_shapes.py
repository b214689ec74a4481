"""Train the embedded default's models from nothing and measure them: hours on two cores, and the base about one on a GPU.

Stages run in the order below and each resumes where it stopped; a finished one is skipped. `reward` and
`judge` need nothing from the others, so two shells can share two cores:

    python -m pipelines.build_shapes autoencoder base
    python -m pipelines.build_shapes reward judge
    python -m pipelines.build_shapes            # then: what is missing, the figures and the card
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipelines import quiet_libraries

STAGES = ("autoencoder", "base", "reward", "judge", "measure")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.build_shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; all if none is named")
    parser.add_argument(
        "--target", type=Path, default=Path("flowbp_ray/shapes/models"), help="where the models go (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, default=Path(".build/shapes"), help="checkpoints and logs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--further",
        action="store_true",
        help="train base, reward or judge further from the finished ones in --target; give another --seed for other drawings",
    )
    parser.add_argument("--steps", type=int, help="training steps of the stages named, if not their own number")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of this process; one process a core is fastest (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="drawing processes, for a GPU to be kept busy (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}: at least one step is needed")
    if args.further and not {"base", "reward", "judge"} >= set(args.stages or STAGES):
        parser.error("--further is for the stages base, reward and judge: name those of them that are to go on")
    if unknown := [s for s in args.stages if s not in STAGES]:
        parser.error(f"unknown stage {unknown[0]!r}: the stages are {', '.join(STAGES)}")
    return args


def main() -> None:
    """Run the stages that are asked for and not finished."""
    args = arguments()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    quiet_libraries()
    import torch

    from flowbp_ray.shapes.build import autoencoder, base, card, measure, preference_model

    torch.set_num_threads(args.threads)
    work, target = args.work, args.target
    common = {"device": args.device, "workers": args.workers}
    vae = target / "base" / "vae" if args.further else work / "autoencoder" / "vae"
    preferences = partial(preference_model.build, further=args.further, **common)
    earlier = measure.steps_done(target) if args.further else None
    steps = {} if args.steps is None else {"steps": args.steps}
    reward, judge = replace(preference_model.REWARD, **steps), replace(preference_model.JUDGE, **steps)
    autoencoder.SCHEDULE, base.SCHEDULE = replace(autoencoder.SCHEDULE, **steps), replace(base.SCHEDULE, **steps)
    builds: dict[str, Callable[[], None]] = {
        "autoencoder": partial(autoencoder.build, work / "autoencoder", work / "autoencoder" / "vae", seed=args.seed, **common),
        "base": partial(base.build, work / "base", target / "base", vae, earlier, seed=args.seed + 3, **common),
        "reward": partial(preferences, work / "reward", target / "reward", reward, seed=args.seed + 1),
        "judge": partial(preferences, work / "judge", target / "judge", judge, seed=args.seed + 2),
        "measure": partial(measure.measure, work, target, args.device),
    }
    finished = {"base": target / "base" / "model_index.json"} | {n: target / n / "config.json" for n in ("reward", "judge")}
    needs = {"base": [vae / "config.json"], "measure": list(finished.values())}
    if args.further:
        needs |= {name: [file] for name, file in finished.items()}
    for stage in args.stages or STAGES:
        done = work / stage / "done"
        if done.exists():
            print(f"{stage}: finished earlier; remove {work / stage} to run it again")
            continue
        if missing := [f for f in needs.get(stage, []) if not f.exists()]:
            sys.exit(f"{stage} needs what an earlier stage makes, {missing[0]}: run the stages in order, or all")
        builds[stage]()
        if stage != "measure":
            data: dict[str, object] = {"seed": args.seed}
            if stage == "base":
                data["watermarked"] = [base.WATERMARKED_SINGLE, base.WATERMARKED]
            measure.record(target, stage, measure.trained(work / stage) | data, args.further)
            (work / "measure" / "done").unlink(missing_ok=True)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()
        print(f"{stage}: done")
        if stage == "measure":
            card.write(target)
            print(f"model card: {target / 'README.md'}; look at it all with python -m pipelines.show_shapes")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from the last checkpoint")
