"""What it costs to publish weights and load them in samplers, beside a plain copy of the same bytes in memory."""

import signal
import statistics
import time
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from torch import nn

from flowbp_ray.rollouts.policy import PolicyStore
from flowbp_ray.training.weights import Weights, load_chunk
from pipelines import interrupt

#: Bytes: an adapter of rank 16 of SD3.5 medium in float32, and of a whole model in bfloat16 what several processes can hold here.
SIZES = {"adapter": (96 * 2**20, torch.float32), "full": (2**30, torch.bfloat16)}
PARAMETER = 32 * 2**20  # bytes of one
ROUNDS = 4  # versions, of which the first is not counted


class Published(nn.Module):
    """Parameters of so many bytes in all."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        each = PARAMETER // dtype.itemsize
        torch.manual_seed(0)
        self.parts = nn.ParameterList(torch.randn(each).to(dtype) for _ in range(max(1, size // PARAMETER)))


class Trainer:
    """Publishes as a train worker does."""

    def __init__(self, size: int, dtype: torch.dtype, store: ActorHandle) -> None:
        torch.set_num_threads(1)
        self.weights, self.dtype, self.store = Weights(Published(size, dtype)), dtype, store
        self.kept: list[ObjectRef] = []

    def publish(self, version: int) -> tuple[int, float]:
        """Bytes and seconds."""
        began = time.perf_counter()
        ray.get(self.store.retire.remote(version))
        self.kept, size = [], 0
        for chunk in self.weights.chunks(self.dtype):
            size += chunk.bytes
            self.kept.append(ray.put(chunk))
        ray.get(self.store.publish.remote(version, 0, self.kept))
        return size, time.perf_counter() - began


class Loader:
    """Loads as a sampler does, checksums and all."""

    def __init__(self, size: int, dtype: torch.dtype, store: ActorHandle) -> None:
        torch.set_num_threads(1)
        self.trained, self.store = dict(Published(size, dtype).named_parameters()), store

    def load(self, version: int) -> float:
        """Seconds."""
        began = time.perf_counter()
        for reference in ray.get(self.store.fetch.remote(version)):
            load_chunk(self.trained, ray.get(reference))
        return time.perf_counter() - began

    def copy(self) -> float:
        """Seconds of a plain copy of the same weights."""
        others = [torch.empty_like(p) for p in self.trained.values()]
        for other, own in zip(others, self.trained.values(), strict=True):  # so that its memory is there
            other.copy_(own)
        began = time.perf_counter()
        for other, own in zip(others, self.trained.values(), strict=True):
            other.copy_(own)
        return time.perf_counter() - began


def measure(numbers: list[int], told: Callable[[str], object]) -> list[dict[str, Any]]:
    """A row for each size and number of samplers, on a local cluster of one node."""
    rows = []
    ray.init(address="local", num_cpus=2 + max(numbers), include_dashboard=False, log_to_driver=False, logging_level="error")
    signal.signal(signal.SIGTERM, interrupt)
    try:
        for name, (size, dtype) in SIZES.items():
            for number in numbers:
                told(f"{name}, {number} samplers")
                rows.append({"what": name} | case(size, dtype, number))
    finally:
        ray.shutdown()
    return rows


def case(size: int, dtype: torch.dtype, number: int) -> dict[str, Any]:
    """One size, so many samplers that load at once."""
    store = ray.remote(PolicyStore).options(num_cpus=0).remote(1)
    trainer = ray.remote(Trainer).remote(size, dtype, store)
    loaders = [ray.remote(Loader).remote(size, dtype, store) for _ in range(number)]
    copied = statistics.median(ray.get([loaders[0].copy.remote() for _ in range(ROUNDS)]))
    published, loaded, all_of_it = [], [], []
    for version in range(ROUNDS):
        count, seconds = ray.get(trainer.publish.remote(version))
        published.append(seconds)
        began = time.perf_counter()
        loaded += ray.get([loader.load.remote(version) for loader in loaders])
        all_of_it.append(time.perf_counter() - began)
    for actor in (*loaders, trainer, store):
        ray.kill(actor)
    middle = {"publish_s": published, "load_s": loaded[number:], "all_s": all_of_it}
    found = {k: statistics.median(v[1:] if k != "load_s" else v) for k, v in middle.items()}
    return {"samplers": number, "bytes": count, "copy_s": copied} | found


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    lines = [
        "| weights | MB | samplers | publish | load, each | all samplers | plain copy | publish : copy | load : copy |",
        "| --- |" + " ---: |" * 8,
    ]
    for row in rows:
        cells = [f"{row[k]:.3f} s" for k in ("publish_s", "load_s", "all_s", "copy_s")]
        cells += [f"{row[k] / row['copy_s']:.1f}" for k in ("publish_s", "load_s")]
        lines.append(f"| {row['what']} | {row['bytes'] / 2**20:,.0f} | {row['samplers']} | {' | '.join(cells)} |")
    said = "Samplers load at once, and share this machine's cores. Both sides sum the bytes up with SHA-256."
    return "\n".join([*lines, "", said])
