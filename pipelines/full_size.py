"""Updates of the published models with random weights, measured: on the GPU if there is one."""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flowbp_ray.backbones.backbone import Conditioning
from flowbp_ray.backbones.published import PUBLISHED
from flowbp_ray.surrogate.backward import Guidance
from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.training.adapter import add_adapter
from flowbp_ray.training.memory import peak, size, weights
from pipelines.benchmark import RANK, STEPS
from pipelines.update_cost import Update

GB = 10**9


@dataclass(frozen=True)
class Cost:
    """Of taking a gradient in one way: bytes at the peak beside what was there before, and median seconds."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One number of active steps; None where memory did not suffice."""

    active: int
    walk: Cost | None
    whole: Cost | None
    #: Norm of the difference of both gradients, of the whole graph's norm.
    difference: float | None
    #: An active step's seconds over those of one conditional velocity, forward and backward.
    of_velocity: float | None = None
    #: The walk's seconds by torch.compile, if asked for.
    compiled: float | None = None


def build(
    name: str,
    device: str,
    dtype: torch.dtype,
    *,
    full: bool = False,
    checkpointing: bool = False,
    batch: int = 1,
    height: int = 512,
    width: int = 512,
) -> Update:
    """The update of a published model with random weights; ValueError for a size that it does not make."""
    published = PUBLISHED[name]
    backbone = published.backbone(device, dtype)
    if full:
        backbone.transformer.requires_grad_(True)
    else:
        add_adapter(backbone, rank=RANK, alpha=RANK, targets=backbone.lora_targets(backbone.transformer), seed=0)
    if checkpointing:
        backbone.transformer.enable_gradient_checkpointing()

    def text(number: int) -> Conditioning:
        shapes = published.text.items()
        return Conditioning({k: torch.randn(number, *shape, device=device, dtype=dtype) for k, shape in shapes})

    scale, sigmas = published.guidance_scale, backbone.grid(STEPS, height, width)
    return Update(
        backbone,
        text(batch),
        text(1),
        Guidance() if backbone.embedded_guidance else Guidance(scale),
        scale,
        sigmas if device == "meta" else sigmas.to(device),  # a plan is made of their values
        backbone.initial_latents([torch.Generator().manual_seed(i) for i in range(batch)], height, width),
    )


def timed(run: Callable[[], object]) -> float:
    """Its seconds."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(update: Update, run: Callable[[], None], repeats: int) -> tuple[Cost, list[Tensor]] | None:
    """What ``run`` costs, and its gradients on the CPU; None where the GPU's memory does not suffice."""

    def fresh() -> None:
        for parameter in update.trained:
            parameter.grad.zero_()

    cuda = update.latents.is_cuda
    try:
        if cuda:
            timed(run)  # the first run loads kernels
            fresh()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            timed(run)
            most = torch.cuda.max_memory_allocated() - before
        else:
            fresh()
            most = peak(run)
        gradients = [p.grad.to("cpu", copy=True) for p in update.trained]
        return Cost(most, statistics.median(timed(run) for _ in range(repeats))), gradients
    except torch.OutOfMemoryError:
        pass  # what the traceback holds is freed when this block is left
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return None


def compare(update: Update, active: int, repeats: int) -> Row:
    """One step at a time beside the whole graph, at the same plan."""
    plan = update.plan("sparse", active_steps=active)
    walk = measured(update, lambda: update.walk(plan), repeats)
    whole = measured(update, lambda: update.whole_graph(plan), repeats)
    difference = None
    if walk and whole:
        pairs = [(a.float(), b.float()) for a, b in zip(walk[1], whole[1], strict=True)]
        difference = math.hypot(*((a - b).norm().item() for a, b in pairs)) / math.hypot(*(b.norm().item() for _, b in pairs))
    of_velocity = of_one_velocity(update, plan, active, repeats) if walk else None
    return Row(active, walk[0] if walk else None, whole[0] if whole else None, difference, of_velocity)


