"""The stage that encodes prompts."""

import platform
from pathlib import Path

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.batches import Block

ENCODED_AT_ONCE = 16  # prompts, to one file: what each process loses by an interruption


class Encoder:
    """Encodes prompts to a file in ``folder`` for each block. RuntimeError if the folder is not to be seen from here."""

    def __init__(self, config: AlignConfig, folder: Path) -> None:
        import torch

        from flowbp_ray.backbones import family_of
        from flowbp_ray.backbones.backbone import DTYPES
        from flowbp_ray.rollouts import embeds

        if not (folder / embeds.ENCODER_FILE).exists():
            raise RuntimeError(f"{platform.node()} cannot see {folder}: set --output to a folder that all machines share")
        torch.set_num_threads(config.cluster.threads)
        device, model = "cuda" if config.cluster.sampler_gpus else "cpu", config.model
        family, rest = family_of(model.source, model.revision), ("transformer", "vae")
        self.backbone = family.from_pretrained(model.source, DTYPES[model.dtype], device, model.revision, without=rest)
        self.folder, self.write = folder, embeds.write

    def __call__(self, block: Block) -> Block:
        """The same block, when its file is there."""
        prompts = block["prompt"].tolist()
        # A batch of another size is rounded otherwise, and what becomes of a prompt must not depend on who came with it. The
        # negative prompt is encoded alone everywhere.
        filling = [] if prompts == [""] else prompts[-1:] * (ENCODED_AT_ONCE - len(prompts))
        self.write(self.folder, prompts, self.backbone.encode(prompts + filling)[: len(prompts)])
        return block
