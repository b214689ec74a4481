"""What the published models fit on, counted without a GPU: on the meta device."""

from dataclasses import asdict
from functools import cache
from itertools import product
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel

from flowbp_ray.backbones.published import PUBLISHED
from flowbp_ray.rewards.clip import pixel_values, similarity
from flowbp_ray.training.memory import Needs, held, peak, weights
from pipelines.benchmark import RANK
from pipelines.full_size import GB, build, table

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


def needs(name: str, *, full: bool, checkpointing: bool, height: int, width: int) -> Needs:
    """What aligning a published model takes of one GPU in bfloat16, prompts encoded before.

    One sample is counted; several take at most as many times that, as some of it is not the samples'.
    """
    made = build(name, "meta", torch.bfloat16, full=full, checkpointing=checkpointing, height=height, width=width)
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
        counted = needs(name, full=full, checkpointing=checkpointing, height=pixels, width=pixels)
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
