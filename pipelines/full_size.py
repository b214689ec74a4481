"""Updates of the published models with random weights: measured on a GPU, and what fits on one, counted without."""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel

from flowbp_ray.backbones.backbone import Conditioning
from flowbp_ray.backbones.published import PUBLISHED
from flowbp_ray.rewards.clip import pixel_values, similarity
from flowbp_ray.surrogate.backward import Guidance
from flowbp_ray.training.adapter import add_adapter
from flowbp_ray.training.memory import Needs, held, peak, size, weights
from pipelines.benchmark import RANK, STEPS
from pipelines.update_cost import Update

GB = 10**9
SIZES = (512, 1024)
#: What CUDA takes in the processes of trainer, sampler and rewards, half a GB each.
CONTEXTS = 3 * GB // 2
#: The reward model that is counted, CLIP ViT-H/14: PickScore's and HPSv2.1's.
VIT_H = CLIPConfig(
    text_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    vision_config={
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14,
    },
    projection_dim=1024,
)  # fmt: skip


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


def timed(run: Callable[[], None]) -> float:
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
    one = measured(update, update.one_velocity, repeats)  # just before, as a machine's pace changes
    walk = measured(update, lambda: update.walk(plan), repeats)
    whole = measured(update, lambda: update.whole_graph(plan), repeats)
    difference = None
    if walk and whole:
        pairs = [(a.float(), b.float()) for a, b in zip(walk[1], whole[1], strict=True)]
        difference = math.hypot(*((a - b).norm().item() for a, b in pairs)) / math.hypot(*(b.norm().item() for _, b in pairs))
    of_velocity = walk[0].seconds / active / one[0].seconds if walk and one else None
    return Row(active, walk[0] if walk else None, whole[0] if whole else None, difference, of_velocity)


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


@cache
def rewards(name: str, shape: tuple[int, ...], *, checkpointed: bool = False) -> tuple[int, int, int, int]:
    """Bytes of a decoder (bfloat16), of a CLIP ViT-H (float32), and of all that scoring latents of ``shape`` makes, with the
    gradient, and its FLOPs."""
    family = PUBLISHED[name].family
    with torch.device("meta"):
        vae = family.vae_class(**PUBLISHED[name].vae).to(torch.bfloat16).requires_grad_(False)
        if checkpointed:
            vae.enable_gradient_checkpointing()
        clip = CLIPModel(VIT_H).requires_grad_(False)
        latents, ids = torch.zeros(shape, requires_grad=True), torch.zeros(shape[0], 77, dtype=torch.int64)

    def score() -> None:
        pixels = pixel_values(family.decode_latents(vae, latents), VIT_H.vision_config.image_size)
        similarity(clip, pixels, ids).diagonal().sum().backward()

    made = peak(score)
    with FlopCounterMode(display=False) as flops:
        score()
    return weights(vae), weights(clip), made, flops.get_total_flops()


def decoders(names: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """Count what scoring a picture with its gradient takes by either ``reward.decoder``: a text, and its figures."""
    found: list[dict[str, Any]] = []
    for name, pixels in product(names, SIZES):
        shape = tuple(build(name, "meta", torch.bfloat16, height=pixels, width=pixels).latents.shape)
        (plain, flops), (saved, more) = (rewards(name, shape, checkpointed=c)[2:] for c in (False, True))
        found.append({"model": name, "pixels": pixels, "plain": plain, "checkpointed": saved, "flops": flops, "with_more": more})
    head = ["model", "pixels", "decoder plain, GB", "checkpointed, GB", "ratio", "FLOPs' ratio"]
    rows = []
    for f in found:
        gigabytes = [f"{f[way] / GB:.2f}" for way in ("plain", "checkpointed")]
        ratios = [f"{f['checkpointed'] / f['plain']:.2f}", f"{f['with_more'] / f['flops']:.2f}"]
        rows.append([str(f["model"]), f"{f['pixels']}²", *gigabytes, *ratios])
    said = "Decoding one picture, scoring it by a CLIP ViT-H and going back to the latents, by `reward.decoder`."
    return f"{table(head, rows)}\n\n{said}", found


def needs(name: str, *, full: bool, checkpointing: bool, pixels: int) -> Needs:
    """What aligning a published model takes of one GPU in bfloat16, prompts encoded before, pictures ``pixels`` high and wide.

    One sample is counted; several take at most as many times that, as some of it is not the samples'.
    """
    made = build(name, "meta", torch.bfloat16, full=full, checkpointing=checkpointing, height=pixels, width=pixels)
    plan = made.plan("sparse", active_steps=1)
    kept, step = held(made.backbone)
    vae, clip, scoring, _ = rewards(name, tuple(made.latents.shape))

    @torch.no_grad()
    def sample() -> None:
        made.backbone.velocity(made.latents, made.sigmas[0], made.text, made.negative, made.scale)

    return Needs(
        held=kept + weights(made.backbone.transformer) + 3 * vae + clip + CONTEXTS,
        step=step,
        update=peak(lambda: made.walk(plan)),
        others=peak(sample) + scoring,
    )


def fits(names: list[str], caps: list[float]) -> tuple[str, list[dict[str, Any]]]:
    """Count the largest micro-batch under each cap: a text, and its figures."""
    found = []
    for name, full, checkpointing, pixels in tqdm(list(product(names, (False, True), (False, True), SIZES)), desc="count"):
        counted = needs(name, full=full, checkpointing=checkpointing, pixels=pixels)
        largest = {f"{cap:g}": counted.micro_batch(int(cap * GB)) for cap in caps}
        what = {"model": name, "full": full, "checkpointing": checkpointing, "pixels": pixels}
        found.append({**what, **asdict(counted), "micro_batch": largest})
    said = (
        "The largest micro-batch where trainer, sampler and rewards share one GPU; – where one sample is too many. bfloat16, "
        f"prompts encoded before, adapters of rank {RANK}. Counted on the meta device, not measured. Held: the weights of all "
        "three, gradients, AdamW and the average (float32 where all weights are trained), and "
        f"{CONTEXTS / GB:g} GB for CUDA itself in three processes. Others: sampling, and decoding and a CLIP ViT-H in float32 "
        "with their gradient. 1 GB is 10^9 bytes."
    )
    return f"{fits_table(found)}\n\n{said}", found


def fits_table(found: list[dict[str, Any]]) -> str:
    """Markdown; a dash where not one sample fits."""
    caps = list(found[0]["micro_batch"])
    head = ["model", "trained", "checkpointing", "pixels", "held, GB", "update, GB a sample", "others, GB a sample"]
    rows = [
        [
            f["model"],
            "all weights" if f["full"] else "adapter",
            "on" if f["checkpointing"] else "off",
            f"{f['pixels']}²",
            f"{f['held'] / GB:.1f}",
            f"{f['update'] / GB:.2f}",
            f"{f['others'] / GB:.2f}",
            *(str(f["micro_batch"][cap] or "–") for cap in caps),
        ]
        for f in found
    ]
    return table([*head, *(f"{cap} GB" for cap in caps)], rows)


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
