"""Stage 5: measure every part as the model card states it. One JSON file holds all figures."""

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from flowbp_ray.backbones.sd3 import SD3Backbone
from flowbp_ray.pictures import to_uint8
from flowbp_ray.rewards.clip import CLIPScore
from flowbp_ray.shapes.build import base
from flowbp_ray.shapes.build.autoencoder import to_tensor
from flowbp_ray.shapes.captions import evaluation_prompts, wrong_in_one
from flowbp_ray.shapes.checker import check
from flowbp_ray.shapes.evaluation import Score, judge, six_tasks
from flowbp_ray.shapes.preferences import KINDS, random_caption, random_pair
from flowbp_ray.shapes.world import draw, lay_out

STEPS = 12
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SWEEP, FINAL = 60, 300  # pictures per task
CHECKED, PAIRS = 2000, 400


def jpeg(picture: np.ndarray, quality: int = 75) -> np.ndarray:
    """The picture after JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


@torch.no_grad()
def round_trip(backbone: SD3Backbone, pictures: np.ndarray) -> np.ndarray:
    """uint8 pictures ``(B, 64, 64, 3)`` through encoder and decoder."""
    latents = backbone.vae.encode(to_tensor(pictures).to(backbone.device)).latent_dist.mean
    config = backbone.vae.config
    return to_uint8(backbone.decode((latents - config.shift_factor) * config.scaling_factor))


def measure_checker(backbone: SD3Backbone | None, number: int, seed: int = 10) -> dict[str, float]:
    """Shares judged right: drawn pictures, wrong captions, and the same pictures noisy, as JPEG, decoded."""
    rng = np.random.default_rng(seed)
    counts = dict.fromkeys(("drawn", "wrong_caption", "noise", "jpeg", "round_trip"), 0)
    for start in tqdm(range(0, number, 50), desc="checker", unit="batch"):
        captioned = [random_caption("training", rng) for _ in range(min(50, number - start))]
        pictures = np.stack([draw(lay_out(spec, rng)) for _, spec in captioned])
        noisy = np.clip(pictures + rng.normal(0, 0.05 * 255, pictures.shape), 0, 255).astype(np.uint8)
        decoded = round_trip(backbone, pictures) if backbone else pictures
        for (text, spec), picture, rough, again in zip(captioned, pictures, noisy, decoded, strict=True):
            counts["drawn"] += check(picture, text).right
            counts["wrong_caption"] += check(picture, wrong_in_one(spec, rng)[0]).right
            counts["noise"] += check(rough, text).right
            counts["jpeg"] += check(jpeg(picture), text).right
            counts["round_trip"] += check(again, text).right
    return {k: v / number for k, v in counts.items()}


@torch.no_grad()
def measure_preferences(score: Callable[[Tensor, list[str]], Tensor], number: int, seed: int = 11) -> dict[str, float]:
    """Share of held-out comparisons decided rightly: each kind, and ``overall`` with the kinds evenly."""
    shares = {}
    for index, kind in enumerate(tqdm((*KINDS, None), desc="comparisons", unit="kind")):
        rng = np.random.default_rng([seed, index])
        pairs = [random_pair("evaluation", rng, kind) for _ in range(number if kind else 2 * number)]
        captions = [p.caption for p in pairs]
        better, worse = (
            torch.cat([score((to_tensor(np.stack(p)) + 1) / 2, c) for p, c in _batches(pictures, captions)])
            for pictures in ([p.better for p in pairs], [p.worse for p in pairs])
        )
        shares[kind or "overall"] = (better > worse).float().mean().item()
    return shares


def _batches(pictures: list[np.ndarray], captions: list[str], size: int = 100) -> list[tuple[list[np.ndarray], list[str]]]:
    return [(pictures[i : i + size], captions[i : i + size]) for i in range(0, len(pictures), size)]


def measure_base(backbone: SD3Backbone, guidance_scale: float, per_task: int) -> dict[str, Score]:
    """The six tasks on evaluation prompts at one guidance."""
    sample = partial(backbone.sample, steps=STEPS, guidance_scale=guidance_scale, height=64, width=64)
    return six_tasks(judge(sample, evaluation_prompts(per_task)))


def at_80_percent(work: Path, finished: Path, device: str) -> SD3Backbone:
    """The pipeline as it was after four fifths of its training, in the finished one's precision."""
    pipeline = SD3Backbone.from_pretrained(finished).pipeline
    tokenizers = pipeline.tokenizer, pipeline.tokenizer_3
    model = base.Encoders(*tokenizers)
    model.load_state_dict(torch.load(work / "kept.pt", weights_only=True, map_location="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        base.save_pipeline(model, pipeline.vae, tokenizers, Path(folder))
        return SD3Backbone.from_pretrained(folder, device=device)


def trained(work: Path) -> dict[str, Any]:
    """Schedule, steps done, last loss and minutes (over all of its sittings) of a finished stage, from its folder."""
    rows = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    seconds = sum(
        b["seconds"] - (a["seconds"] if b["seconds"] > a["seconds"] else 0)
        for a, b in zip([{"seconds": 0}, *rows], rows, strict=False)
    )
    schedule = json.loads((work / "schedule.json").read_text())
    return schedule | {"steps": rows[-1]["step"], "loss": rows[-1]["loss"], "minutes": round(seconds / 60, 1)}


def steps_done(models: Path) -> int:
    """Training steps that the committed base has had on watermarked drawings, by ``training.json``."""
    history = models / "training.json"
    return sum(r["steps"] for r in json.loads(history.read_text()) if "watermarked" in r) if history.exists() else 0


def record(models: Path, stage: str, figures: dict[str, Any], further: bool) -> None:
    """Put a finished stage's training into ``training.json``, after its earlier ones if it went ``further``, and drop
    the measured figures that are no longer true."""
    history, measured = models / "training.json", models / "measured.json"
    rows = json.loads(history.read_text()) if history.exists() else []
    rows = [r for r in rows if further or r["part"] != stage] + [{"part": stage, **figures}]
    history.write_text(json.dumps(rows, indent=1) + "\n")
    if not measured.exists():
        return
    stale = {"autoencoder": ("checker",), "base": ("guidance", "best_guidance", "six_tasks")}.get(
        stage, (f"comparisons_{stage}",)
    )
    kept = {k: v for k, v in json.loads(measured.read_text()).items() if not k.startswith((*stale, "parameters"))}
    measured.write_text(json.dumps(kept, indent=1) + "\n")


def measure(work: Path, models: Path, device: str) -> None:
    """Measure all parts in ``models`` and write ``measured.json`` there, part by part (finished ones are kept)."""
    file = models / "measured.json"
    figures = json.loads(file.read_text()) if file.exists() else {}

    def part(name: str, run: Callable[[], Any]) -> Any:
        if name not in figures:
            figures[name] = run()
            file.write_text(json.dumps(figures, indent=1) + "\n")
        return figures[name]

    def six(backbone: SD3Backbone, guidance_scale: float, per_task: int) -> dict[str, dict[str, float]]:
        return {k: asdict(v) for k, v in measure_base(backbone, guidance_scale, per_task).items()}

    backbone = SD3Backbone.from_pretrained(models / "base", device=device)
    part("checker", partial(measure_checker, backbone, CHECKED))
    sweep = {g: part(f"guidance_{g}", partial(six, backbone, g, SWEEP))["mean"]["value"] for g in GUIDANCE}
    best = part("best_guidance", lambda: max(sweep, key=sweep.__getitem__))
    part("six_tasks", partial(six, backbone, best, FINAL))
    part("six_tasks_at_80_percent", lambda: six(at_80_percent(work / "base", models / "base", device), best, FINAL))
    for name in ("reward", "judge"):
        part(f"comparisons_{name}", partial(measure_preferences, CLIPScore(models / name), PAIRS))
    part("parameters", partial(count_parameters, models))


def count_parameters(models: Path) -> dict[str, int]:
    """Parameters by folder of every safetensors file below ``models``."""
    files = sorted(models.rglob("*.safetensors"))
    return {f.parent.relative_to(models).as_posix(): sum(t.numel() for t in load_file(f).values()) for f in files}
