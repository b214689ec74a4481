"""Count what an update costs on a real transformer: peak bytes of its tensors, and FLOPs, against the active steps.

    python -m pipelines.update_cost
    python -m pipelines.update_cost configs/shapes/sparse.yaml adapter.rank=64 --steps 12

Without a configuration it is configs/shapes/sparse.yaml's model.
Counts, not timings: the same on every machine. The walk of this project has one velocity alive at a time; beside it stands
the surrogate's whole graph, as plain autograd keeps it. Writes a table and a plot.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbp_ray.config import AlignConfig, ConfigError, load
from pipelines import check_lasts, checking, ending, parsed

if TYPE_CHECKING:
    from torch import Tensor

    from flowbp_ray.backbones.backbone import Backbone, Conditioning
    from flowbp_ray.surrogate.backward import Guidance
    from flowbp_ray.surrogate.plan import Plan

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
    args = parsed(parser)
    if len(args.files) > 1:
        parser.error(f"one configuration is counted at a time, not {' and '.join(map(str, args.files))}")
    args.file = args.files[0] if args.files else RECIPE
    if args.steps < 2 or args.samples < 1:
        parser.error(f"--steps {args.steps} --samples {args.samples}: at least 2 steps and 1 sample are needed")
    return args


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """Peak bytes of all tensors that are made, and FLOPs forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    from flowbp_ray.training.memory import peak

    most = peak(run)
    with FlopCounterMode(display=False) as flops:
        run()
    return most, flops.get_total_flops()


@dataclass(frozen=True)
class Update:
    """A micro-batch's update at random latents: what it costs does not depend on their values."""

    backbone: "Backbone"
    text: "Conditioning"
    negative: "Conditioning"
    guidance: "Guidance"
    scale: float
    #: The grid, ``(T + 1,)``.
    sigmas: "Tensor"
    #: ``(B, C, h, w)``, the same at every step.
    latents: "Tensor"

    def __post_init__(self) -> None:
        """Gradients are there from the start, as from the second micro-batch of a step on."""
        import torch

        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)

    @property
    def trained(self) -> "list[Tensor]":
        """The parameters that receive gradients."""
        return [p for p in self.backbone.transformer.parameters() if p.requires_grad]

    def plan(self, method: str, **settings: Any) -> "Plan":
        """A method's plan on the grid."""
        import numpy as np

        from flowbp_ray.surrogate.methods import METHODS

        made = METHODS[method].settings(**settings)
        return METHODS[method].plan(made, self.sigmas, np.random.default_rng(0))

    def walk(self, plan: "Plan") -> None:
        """As a train worker does it."""
        import torch

        from flowbp_ray.training.update import accumulate

        accumulate(
            self.backbone,
            plan,
            self.sigmas,
            {a.index: self.latents for a in plan.active},
            [torch.ones_like(self.latents)],
            torch.ones(len(self.latents), device=self.latents.device),
            self.text,
            self.negative,
            guidance=self.guidance,
            guidance_scale=self.scale,
            batch=len(self.latents),
        )

    def whole_graph(self, plan: "Plan") -> None:
        """The same gradient without bridges, all velocities alive until one backward (negative branch detached)."""
        from flowbp_ray.surrogate.backward import branches

        factor = branches(plan, self.guidance)["conditional"]
        moved = sum(a.coefficient * factor * self._conditional(a.index) for a in plan.active)
        (-moved.sum() / len(self.latents)).backward()

    def one_velocity(self) -> None:
        """One conditional velocity, forward and backward."""
        self._conditional(0).sum().backward()

    def _conditional(self, index: int) -> "Tensor":
        return self.backbone.branch(self.latents, self.sigmas[index], self.text, self.scale)


def configured(config: AlignConfig, steps: int, samples: int) -> Update:
    """The configured model's."""
    import torch

    from flowbp_ray.training.adapter import adapted, guidance_of

    backbone, sampling = adapted(config, "cpu"), config.sampling
    generators = [torch.Generator().manual_seed(i) for i in range(samples)]
    return Update(
        backbone,
        backbone.encode(["a red ring above a cross"] * samples),
        backbone.encode([""]),
        guidance_of(sampling.guidance_scale, config.surrogate, backbone),
        sampling.guidance_scale,
        backbone.grid(steps, sampling.height, sampling.width),
        backbone.initial_latents(generators, sampling.height, sampling.width),
    )


def main() -> None:
    """Count for a few numbers of active steps."""
    args = arguments()
    with checking():
        config = load(args.file, [*args.overrides, "prompts.embeds=null"])  # its prompt need not be among them
        if config.adapter is None:
            raise ConfigError(f"{args.file} trains all weights, and an adapter's update is counted: set adapter={{}}")
        check_lasts("--output", args.output.absolute().parent)
        from pipelines import quiet_libraries

        quiet_libraries()
    with ending(f"{args.output} was not written"):
        measure(config, args)


def measure(config: AlignConfig, args: argparse.Namespace) -> None:
    """Count, and print and draw it."""
    from tqdm import tqdm

    update = configured(config, args.steps, args.samples)
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
        "| active steps | peak, walk | peak, whole graph | FLOPs an active step |",
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
    panel.set(xlabel="active steps", ylabel="peak of an update's tensors, MiB", ylim=(0, None))
    panel.legend()
    page.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(file, dpi=120)
    plt.close(page)


if __name__ == "__main__":
    main()
