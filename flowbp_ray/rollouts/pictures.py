"""The stages of an evaluation: pictures are sampled, and then decoded, scored, judged and kept."""

import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.asking import Request
from flowbp_ray.rollouts.batches import Block
from flowbp_ray.rollouts.stages import REWARDS, service
from flowbp_ray.training import EXPORT_FILE


class Painter:
    """Samples finished latents with an exported adapter (its file's bytes), an exported pipeline, or the base model."""

    def __init__(self, config: AlignConfig, exported: bytes | Path | None) -> None:
        import torch

        from flowbp_ray.rollouts.embeds import backbone_of
        from flowbp_ray.training.adapter import load_export, merge, plain_weights

        torch.set_num_threads(config.cluster.threads)
        device = "cuda" if config.cluster.sampler_gpus else "cpu"
        self.sampling = config.sampling
        self.backbone = backbone_of(config, device, exported if isinstance(exported, Path) else None)
        if isinstance(exported, bytes):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / EXPORT_FILE).write_bytes(exported)
                load_export(self.backbone, Path(folder))
            merge(self.backbone.transformer, plain_weights(self.backbone.transformer))

    def __call__(self, block: Block) -> Block:
        """Add finished latents to ``prompt`` and ``seed``."""
        latents = self.backbone.sample_latents(
            block["prompt"].tolist(),
            block["seed"].tolist(),
            steps=self.sampling.steps,
            guidance_scale=self.sampling.guidance_scale,
            height=self.sampling.height,
            width=self.sampling.width,
            kind=self.sampling.grid,
        )
        return block | {"latents": latents.cpu().numpy()}


def scores_file(folder: Path, seeds: Sequence[int]) -> Path:
    """Where the scores of a block of pictures are, once all of it is done."""
    return folder / "scores" / f"{seeds[0]}-{seeds[-1]}.parquet"


class Examiner:
    """Has the pictures decoded and scored by the reward service, judges them, and keeps them if there is a ``folder``.

    RuntimeError if the folder is not to be seen from here.
    """

    def __init__(self, config: AlignConfig, application: str, folder: Path | None) -> None:
        from flowbp_ray import evaluators

        if folder and not folder.exists():
            raise RuntimeError(f"{platform.node()} cannot see {folder}: set output to a folder that all machines share")
        self.service, self.folder = service(application), folder
        self.judges = evaluators.load(config.evaluation, "cuda" if config.evaluation.judge_gpus else "cpu")

    def __call__(self, block: Block) -> Block:
        """Scores and verdicts in place of the latents."""
        prompts, rows = block["prompt"].tolist(), [json.loads(row) for row in block["row"]]
        latents = np.ascontiguousarray(block["latents"])
        seen = Request(self.service, "look", latents, prompts, what=REWARDS, prompts=prompts).result()
        judged = {k: block[k] for k in ("task", "prompt", "seed")}
        for judge in self.judges:
            judged |= judge(seen["pictures"], rows)
        judged |= {f"reward/{k}": v for k, v in seen["components"].items()}
        if self.folder:
            keep(self.folder, judged, seen["pictures"])
        return judged


def keep(folder: Path, judged: Block, pictures: np.ndarray) -> None:
    """Write a block's pictures and then, in one move, its scores: where these are, all of it is."""
    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet

    for seed, picture in zip(judged["seed"], pictures, strict=True):
        Image.fromarray(picture).save(picture_file(folder, int(seed)))
    file = scores_file(folder, judged["seed"].tolist())
    unfinished = file.with_suffix(".tmp")
    parquet.write_table(pa.table({k: v.tolist() for k, v in judged.items()}), unfinished)
    unfinished.replace(file)


def picture_file(folder: Path, seed: int) -> Path:
    """Where the picture of a seed is."""
    return folder / "pictures" / f"{seed:08d}.png"
