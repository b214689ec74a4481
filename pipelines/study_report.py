"""What `pipelines.gradient_study` found, as tables and as a picture."""

import argparse
import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from flowbp_ray.config import AlignConfig

if TYPE_CHECKING:
    from flowbp_ray.training.moments import Comparison
    from flowbp_ray.training.study import Growth

Connectors = dict[int, dict[int, float]]  # errors by order and length of the leap

GROWTH_DRAWS = 2  # of each method at each length: norms need fewer than directions
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d1f")


def number(value: float, form: str = ".2f") -> str:
    """For the table; a dash where too few draws show nothing but noise, or nothing was measured."""
    return f"{value:{form}}" if math.isfinite(value) else "–"


def table(
    config: AlignConfig,
    args: argparse.Namespace,
    compared: "dict[str, Comparison]",
    growth: "list[Growth]",
    connectors: Connectors,
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


def picture(file: Path, compared: "dict[str, Comparison]", growth: "list[Growth]", connectors: Connectors) -> None:
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
