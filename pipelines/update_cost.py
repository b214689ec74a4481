"""Count what an update costs on a real transformer: peak bytes that autograd keeps, and FLOPs, against the active steps.

    python -m pipelines.update_cost
    python -m pipelines.update_cost configs/shapes/sparse.yaml adapter.rank=64 --steps 12

Without a configuration it is configs/shapes/sparse.yaml's model.
Counts, not timings: the same on every machine. The walk of this project has one velocity alive at a time; beside it stands
the surrogate's whole graph, as plain autograd keeps it. Writes a table and a plot.
"""

import argparse
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbp_ray.config import AlignConfig, ConfigError, load

if TYPE_CHECKING:
    from torch import Tensor

RECIPE = Path(__file__).parents[1] / "configs" / "shapes" / "sparse.yaml"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.update_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "given", nargs="*", metavar="config | section.setting=value", help="a YAML file, and what to change in it"
    )
    parser.add_argument("--steps", type=int, default=25, help="sampler steps, and so the most active ones (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="of the micro-batch (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("update_cost.png"), help="the plot (default: %(default)s)")
    args = parser.parse_intermixed_args()
    files = [Path(g) for g in args.given if "=" not in g]
    if len(files) > 1:
        parser.error(f"one configuration is counted at a time, not {' and '.join(map(str, files))}")
    args.file = files[0] if files else RECIPE
    args.overrides = [g for g in args.given if "=" in g]
    if args.steps < 2 or args.samples < 1:
        parser.error(f"--steps {args.steps} --samples {args.samples}: at least 2 steps and 1 sample are needed")
    return args


class Kept:
    """Bytes that autograd's graphs hold, now and at their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, size: int) -> None:
        """Count so many bytes more."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def pack(self, tensor: "Tensor") -> "Held":
        """As `torch.autograd.graph.saved_tensors_hooks` asks: what stands for a tensor as long as a graph needs it."""
        return Held(tensor, self)


class Held:
    """A saved tensor. Weights and inputs are views of what is there anyway, but no graph needs many of them: all count."""

    def __init__(self, tensor: "Tensor", kept: Kept) -> None:
        self.tensor, size = tensor.detach(), tensor.numel() * tensor.element_size()
        kept.add(size)
        weakref.finalize(self, kept.add, -size)


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """Peak bytes kept for backward, and FLOPs forward and backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        run()
    with FlopCounterMode(display=False) as flops:
        run()
    return kept.peak, flops.get_total_flops()


class Update:
    """A micro-batch's update of the configured model at random latents: neither count depends on their values."""

    def __init__(self, config: AlignConfig, steps: int, samples: int) -> None:
        import torch

        from flowbp_ray.training.adapter import adapted, guidance_of

        self.backbone = adapted(config, "cpu")
        self.text = self.backbone.encode(["a red ring above a cross"] * samples)
        self.negative = self.backbone.encode([""])
        sampling = config.sampling
        self.sigmas = self.backbone.grid(steps, sampling.height, sampling.width)
        self.guidance = guidance_of(sampling.guidance_scale, config.surrogate, self.backbone)
        self.scale = sampling.guidance_scale
        generators = [torch.Generator().manual_seed(i) for i in range(samples)]
        self.latents = self.backbone.initial_latents(generators, config.sampling.height, config.sampling.width)

    def plan(self, method: str, **settings: Any) -> Any:
        """A method's plan on the grid."""
        import numpy as np

        from flowbp_ray.surrogate.methods import METHODS

        made = METHODS[method].settings(**settings)
        return METHODS[method].plan(made, self.sigmas.numpy(), np.random.default_rng(0))

    def walk(self, plan: Any) -> None:
        """As a train worker does it."""
        import torch

        from flowbp_ray.training.update import accumulate

        accumulate(
            self.backbone,
            plan,
            self.sigmas,
            {a.index: self.latents for a in plan.active},
            [torch.ones_like(self.latents)],
            torch.ones(len(self.latents)),
            self.text,
            self.negative,
            guidance=self.guidance,
            guidance_scale=self.scale,
            batch=len(self.latents),
        )

    def whole_graph(self, plan: Any) -> None:
        """The same surrogate without bridges, all its velocities alive until one backward (negative branch detached)."""
        moved = sum(a.coefficient * self.backbone.velocity(self.latents, self.sigmas[a.index], self.text) for a in plan.active)
        moved.sum().backward()

    def one_velocity(self) -> None:
        """One conditional velocity, forward and backward."""
        self.backbone.velocity(self.latents, self.sigmas[0], self.text).sum().backward()


def main() -> None:
    """Count for a few numbers of active steps."""
    args = arguments()
    try:
        config = load(args.file, [*args.overrides, "prompts.embeds=null"])  # its prompt need not be among them
    except ConfigError as error:
        sys.exit(str(error))
    from tqdm import tqdm

    from pipelines import quiet_libraries

    quiet_libraries()
    update = Update(config, args.steps, args.samples)
    numbers = sorted({k for k in (1, 2, 4, 8, 16, args.steps) if k <= args.steps})
    _, unit = counted(update.one_velocity)
    rows = []
    for number in tqdm(numbers, desc="count", unit="plan"):
        sparse = update.plan("sparse", active_steps=number)
        rows.append((number, *counted(lambda: update.walk(sparse)), *counted(lambda: update.whole_graph(sparse))))  # noqa: B023
    bridged, _ = counted(lambda: update.walk(update.plan("full")))
    print(table(rows, unit))
    print(f"Exact backpropagation through all {args.steps} steps (a bridge at each): {bridged / 2**20:.1f} MiB.")
    draw(rows, args.output)
    print(args.output.absolute())


def table(rows: list[tuple[int, int, int, int, int]], unit: int) -> str:
    """Markdown; FLOPs in conditional velocities, forward and backward, for each active step."""
    lines = [
        "| active steps | peak kept, walk | peak kept, whole graph | FLOPs an active step |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for number, peak, flops, whole, _ in rows:
        lines.append(f"| {number} | {peak / 2**20:.1f} MiB | {whole / 2**20:.1f} MiB | {flops / number / unit:.3f} |")
    return "\n".join([*lines, "", "FLOPs: in units of one conditional velocity, forward and backward.", ""])


def draw(rows: list[tuple[int, int, int, int, int]], file: Path) -> None:
    """Both curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    page, panel = plt.subplots(figsize=(5.4, 3.4))
    numbers = [r[0] for r in rows]
    panel.plot(numbers, [r[3] / 2**20 for r in rows], "o-", color="#b3261e", label="whole graph")
    panel.plot(numbers, [r[1] / 2**20 for r in rows], "o-", color="#146c2e", label="one velocity at a time")
    panel.set(xlabel="active steps", ylabel="peak kept for backward, MiB", ylim=(0, None))
    panel.legend()
    page.tight_layout()
    page.savefig(file, dpi=120)
    plt.close(page)


if __name__ == "__main__":
    main()
