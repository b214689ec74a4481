"""What is reported of a step: of its samples' columns, and of the time that it took."""

import functools
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowbp_ray.rollouts.batches import Block


def totals(blocks: Sequence[Block]) -> tuple[list[str], Tensor]:
    """Names and sums over the samples of what is reported as a mean, and of the seconds and bytes."""
    names = sorted(
        k for k in blocks[0] if k.startswith(("reward/", "weight/")) or k == "objective" or k.endswith(("_seconds", "_bytes"))
    )
    each = [torch.tensor([float(np.sum(b[k], dtype=np.float64)) for k in names], dtype=torch.float64) for b in blocks]
    return names, functools.reduce(operator.add, each)


def means(sums: dict[str, float], seconds: dict[str, float], batch: int) -> dict[str, float]:
    """Metrics of a step from sums over its ``batch`` samples and a train worker's ``seconds``: stages' seconds stay sums."""
    own = {k: v for k, v in sums.items() if "/" not in k}  # rewards have any names
    took = {k: v for k, v in own.items() if k.endswith("_seconds")}
    sent = {k: v for k, v in own.items() if k.endswith("_bytes") and k != "policy_bytes"}
    metrics = {k: v / batch for k, v in sums.items() if k not in took | sent and k != "policy_bytes"}
    metrics |= {"policy_bytes": sums["policy_bytes"]}
    metrics |= {f"sample_bytes/{k.removesuffix('_bytes')}": v / batch for k, v in sent.items()}
    metrics |= {f"seconds/{k.removesuffix('_seconds')}": v for k, v in took.items()}
    return metrics | {f"seconds/{k}": v for k, v in seconds.items()}
