"""What sampling costs beside the stock diffusers pipeline, for equal work and for what a method's plans need of it.

The embedded default samples on the CPU; both give latents, so no decoder is measured. Runs are interleaved, and the ratio is the
median of the pairs'. How much caching the modulation (it depends on time and pooled texts alone) could save is counted.
"""

import itertools
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowbp_ray import backbones
from flowbp_ray.backbones.backbone import Backbone
from flowbp_ray.backbones.published import PUBLISHED as PUBLISHED_MODELS
from flowbp_ray.config.paths import MODELS
from flowbp_ray.rollouts.rollout import roll_out
from flowbp_ray.surrogate.methods import METHODS
from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.training.study import PUBLISHED

STEPS, SCALE, SIZE = 25, 3.0, 64
PROMPTS = ("a red ring", "two blue squares", "a green star left of a red disc", "three yellow rings")
#: Modules of the three transformers that make scales, shifts and gates.
MODULATION = re.compile(r"(norm\w*|modulation\w*)\.linear$|\.(time_text_embed|time_guidance_embed)$")
DRAWS = 200  # plans of a method, whose mean is counted


def measure(batch: int, repeats: int, compiled: bool, told: Callable[[str], object]) -> list[dict[str, Any]]:
    """Rows: the stock pipeline, the same work with guidance's branches batched and apart, ``compiled`` too if that is asked for,
    then as far as each method needs it."""
    torch.set_num_threads(1)
    backbone = backbones.load(MODELS["shapes"])
    prompts, seeds = list(itertools.islice(itertools.cycle(PROMPTS), batch)), list(range(batch))
    apart = type(backbone)(backbone.pipeline)
    apart.batched_branches = False
    ways: dict[str, Callable[[], Tensor]] = {
        "stock diffusers pipeline": lambda: stock(backbone.pipeline, prompts, seeds),
        "here, branches in one batch": lambda: own(backbone, prompts, seeds),
        "here, one branch after the other": lambda: own(apart, prompts, seeds),
    }
    if compiled:
        other = backbones.load(MODELS["shapes"])
        other.compile()
        ways["here, compiled"] = lambda: own(other, prompts, seeds)
    drawn = {}
    for name, settings in PUBLISHED.items():
        drawn[name] = plans_of(name, settings, backbone.grid(STEPS, SIZE, SIZE))
        plan = middle(drawn[name])
        ways[f"as far as {name}'s plans need"] = partial(cached, backbone, prompts, seeds, plan)
    told(f"{batch} pictures of {STEPS} steps, {len(ways)} ways, {repeats} times in turn")
    latents = {name: run() for name, run in ways.items()}  # and all is warm
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(ways))
    needed = {f"as far as {name}'s plans need": statistics.mean(map(evaluations, plans)) for name, plans in drawn.items()}
    return [
        {
            "way": name,
            "velocities": needed.get(name, float(STEPS)),
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True)),
            "difference": None if name in needed else float((latents[name] - latents[first]).abs().max()),
        }
        for name in ways
    ]


def plans_of(name: str, settings: dict[str, Any], sigmas: Tensor) -> list[Plan]:
    """Plans of a published method."""
    method = METHODS[name]
    given = method.settings(**{k: v for k, v in settings.items() if k != "detach_negative"})
    return [method.plan(given, sigmas, np.random.default_rng(n)) for n in range(DRAWS)]


def middle(plans: list[Plan]) -> Plan:
    """One that needs about as many velocities as the mean."""
    needed = statistics.mean(map(evaluations, plans))
    return min(plans, key=lambda plan: abs(evaluations(plan) - needed))


@torch.no_grad()
def cached(backbone: Backbone, prompts: list[str], seeds: list[int], plan: Plan) -> Tensor:
    """A rollout as far as a plan needs it, and the velocities at its noised copies."""
    conditioning, negative = backbone.encode(prompts), backbone.encode([""])
    noise = backbone.initial_latents([torch.Generator().manual_seed(s) for s in seeds], SIZE, SIZE)
    sigmas = backbone.grid(STEPS, SIZE, SIZE)

    def velocity(at: Tensor, sigma: Tensor) -> Tensor:
        return backbone.velocity(at, sigma, conditioning, negative, SCALE)

    rollout = roll_out(noise, sigmas, velocity, plan)
    for _ in range(plan.copies):
        velocity(noise, sigmas[plan.steps - 1])
    return next(iter(rollout.latents.values()))


def evaluations(plan: Plan) -> int:
    """Steps that a rollout evaluates for a plan, its noised copies among them."""
    return plan.last_index + (plan.last_index in plan.velocities_needed) + plan.copies


@torch.no_grad()
def stock(pipeline: StableDiffusion3Pipeline, prompts: list[str], seeds: list[int]) -> Tensor:
    """The pipeline's own call, up to latents."""
    pipeline.set_progress_bar_config(disable=True)
    latents: Tensor = pipeline(
        prompts,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        sigmas=np.linspace(1, 1 / STEPS, STEPS).tolist(),
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        height=SIZE,
        width=SIZE,
        max_sequence_length=pipeline.tokenizer_3.model_max_length,
        output_type="latent",
    ).images
    return latents


def own(backbone: Backbone, prompts: list[str], seeds: list[int]) -> Tensor:
    """The same here."""
    return backbone.sample_latents(prompts, seeds, steps=STEPS, guidance_scale=SCALE, height=SIZE, width=SIZE)


def modulation() -> dict[str, float]:
    """Of the published models at 512x512, the part of a velocity's FLOPs that makes the modulation; counted, without memory."""
    from pipelines.full_size import build

    shares = {}
    for name in PUBLISHED_MODELS:
        update = build(name, "meta", torch.float32)
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            update.backbone.branch(update.latents, update.sigmas[0], update.text, update.scale)
        by_module = {module: sum(counts.values()) for module, counts in flops.get_flop_counts().items()}
        shares[name] = sum(n for module, n in by_module.items() if MODULATION.search(module)) / flops.get_total_flops()
    return shares


def shares_table(shares: dict[str, float]) -> str:
    """As Markdown."""
    lines = ["| | of a velocity's FLOPs that make its modulation |", "| --- | ---: |"]
    return "\n".join([*lines, *(f"| {name} | {100 * share:.3f} % |" for name, share in shares.items())])


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    lines = ["| | velocities | seconds | of the stock pipeline's | largest difference of latents |", "| --- |" + " ---: |" * 4]
    for row in rows:
        difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
        lines.append(f"| {row['way']} | {row['velocities']:.1f} | {row['seconds']:.3f} | {row['ratio']:.3f} | {difference} |")
    return "\n".join(lines)
