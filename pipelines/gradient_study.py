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
from typing import TYPE_CHECKING, Any

from flowbp_ray.config import AlignConfig, ConfigError, dump, load
from pipelines import files_and_overrides, refuse

if TYPE_CHECKING:
    from flowbp_ray.training.study import Comparison, Growth

    Connectors = dict[int, dict[int, float]]  # errors by order and length of the leap

DEFAULT = Path(__file__).parents[1] / "configs" / "shapes" / "sparse.yaml"
GROWTH_DRAWS = 2  # of each method at each length: norms need fewer than directions
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d1f")


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
    args = parser.parse_intermixed_args()
    files, args.overrides = files_and_overrides(args.given)
    if len(files) > 1:
        parser.error(f"one configuration is studied at a time, not {' and '.join(map(str, files))}")
    args.file = files[0] if files else DEFAULT
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
    from flowbp_ray.tracking.store import tracking_uri

    try:
        config = load(args.file, args.overrides)
        tracking_uri(config.tracking.uri)  # what is wrong with it is said now, and not after minutes
    except (ConfigError, ValueError) as error:
        refuse(error)
    from pipelines import quiet_libraries

    quiet_libraries()
    from pipelines.causes import reason

    folder = (args.output or config.output / f"{time.strftime('%Y%m%d-%H%M%S')}-gradient_study").expanduser().absolute()
    try:
        study(config, args, folder)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: there are no results")
    except Exception as error:  # the boundary to the user, as in align
        sys.exit(f"\nstopped: {reason(error)}")


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


def number(value: float, form: str = ".2f") -> str:
    """For the table; a dash where too few draws show nothing but noise, or nothing was measured."""
    return f"{value:{form}}" if math.isfinite(value) else "–"


def table(
    config: AlignConfig,
    args: argparse.Namespace,
    compared: "dict[str, Comparison]",
    growth: "list[Growth]",
    connectors: "Connectors",
) -> str:
    """Three tables in Markdown."""

    def rows(head: list[str], body: list[list[str]]) -> list[str]:
        ruler = "| --- |" + " ---: |" * (len(head) - 1)
        return ["| " + " | ".join(head) + " |", ruler, *("| " + " | ".join(cells) + " |" for cells in body), ""]

    steps, scale = config.sampling.steps, config.sampling.guidance_scale
    lines = rows(
        ["method", "angle", "sample's angle", "norm", "sample's norm", "variance", "plans"],
        [
            [
                name,
                f"{number(c.angle, '.1f')} ± {number(c.angle_error, '.1f')}",
                f"{number(c.sample_angle, '.1f')} of {c.samples_seen}",
                f"{number(c.norm)} ± {number(c.norm_error)}",
                number(c.sample_norm),
                number(c.variance),
                str(c.plans),
            ]
            for name, c in compared.items()
        ],
    )
    lines += [
        f"Expected parameter gradient of {args.samples} samples' mean objective beside the exact one, which is `full`: {steps} "
        f"steps, guidance {scale:g}, {args.draws} draws. Angles are in degrees, ± one standard error; a sample's is the median "
        "over samples, of as many as noise does not hide. Norms are in units of the exact one, the variance E|g − E g|²/|E g|² "
        "is over draws. "
        f"`{config.surrogate.method}` is as configured, others as published; `truncated_{steps}` differs from `full` only in "
        "guidance's negative branch, which is detached.",
        "",
    ]
    names = list(growth[-1].norms)
    lines += rows(
        ["steps", *names, "chain, median", "chain, largest"],
        [
            [
                str(g.steps),
                *(number(v, ".3g") for v in [*(g.norms.get(n, math.nan) for n in names), median(g.chain), max(g.chain)]),
            ]
            for g in growth
        ],
    )
    lines += [
        f"Norm of the gradient by number of steps (root mean square of {GROWTH_DRAWS} draws; – where a method's settings do not "
        "go with so few steps), and |∂J/∂x_0| / |∂J/∂x_T| along the exact chain over samples.",
        "",
    ]
    lines += rows(
        ["leap, in steps", "Euler", *(f"Lagrange {order}" for order in list(connectors)[1:])],
        [[str(length), *(f"{errors[length]:.4f}" for errors in connectors.values())] for length in connectors[1]],
    )
    lines += [f"Connector error: mean |x_target − predicted| over samples and starts of a leap on the grid of {steps} steps.", ""]
    return "\n".join(lines)


