"""What sampling costs beside the stock diffusers pipeline, for equal work and for what a method's plans need of it.

The embedded default samples on the CPU, a published model with random weights and texts on the GPU if there is one; both give
latents, so no decoder is measured. Runs are interleaved, and the ratio is the median of the pairs'. Two of the ways keep the
modulation, which depends on time and pooled texts alone; a run keeps it in neither.
"""

import copy
import itertools
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowbp_ray import backbones
from flowbp_ray.backbones.backbone import Backbone, Conditioning
from flowbp_ray.backbones.published import PUBLISHED as PUBLISHED_MODELS
from flowbp_ray.config.paths import MODELS
from flowbp_ray.rollouts.rollout import roll_out
from flowbp_ray.surrogate.methods import METHODS
from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.training.study import PUBLISHED
from pipelines.full_size import build, timed

STEPS = 25
PROMPTS = ("a red ring", "two blue squares", "a green star left of a red disc", "three yellow rings")
#: Modules of the three transformers that make scales, shifts and gates.
MODULATION = re.compile(r"(norm\w*|modulation\w*)\.linear$|(^|\.)(time_text_embed|time_guidance_embed)$")
DRAWS = 200  # plans of a method, whose mean is counted


@dataclass(frozen=True)
class Subject:
    """What is sampled, by what, and how."""

    backbone: Backbone
    prompts: list[str]
    #: Of guidance.
    scale: float
    #: Of the pictures, in pixels.
    height: int
    width: int

    def own(self) -> Tensor:
        """Finished latents, as a sampler makes them."""
        return self.backbone.sample_latents(
            self.prompts,
            list(range(len(self.prompts))),
            steps=STEPS,
            guidance_scale=self.scale,
            height=self.height,
            width=self.width,
        )

    @torch.no_grad()
    def stock(self) -> Tensor:
        """The pipeline's own call, up to latents; texts that are encoded before are given to it so."""
        pipeline, backbone = self.backbone.pipeline, self.backbone
        pipeline.set_progress_bar_config(disable=True)
        texts: dict[str, Any] = {"prompt": self.prompts}
        if backbone.embeds:
            texts = dict(backbone.encode(self.prompts).tensors)
            if not backbone.embedded_guidance:
                negative = backbone.encode([""]).expand(len(self.prompts))
                texts |= {f"negative_{name}": tensor for name, tensor in negative.tensors.items()}
        else:
            texts["max_sequence_length"] = pipeline.tokenizer_3.model_max_length
        latents: Tensor = pipeline(
            **texts,
            generator=[torch.Generator().manual_seed(s) for s in range(len(self.prompts))],
            sigmas=np.linspace(1, 1 / STEPS, STEPS).tolist(),
            num_inference_steps=STEPS,
            guidance_scale=self.scale,
            height=self.height,
            width=self.width,
            output_type="latent",
        ).images
        return latents

    @torch.no_grad()
    def cached(self, plan: Plan) -> Tensor:
        """A rollout as far as a plan needs it, and the velocities at its noised copies."""
        backbone = self.backbone
        conditioning, negative = backbone.encode(self.prompts), backbone.encode([""])
        generators = [torch.Generator().manual_seed(s) for s in range(len(self.prompts))]
        noise = backbone.initial_latents(generators, self.height, self.width)
        sigmas = self.grid().to(backbone.device)

        def velocity(at: Tensor, sigma: Tensor) -> Tensor:
            return backbone.velocity(at, sigma, conditioning, negative, self.scale)

        rollout = roll_out(noise, sigmas, velocity, plan)
        for _ in range(plan.copies):
            velocity(noise, sigmas[plan.steps - 1])
        return next(iter(rollout.latents.values()))

    def keeping(self) -> dict[str, Callable[[], Tensor]]:
        """`own`, but that the modules that make the modulation hand out, in their order, what was kept: from a cache that has all
        of it, as where every prompt comes again, or all steps' made at once, which any prompt could use."""
        makers = [module for name, module in self.backbone.transformer.named_modules() if MODULATION.search(name)]
        given: dict[nn.Module, list[tuple[Any, ...]]] = {module: [] for module in makers}
        made: dict[nn.Module, list[Tensor]] = {module: [] for module in makers}

        def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            given[module].append(inputs)
            made[module].append(output)

        hooks = [module.register_forward_hook(note) for module in makers]
        self.own()
        for hook in hooks:
            hook.remove()

        def hand_out(left: Iterator[Tensor], *_: Any) -> Tensor:
            return next(left)

        def sampled(kept: Callable[[nn.Module], Sequence[Tensor]]) -> Tensor:
            try:
                for module in makers:
                    module.forward = partial(hand_out, iter(kept(module)))
                return self.own()
            finally:
                for module in makers:
                    vars(module).pop("forward", None)

        @torch.no_grad()
        def at_once(module: nn.Module) -> Sequence[Tensor]:
            inputs = (torch.cat(of) if isinstance(of[0], Tensor) else of[0] for of in zip(*given[module], strict=True))
            return module(*inputs).chunk(len(given[module]))

        return {
            "here, modulation from a cache": partial(sampled, made.__getitem__),
            "here, modulation of all steps at once": partial(sampled, at_once),
        }

    def grid(self) -> Tensor:
        """Sigmas, which plans are made of."""
        return self.backbone.grid(STEPS, self.height, self.width)

    def apart(self) -> "Subject":
        """The same, guidance's branches one after the other."""
        other = type(self.backbone)(self.backbone.pipeline)
        other.embeds, other.batched_branches = self.backbone.embeds, False
        return replace(self, backbone=other)

    def compiled(self) -> "Subject":
        """The same weights, and kernels by torch.compile."""
        pipeline, transformer = copy.copy(self.backbone.pipeline), self.backbone.transformer
        shared = {id(tensor): tensor for tensor in (*transformer.parameters(), *transformer.buffers())}
        pipeline.transformer = copy.deepcopy(transformer, shared)
        other = type(self.backbone)(pipeline)
        other.embeds = self.backbone.embeds
        other.compile()
        return replace(self, backbone=other)


