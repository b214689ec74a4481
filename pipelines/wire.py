"""What a sample has on its way to the trainer, by method, at the published models' sizes: counted, nothing is sampled."""

import statistics
from typing import Any

import numpy as np
import torch

from flowbp_ray.backbones.published import PUBLISHED
from flowbp_ray.config.surrogates import SECTIONS
from flowbp_ray.training import study

SIZES, STEPS = (512, 1024), 25
DRAWS = 200  # plans of a method, whose mean is counted
MB = 10**6
SAID = (
    f"Means of {DRAWS} plans of {STEPS} steps: the latents where velocities are evaluated again, and as many as the rewards see, "
    "of which they send back the gradient. A trajectory is all latents and the gradient at the last one."
)


def counted(names: list[str]) -> list[dict[str, Any]]:
    """A row for each model, size and method; bytes in float32."""
    rows = []
    for name in names:
        with torch.device("meta"):
            backbone = PUBLISHED[name].backbone("meta", torch.bfloat16)
        for size in SIZES:
            values = int(np.prod(backbone.latent_shape(size, size)))
            for method, settings in study.PUBLISHED.items():
                section = SECTIONS[method].model_validate({"method": method, **settings})
                generator = np.random.default_rng(0)
                plans = [section.plan(np.linspace(1, 0, STEPS + 1), generator) for _ in range(DRAWS)]
                latents = statistics.mean(len(plan.active) + len(plan.reward_inputs) for plan in plans)
                row = {"model": name, "pixels": size, "method": method, "latents": latents, "bytes": 4 * values * latents}
                rows.append(row | {"of_trajectory": latents / (STEPS + 2)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    lines = [
        "| model | pixels | method | latents | MB a sample | in bfloat16 | of a trajectory |",
        "| --- | ---: | --- |" + " ---: |" * 4,
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['pixels']}² | {row['method']} | {row['latents']:.1f} | {row['bytes'] / MB:.2f} | "
            f"{row['bytes'] / 2 / MB:.2f} | {100 * row['of_trajectory']:.0f} % |"
        )
    return "\n".join([*lines, "", SAID])