def of_one_velocity(update: Update, plan: Plan, active: int, repeats: int) -> float | None:
    """An active step's seconds over those of one velocity, in turn, as a machine's pace changes; None where memory does not
    suffice."""
    try:
        timed(update.one_velocity)  # the first run loads kernels
        turns = [(timed(update.one_velocity), timed(lambda: update.walk(plan))) for _ in range(repeats)]
    except torch.OutOfMemoryError:
        return None
    return statistics.median(steps / active / one for one, steps in turns)


def compiled(update: Update, row: Row, repeats: int) -> Row:
    """The row with the seconds of its walk by torch.compile, if there was memory for it before."""
    if row.walk is None:
        return row
    plan = update.plan("sparse", active_steps=row.active)
    try:
        timed(lambda: update.walk(plan))  # makes the kernels
        return replace(row, compiled=statistics.median(timed(lambda: update.walk(plan)) for _ in range(repeats)))
    except torch.OutOfMemoryError:
        return row


def update(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure: a text, and its figures; SystemExit where not even the model fits. ValueError as `build`."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    sizes = {"batch": args.batch, "height": args.height, "width": args.width}
    try:
        made = build(args.model, device, dtype, full=args.full, checkpointing=args.gradient_checkpointing, **sizes)
    except torch.OutOfMemoryError:
        sys.exit(f"{args.model} with the gradients of what is trained does not fit into the memory of this {where}")
    rows = [compare(made, active, args.repeats) for active in tqdm(args.active, desc="measure")]
    if args.compile:
        made.backbone.compile()
        rows = [compiled(made, row, args.repeats) for row in tqdm(rows, desc="measure compiled")]
    kept = {"weights": weights(made.backbone.transformer), "gradients": size(made.trained)}
    said = (
        f"{args.model}, {'all weights' if args.full else f'an adapter of rank {RANK}'}, gradient checkpointing "
        f"{'on' if args.gradient_checkpointing else 'off'}; {args.batch} of {args.height}×{args.width} pixels; {where}, "
        f"{str(dtype).removeprefix('torch.')}. Peaks are beside {kept['weights'] / GB:.2f} GB of weights and "
        f"{kept['gradients'] / GB:.2f} GB of gradients in the same dtype. Seconds are medians of {args.repeats} runs. The "
        "difference is that of both gradients, relative; last is an active step's time over that of one conditional velocity, "
        "forward and backward. Guidance's negative branch has no gradient: neither evaluates it."
    )
    figures = {"model": args.model, "device": where, "full": args.full, "checkpointing": args.gradient_checkpointing, **sizes}
    return f"{update_table(rows)}\n\n{said}", {**figures, **kept, "rows": [asdict(r) for r in rows]}


def update_table(rows: list[Row]) -> str:
    """Markdown; both ways side by side."""
    head = [
        "active steps",
        "peak, GB",
        "whole graph's",
        "ratio",
        "seconds",
        "whole graph's",
        "ratio",
        "difference",
        "a step : one velocity",
    ]
    if compares := any(row.compiled for row in rows):
        head.append("by torch.compile, of the seconds")
    body = []
    for row in rows:
        cells = [str(row.active)]
        for field, form in (("bytes", lambda v: f"{v / GB:.3f}"), ("seconds", lambda v: f"{v:.3f}")):
            one, other = (cost and getattr(cost, field) for cost in (row.walk, row.whole))
            cells += ["out of memory" if v is None else form(v) for v in (one, other)]
            cells.append(f"{other / one:.2f}" if one and other else "–")
        cells.append("–" if row.difference is None else f"{row.difference:.1e}")
        cells.append("–" if row.of_velocity is None else f"{row.of_velocity:.3f}")
        if compares:
            cells.append(f"{row.compiled / row.walk.seconds:.3f}" if row.compiled and row.walk else "–")
        body.append(cells)
    return table(head, body)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, everything to the right."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---:"] * len(head), *rows])
