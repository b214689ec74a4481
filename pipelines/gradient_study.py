"""Measure how near each method's expected gradient is to the exact one: angle, size, variance, growth, connector error.

    python -m pipelines.gradient_study
    python -m pipelines.gradient_study configs/shapes/leapalign.yaml sampling.guidance_scale=1 --samples 24 --draws 32
    python -m pipelines.gradient_study adapter.init_from=~/.flowbp_ray/runs/.../adapter --lengths 6 12 24

Without a configuration it is configs/shapes/sparse.yaml's model, prompts and reward, without the reward's clip. The configured
surrogate is studied as it is, every other method with its published settings for Stable Diffusion 3.5. No cluster; minutes on
one core.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from flowbp_ray.config import AlignConfig, ConfigError, dump, load
from pipelines import checking, ending, page_of, parsed
from pipelines.study_report import GROWTH_DRAWS, Connectors, picture, table

DEFAULT = Path(__file__).parents[1] / "configs" / "shapes" / "sparse.yaml"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.gradient_study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "given", nargs="*", metavar="config | section.setting=value", help="a YAML file, and what to change in it"
    )
    parser.add_argument("--samples", type=int, default=10, help="samples of every gradient (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=16, help="draws of every method's plan (default: %(default)s)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[4, 8, 12, 16, 24],
        metavar="T",
        help="sampling steps at which norms are measured (default: 4 8 12 16 24)",
    )
    parser.add_argument("--output", type=Path, help="folder of the results (default: a new one among the runs)")
    args = parsed(parser)
    if len(args.files) > 1:
        parser.error(f"one configuration is studied at a time, not {' and '.join(map(str, args.files))}")
    args.file = args.files[0] if args.files else DEFAULT
    for name, least in (("samples", 2), ("draws", 3)):
        if (number := vars(args)[name]) < least:
            parser.error(f"--{name} {number}: at least {least} are needed, to see how much they differ")
    if min(args.lengths) < 1:
        parser.error(f"--lengths {min(args.lengths)}: a trajectory has at least one step")
    args.lengths = sorted(set(args.lengths))
    return args


def main() -> None:
    """Check, measure, then write, log and print."""
    args = arguments()
    with checking():
        from flowbp_ray.tracking.store import tracking_uri

        config = load(args.file, args.overrides)
        tracking_uri(config.tracking.uri)  # what is wrong with it is said now, and not after minutes
        if config.adapter is None:
            raise ConfigError(f"{args.file} trains all weights, and gradients are studied of an adapter's: set adapter={{}}")
        from pipelines import quiet_libraries

        quiet_libraries()
    folder = (args.output or config.output / f"{time.strftime('%Y%m%d-%H%M%S')}-gradient_study").expanduser().absolute()
    with ending("there are no results"):
        study(config, args, folder)


def study(config: AlignConfig, args: argparse.Namespace, folder: Path) -> None:
    """Measure everything and report it."""
    import torch
    from tqdm import tqdm

    from flowbp_ray.training.study import PUBLISHED, Study, methods_of
    from serve import rewards

    # Where a clip cuts the reward off a sample has no gradient, and nothing is there to be compared.
    unclipped = [component.model_copy(update={"clip": None}) for component in config.reward.components]
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"components": unclipped})})
    methods, left_out = methods_of(config)
    for sentence in left_out:
        print(sentence, file=sys.stderr)
    growing = {name: s for name, s in methods.items() if name in (*PUBLISHED, config.surrogate.method, "full")}
    service = rewards.here(config)

    def gradient(latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return torch.from_numpy(service.score(latents.cpu().numpy(), prompts)["gradient"]).to(latents.device)

    studied = Study(config, args.samples, gradient)
    folder.mkdir(parents=True, exist_ok=True)
    draws = args.draws * len(methods) + GROWTH_DRAWS * len(growing) * len(args.lengths)
    with tqdm(total=draws, unit="draw", desc=f"{config.sampling.steps} steps") as bar:
        trajectory = studied.trajectory(config.sampling.steps)
        connectors: Connectors = {}
        for (order, length), error in trajectory.connector_errors().items():
            connectors.setdefault(order, {})[length] = error
        compared = studied.compared(trajectory, methods, args.draws, bar.update)
        growth = []
        for steps in args.lengths:
            bar.set_description(f"length {steps}")
            growth.append(studied.growth(steps, growing, GROWTH_DRAWS, bar.update))
    text = table(config, args, compared, growth, connectors)
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    figures = {
        "samples": args.samples,
        "draws": args.draws,
        "methods": {name: s.model_dump(mode="json") for name, s in methods.items()},
        "compared": {name: asdict(c) for name, c in compared.items()},
        "growth": [asdict(g) for g in growth],
        "connector_errors": connectors,
    }
    (folder / "figures.json").write_text(json.dumps(finite(figures), indent=1) + "\n", encoding="utf-8")
    picture(folder / "gradient_study.png", compared, growth, connectors)
    print(f"\n{text}")
    print(*sorted(folder.iterdir()), sep="\n")
    print(track(config, args, figures, folder))


def finite(node: Any) -> Any:
    """What JSON can say: null for what could not be seen."""
    if isinstance(node, dict):
        return {k: finite(v) for k, v in node.items()}
    if isinstance(node, list):
        return [finite(v) for v in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def track(config: AlignConfig, args: argparse.Namespace, figures: dict[str, Any], folder: Path) -> str:
    """An MLflow run of its own, with curves over lengths and leaps; returns what a person is told of it."""
    from flowbp_ray.tracking.run import TrackedRun
    from flowbp_ray.tracking.store import tracking_uri

    size = {"samples": args.samples, "draws": args.draws, "lengths": args.lengths}
    logged = config.model_dump(mode="json") | {"surrogate": {"method": "gradient_study", **figures["methods"]}, "study": size}
    name = config.tracking.run_name or "gradient_study"
    seen = {f"{m}/{k}": v for m, values in figures["compared"].items() for k, v in values.items() if math.isfinite(v)}
    with TrackedRun(tracking_uri(config.tracking.uri), config.tracking.experiment, name, config=logged) as run:
        run.metrics(seen, 0)
        for g in figures["growth"]:
            chain = {"chain/median": median(g["chain"]), "chain/largest": max(g["chain"])}
            run.metrics({f"growth/{m}": v for m, v in g["norms"].items()} | chain, g["steps"])
        for order, by_length in figures["connector_errors"].items():
            for length, error in by_length.items():
                run.metrics({f"connector_error/order_{order}": error}, length)
        run.text((folder / "table.md").read_text(encoding="utf-8"), "table.md")
        for file in ("figures.json", "gradient_study.png"):
            run.artifact(folder / file)
    info = run.info()
    return f"MLflow run {info['run_id']}: {page_of(info)}"


if __name__ == "__main__":
    main()