def picture(file: Path, compared: "dict[str, Comparison]", growth: "list[Growth]", connectors: "Connectors") -> None:
    """Six panels: angle, norm and variance of each method; growth of norms and of the chain; connector errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    page, panels = plt.subplots(2, 3, figsize=(15, 8.5))
    (angle, norm, variance), (grown, chain, connector) = panels
    names = list(compared)
    places = range(len(names))
    for panel, kinds, title in (
        (angle, ("angle", "sample_angle"), "angle to the exact gradient, degrees"),
        (norm, ("norm", "sample_norm"), "norm, in units of the exact gradient's"),
    ):
        for kind, shift, colour, label in zip(
            kinds, (-0.2, 0.2), COLOURS, ("mean of the samples", "median sample"), strict=False
        ):
            values = [vars(compared[n])[kind] for n in names]
            whiskers = [vars(compared[n])[f"{kind}_error"] for n in names] if shift < 0 else None
            panel.barh([p + shift for p in places], values, 0.38, xerr=whiskers, color=colour, label=label)
        panel.set_title(title, fontsize=10)
    angle.legend(fontsize=8, loc="lower right")
    angle.axvline(90, color="#999999", linewidth=0.8)
    norm.axvline(1, color="#999999", linewidth=0.8)
    norm.set_xscale("log")
    variance.barh(places, [compared[n].variance for n in names], 0.6, color=COLOURS[2])
    variance.set_title("variance over draws, in units of |expected gradient|²", fontsize=10)
    for panel in panels[0]:
        panel.set_yticks(places, names if panel is angle else [])
        panel.invert_yaxis()
    for place, name in enumerate(growth[-1].norms):
        points = [(g.steps, g.norms[name]) for g in growth if name in g.norms]
        colour, width = ("black", 2.5) if name == "full" else (COLOURS[place % len(COLOURS)], 1.3)
        grown.plot(*zip(*points, strict=True), color=colour, linewidth=width, marker="o", markersize=4, label=name)
    exact = [g.sample_norms["full"] for g in growth]
    grown.plot([g.steps for g in growth], exact, color="black", linestyle="--", label="full, median sample")
    grown.set_title("norm of the mean gradient", fontsize=10)
    lengths = [g.steps for g in growth]
    for g in growth:
        chain.plot([g.steps] * len(g.chain), g.chain, "o", color=COLOURS[4], alpha=0.6, markersize=5)
    chain.plot(lengths, [median(g.chain) for g in growth], color="black", label="median sample")
    chain.plot(lengths, [max(g.chain) for g in growth], color=COLOURS[5], label="largest")
    chain.axhline(1, color="#999999", linewidth=0.8)
    chain.set_title("|∂J/∂x_0| / |∂J/∂x_T| along the exact chain", fontsize=10)
    for panel in (grown, chain):
        panel.set_yscale("log")
        panel.set_xticks(lengths)
        panel.set_xlabel("sampling steps T")
        panel.legend(fontsize=8)
    for order, errors in connectors.items():
        label = "Euler" if order == 1 else f"Lagrange {order}"
        connector.plot(*zip(*errors.items(), strict=True), color=COLOURS[order - 1], marker="o", markersize=4, label=label)
    connector.set_title("connector error, mean |x_target − predicted|", fontsize=10)
    connector.set_xlabel("leap, in steps")
    connector.legend(fontsize=8)
    page.tight_layout()
    page.savefig(file, dpi=110)
    plt.close(page)


def track(config: AlignConfig, args: argparse.Namespace, figures: dict[str, Any], folder: Path) -> str:
    """An MLflow run of its own, with curves over lengths and leaps; returns what a person is told of it."""
    from flowbp_ray.tracking.run import TrackedRun
    from flowbp_ray.tracking.store import tracking_uri

    size = {"samples": args.samples, "draws": args.draws, "lengths": args.lengths}
    logged = config.model_dump(mode="json") | {"surrogate": {"method": "gradient_study", **figures["methods"]}, "study": size}
    name = config.tracking.run_name or "gradient_study"
    run = TrackedRun(tracking_uri(config.tracking.uri), config.tracking.experiment, name, config=logged)
    seen = {f"{m}/{k}": v for m, values in figures["compared"].items() for k, v in values.items() if math.isfinite(v)}
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
    run.finish("FINISHED")
    info = run.info()
    return f"MLflow run {info['run_id']}: {info['page']}" + (f"   after: {info['command']}" if info["command"] else "")


if __name__ == "__main__":
    main()
