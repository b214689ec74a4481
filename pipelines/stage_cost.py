"""What each stage of a step costs at a published model's full size, without its checkpoint: on the GPU if there is one.

The model, one reward model (a CLIP ViT-H) and the prompts' embeddings are random, and lie on the disk as the published ones do.
All else is what a run has: its sampler, rewards and learner, by the recipe of `configs/` for an adapter, on one GPU.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from flowbp_ray.backbones.backbone import DTYPES, Conditioning
from flowbp_ray.backbones.published import PUBLISHED
from flowbp_ray.config import AlignConfig, load
from flowbp_ray.config.paths import REWARD_MODELS
from flowbp_ray.rollouts import embeds
from flowbp_ray.rollouts.plans import plan_of
from flowbp_ray.training import adapter
from pipelines.benchmark import RANK
from pipelines.fits import CONTEXTS, VIT_H, needs, rewards
from pipelines.full_size import GB, build
from pipelines.full_size import table as markdown
from pipelines.placement import profile
from pipelines.rollout_cost import evaluations
from pipelines.update_cost import counted

CONFIGS = Path(__file__).parents[1] / "configs"
TOKENIZER = REWARD_MODELS["shapes/reward"]
PROMPTS = tuple(f"a picture of {number} things" for number in range(8))
ON_CPU = ("cluster.sampler_gpus=0", "cluster.trainer_gpus=0", "cluster.reward_gpus=0")


def measure(
    name: str, batch: int, height: int, width: int, *, compiled: bool, peft_cast: bool, told: Callable[[str], object]
) -> dict[str, Any]:
    """Seconds and FLOPs of a micro-batch by stage, and the peak of memory beside what is counted; ``peft_cast`` leaves the
    adapter as PEFT computes it. ValueError for a size that the model does not make."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    made = build(name, "meta", dtype, batch=batch, checkpointing=True, height=height, width=width)
    with TemporaryDirectory(prefix="stages_") as place:
        folder = Path(place)
        config = configured(name, folder, dtype, batch, height, width, compiled)
        plan = plan_of(config, made.sigmas, 0)  # the one of the micro-batch that is measured
        told(f"{name} with random weights, to {folder}")
        write(name, folder, config)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with patch.object(adapter, "_compute_as_given", lambda _: None) if peft_cast else nullcontext():
            seconds = profile(config, told)
    one = build(name, "meta", dtype, height=height, width=width).latents.shape
    scoring, needed = rewards(name, tuple(one))[2], needs(name, full=False, checkpointing=True, height=height, width=width)

    @torch.no_grad()
    def velocity() -> None:
        made.backbone.velocity(made.latents, made.sigmas[0], made.text, made.negative, made.scale)

    work = {
        "sampling": evaluations(plan) * counted(velocity)[1],
        "reward": len(plan.reward_inputs) * rewards(name, tuple(made.latents.shape))[3],
        "update": counted(lambda: made.walk(plan))[1],
    }
    return {
        "model": name,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "dtype": config.model.dtype,
        "height": height,
        "width": width,
        "micro_batch": batch,
        "compiled": compiled,
        "peft_cast": peft_cast,
        "active": len(plan.active),
        "velocities": evaluations(plan),
        "peak": torch.cuda.max_memory_allocated() if cuda else None,
        # All models in one process, and one stage after the other.
        "counted": needed.held - CONTEXTS + max(needed.step, batch * max(needed.update, needed.others - scoring, scoring)),
        "rows": [{"stage": k, "seconds": seconds[k], "flops": v} for k, v in work.items()],
        **{k: v for k, v in seconds.items() if k not in work},
    }


def configured(name: str, folder: Path, dtype: torch.dtype, batch: int, height: int, width: int, compiled: bool) -> AlignConfig:
    """The recipe for an adapter on one GPU of 80 GB, with all that is to be in ``folder``, which is made."""
    (folder / "embeds").mkdir()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    for empty in ("model/model_index.json", "reward/config.json"):  # a configuration is refused without
        (folder / empty).parent.mkdir()
        (folder / empty).touch()
    reward = json.dumps({"name": "clip", "path": str(folder / "reward"), "encoder": str(TOKENIZER), "weight": 1})
    given = [
        f"model.path={folder / 'model'}",
        f"model.dtype={next(k for k, v in DTYPES.items() if v == dtype)}",
        f"reward.components=[{reward}]",
        f"prompts.path={folder / 'prompts.txt'}",
        f"prompts.embeds={folder / 'embeds'}",
        f"evaluation.prompts={folder / 'prompts.txt'}",
        f"adapter.rank={RANK}",
        f"train.micro_batch={batch}",
        f"train.batch={2 * batch}",
        f"sampling.height={height}",
        f"sampling.width={width}",
        f"cluster.compile={compiled}",
    ]
    if dtype == torch.float32:  # no GPU
        given += ON_CPU
    return load(CONFIGS / name / "sparse_adapter.yaml", given, [CONFIGS / "placement" / "gpu80.yaml"])


def write(name: str, folder: Path, config: AlignConfig) -> None:
    """The random model, reward and embeddings of a configuration, where it says that they are."""
    entry, dtype = PUBLISHED[name], DTYPES[config.model.dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = entry.backbone(device, dtype).pipeline  # made on a GPU in no time
    pipeline.register_modules(vae=entry.family.vae_class(**entry.vae).to(dtype))
    pipeline.save_pretrained(folder / "model")
    text = VIT_H.text_config.to_dict() | {"eos_token_id": CLIPTokenizer.from_pretrained(TOKENIZER).eos_token_id}
    given = {"text_config": text, "vision_config": VIT_H.vision_config.to_dict(), "projection_dim": VIT_H.projection_dim}
    with torch.device(device):
        clip = CLIPModel(CLIPConfig(**given))
    clip.save_pretrained(folder / "reward")
    about = {"encoder": embeds.encoder_of(config)}
    (folder / "embeds" / embeds.ENCODER_FILE).write_text(json.dumps(about), encoding="utf-8")
    # The negative prompt is encoded alone.
    for prompts in (list(PROMPTS), [""]):
        texts = {k: torch.randn(len(prompts), *shape).to(dtype) for k, shape in entry.text.items()}
        embeds.write(folder / "embeds", prompts, Conditioning(texts))


def table(found: dict[str, Any]) -> str:
    """As Markdown, and what it is of."""
    number = found["micro_batch"]
    how = (", by torch.compile" if found["compiled"] else "") + (", with PEFT's cast" if found["peft_cast"] else "")
    rows = []
    for row in found["rows"]:
        rate = row["flops"] / row["seconds"] / 1e12
        rows.append([row["stage"], f"{row['seconds']:.3f}", f"{row['seconds'] / number:.3f}", f"{rate:.1f}"])
    peak = "not measured on a CPU" if found["peak"] is None else f"{found['peak'] / GB:.1f} GB"
    said = (
        f"{found['model']}, an adapter of rank {RANK}, {found['dtype']}{how}; a micro-batch of {number} of "
        f"{found['height']}×{found['width']} pixels, {found['velocities']} velocities to sample, {found['active']} active; "
        f"{found['device']}. Peak of memory, one stage after the other: {peak}, counted {found['counted'] / GB:.1f} GB. An "
        f"optimizer's step takes {found['stepping']:.3f} s, weights are read in {found['publishing']:.3f} s and loaded in "
        f"{found['loading']:.3f} s. To read a micro-batch's texts takes {found['texts']:.3f} s of sampling and of the update, if "
        "they are not kept."
    )
    return f"{markdown(['stage', 'seconds a micro-batch', 'a sample', 'TFLOP/s'], rows)}\n\n{said}"