def embedded(batch: int) -> Subject:
    """The embedded default, which encodes its texts."""
    return Subject(backbones.load(MODELS["shapes"]), list(itertools.islice(itertools.cycle(PROMPTS), batch)), 3.0, 64, 64)


def published(name: str, batch: int, height: int, width: int) -> Subject:
    """A published model with random weights and texts and no adapter, in bfloat16 on the GPU if there is one.

    ValueError for a size that it does not make.
    """
    build(name, "meta", torch.bfloat16, height=height, width=width)
    entry = PUBLISHED_MODELS[name]
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    backbone = entry.backbone(device, dtype)
    # FLUX.2's pipeline hands out latents by its decoder's statistics.
    backbone.pipeline.vae = entry.family.vae_class(**entry.vae).to(device, dtype).eval()
    texts = Conditioning({k: torch.randn(batch + 1, *shape).to(device, dtype) for k, shape in entry.text.items()})
    backbone.embeds = lambda prompts: texts[:1] if prompts == [""] else texts[1:]
    return Subject(backbone, [f"picture {number}" for number in range(batch)], entry.guidance_scale, height, width)


def measure(subject: Subject, repeats: int, compiled: bool, told: Callable[[str], object]) -> dict[str, Any]:
    """What was sampled on what, and rows: the stock pipeline, the same work with guidance's branches batched and apart (if there
    are two), ``compiled`` too if that is asked for, then as far as each method needs it."""
    torch.set_num_threads(1)
    ways: dict[str, Callable[[], Tensor]] = {"stock diffusers pipeline": subject.stock}
    if subject.backbone.embedded_guidance:
        ways["here"] = subject.own
    else:
        ways |= {"here, branches in one batch": subject.own, "here, one branch after the other": subject.apart().own}
    ways |= subject.keeping()
    if compiled:
        ways["here, compiled"] = subject.compiled().own
    drawn = {}
    for name, settings in PUBLISHED.items():
        drawn[name] = plans_of(name, settings, subject.grid())
        ways[f"as far as {name}'s plans need"] = partial(subject.cached, middle(drawn[name]))
    told(f"{len(subject.prompts)} pictures of {STEPS} steps, {len(ways)} ways, {repeats} times in turn")
    latents = {name: run().cpu() for name, run in ways.items()}  # and all is warm
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            seconds[name].append(timed(run))
    first = next(iter(ways))
    needed = {f"as far as {name}'s plans need": statistics.mean(map(evaluations, plans)) for name, plans in drawn.items()}
    # Some pipelines hand out latents that are packed otherwise.
    equal = [name for name in ways if name not in needed and latents[name].shape == latents[first].shape]
    rows = [
        {
            "way": name,
            "velocities": needed.get(name, float(STEPS)),
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True)),
            "difference": float((latents[name] - latents[first]).abs().max()) if name in equal else None,
        }
        for name in ways
    ]
    backbone = subject.backbone
    return {
        "transformer": type(backbone.transformer).__name__,
        "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else "CPU",
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "batch": len(subject.prompts),
        "height": subject.height,
        "width": subject.width,
        "repeats": repeats,
        "rows": rows,
    }


def plans_of(name: str, settings: dict[str, Any], sigmas: Tensor) -> list[Plan]:
    """Plans of a published method."""
    method = METHODS[name]
    given = method.settings(**{k: v for k, v in settings.items() if k != "detach_negative"})
    return [method.plan(given, sigmas, np.random.default_rng(n)) for n in range(DRAWS)]


def middle(plans: list[Plan]) -> Plan:
    """One that needs about as many velocities as the mean."""
    needed = statistics.mean(map(evaluations, plans))
    return min(plans, key=lambda plan: abs(evaluations(plan) - needed))


def evaluations(plan: Plan) -> int:
    """Steps that a rollout evaluates for a plan, its noised copies among them."""
    return plan.last_index + (plan.last_index in plan.velocities_needed) + plan.copies


def table(found: dict[str, Any]) -> str:
    """All rows as Markdown, and what they are of."""
    lines = ["| | velocities | seconds | of the stock pipeline's | largest difference of latents |", "| --- |" + " ---: |" * 4]
    for row in found["rows"]:
        difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
        lines.append(f"| {row['way']} | {row['velocities']:.1f} | {row['seconds']:.3f} | {row['ratio']:.3f} | {difference} |")
    said = (
        f"{found['batch']} pictures of {found['height']}×{found['width']} pixels by {found['transformer']} in {found['dtype']}, "
        f"without an adapter; {found['device']}. Medians of {found['repeats']} runs in turn."
    )
    return "\n".join([*lines, "", said])
