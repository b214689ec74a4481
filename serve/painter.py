"""The deployment that samples: one copy of a base pipeline in a replica, and many adapters on it.

Serve runs batches of different adapters at the same time. They share one transformer, so choosing the adapter and sampling is one
step that nothing else comes into, nor the loading and dropping of adapters.
"""

import asyncio
import itertools
import platform
import shutil
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from pydantic import NonNegativeFloat, PositiveInt
from ray import serve
from ray.serve import metrics

from flowbp_ray.backbones import family_of
from flowbp_ray.backbones.backbone import DTYPES
from flowbp_ray.config import ConfigError
from flowbp_ray.config.models import check_binds
from flowbp_ray.config.reward import Replicas
from flowbp_ray.config.schema import Model, Sampling
from flowbp_ray.config.section import Section
from flowbp_ray.pictures import to_uint8
from flowbp_ray.rollouts.asking import answering
from flowbp_ray.tracking import registry
from flowbp_ray.tracking.store import wait_less
from flowbp_ray.training import EXPORT_FILE
from pipelines import quiet_libraries
from serve.catalogue import ABSENT, FOLDER, RUN, STATE, label, state_of

#: Requests that a replica looks through for pictures that can be sampled together, in batches.
AHEAD = 4


class Painting(Section):
    """What samples."""

    model: Model
    """The base pipeline."""
    sampling: Sampling = Sampling()
    """How pictures are sampled where a request does not say otherwise."""
    images: Replicas = Replicas()
    """Processes that sample; each has the whole pipeline."""
    threads: PositiveInt = 1
    """torch's threads in each of them."""
    adapters_held: PositiveInt = 8
    """Adapters that each of them keeps loaded; of more than these the one that was not asked for the longest is dropped."""
    batch: PositiveInt = 8
    """Pictures that are sampled together, if they agree in all but prompt and seed."""
    batch_wait: NonNegativeFloat = 0.02
    """Seconds that a picture waits for others."""

    @property
    def base(self) -> str:
        """The base's name: the last part of its path."""
        return self.model.path.rstrip("/").rpartition("/")[2]


class Picture(NamedTuple):
    """One picture to sample; pictures that agree in all but the first two are sampled together."""

    prompt: str
    seed: int
    strength: float
    steps: int
    guidance_scale: float
    height: int
    width: int


class ReplacedError(ValueError):
    """A folder has other weights than when it was looked up."""


class Adapter:
    """An adapter that a replica's pipeline has loaded. When nothing uses it any more, the pipeline drops it."""

    numbers = itertools.count()

    def __init__(self, dropped: deque[str]) -> None:
        self.name = f"adapter{next(self.numbers)}"
        # Only noted here: this may happen in any thread at any moment.
        weakref.finalize(self, dropped.append, self.name)


class Painter:
    """A replica. Made to hold so many adapters by `painter`."""

    def __init__(self, settings: Painting, uri: str) -> None:
        quiet_libraries()
        wait_less()  # while an adapter is fetched no other one can be
        torch.set_num_threads(settings.threads)
        self.settings, self.uri, model = settings, uri, settings.model
        self.device = "cuda" if settings.images.gpus else "cpu"
        family = family_of(model.source, model.revision)
        self.backbone = family.from_pretrained(model.source, DTYPES[model.dtype], self.device, model.revision)
        self.backbone.batched_branches = settings.sampling.batched_branches
        self.pipeline, transformer = self.backbone.pipeline, self.backbone.transformer
        self.shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
        self.lock = threading.Lock()
        self.dropped: deque[str] = deque()
        self.batched.set_max_batch_size(AHEAD * settings.batch)
        self.batched.set_batch_wait_timeout_s(settings.batch_wait)
        self.drawn = metrics.Counter("flowbp_pictures", description="Pictures sampled.", tag_keys=("adapter",))

    @answering
    async def draw(self, picture: Picture) -> np.ndarray:
        """Sample: uint8 ``(H, W, 3)``, by the adapter of the request's multiplexed model id, or by the base.

        ValueError for an adapter that cannot be had or is another model's, and for a size that the model does not make.
        """
        name = serve.get_multiplexed_model_id()
        adapter = await self.adapter(name) if name else None
        answer = await self.batched((adapter, picture))
        if isinstance(answer, Exception):
            raise answer
        self.drawn.inc(tags={"adapter": name or "base"})
        return answer

    async def adapter(self, name: str) -> Adapter:
        """Fetch an adapter; a coroutine that is multiplexed (`painter`)."""
        return await asyncio.to_thread(self.fetched, name)

    @serve.batch
    async def batched(self, asked: list[tuple[Adapter | None, Picture]]) -> list[np.ndarray | Exception]:
        """Sample those together that can be; a failure is the answer of those that it is about."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, (adapter, picture) in enumerate(asked):
            groups.setdefault((adapter and adapter.name, *picture[2:]), []).append(number)
        answers: dict[int, np.ndarray | Exception] = {}
        most = self.settings.batch
        for numbers in [of[n : n + most] for of in groups.values() for n in range(0, len(of), most)]:
            adapter, pictures = asked[numbers[0]][0], [asked[n][1] for n in numbers]
            try:
                answers |= zip(numbers, await asyncio.to_thread(self.sample, adapter, pictures), strict=True)
            except Exception as error:  # another group's pictures are not the worse for it
                answers |= dict.fromkeys(numbers, error)
        return [answers[n] for n in range(len(asked))]

    def sample(self, adapter: Adapter | None, pictures: Sequence[Picture]) -> np.ndarray:
        """uint8 ``(B, H, W, 3)`` of pictures that agree in all but prompt and seed."""
        first = pictures[0]
        with self.lock:
            self._choose(adapter, first.strength)
            sampled = self.backbone.sample(
                [p.prompt for p in pictures],
                [p.seed for p in pictures],
                steps=first.steps,
                guidance_scale=first.guidance_scale,
                height=first.height,
                width=first.width,
                kind=self.settings.sampling.grid,
            )
        if not torch.isfinite(sampled).all():
            raise FloatingPointError("the pictures are not finite")
        return to_uint8(sampled)

    def fetched(self, name: str) -> Adapter:
        """An adapter by its name between processes, loaded; ValueError if it cannot be had, or does not fit, and ReplacedError if
        its folder has other weights by now."""
        with tempfile.TemporaryDirectory(prefix="adapter-") as place:
            found = self._copied(name, Path(place))
            if not (found / EXPORT_FILE).exists():
                raise ValueError(f"{label(name)} was trained whole: serve it by itself, as model.path")
            try:
                check_binds(found, self.shapes, self.settings.base)
            except ValueError as error:
                raise ValueError(str(error).replace(str(found), label(name))) from error
            adapter = Adapter(self.dropped)
            with self.lock:
                self._drop()
                self.pipeline.load_lora_weights(found, weight_name=EXPORT_FILE, adapter_name=adapter.name)
            return adapter

    def _copied(self, name: str, place: Path) -> Path:
        """Copy an adapter to ``place``; the folder in it that has the weights. Errors as of `fetched`."""
        if name.startswith(FOLDER):
            folder, _, state = name.removeprefix(FOLDER).rpartition(STATE)
            source = Path(folder) / EXPORT_FILE
            try:
                before = state_of(source)
                shutil.copy(source, place)
                if not before == state_of(source) == state:
                    raise ReplacedError(label(name))
            except FileNotFoundError as error:
                if not Path(folder).parent.is_dir():
                    raise ValueError(
                        f"the machine {platform.node()} cannot see the adapters' folder: name one that all machines share"
                    ) from error
                raise ReplacedError(label(name)) from error
            return place
        try:
            return registry.find(self.uri, name.removeprefix(RUN).partition(STATE)[0]).fetch(place)[1]
        except ConfigError as error:
            cause = error.__cause__
            if isinstance(cause, MlflowException) and cause.error_code not in ABSENT:
                raise RuntimeError(str(error)) from error  # a server that does not answer: later it may
            raise ValueError(str(error)) from error

    def check_health(self) -> None:
        """Serve replaces a replica whose device no longer computes."""
        torch.ones(1, device=self.device).sum().item()

    def _choose(self, adapter: Adapter | None, strength: float) -> None:
        self._drop()
        if adapter is None:
            if self._loaded():
                self.pipeline.disable_lora()
            return
        self.pipeline.enable_lora()
        self.pipeline.set_adapters([adapter.name], [strength])

    def _drop(self) -> None:
        while self.dropped:
            self.pipeline.delete_adapters(self.dropped.popleft())  # of one that failed to load it may have a part

    def _loaded(self) -> list[str]:
        return self.pipeline.get_list_adapters().get("transformer", [])


def painter(held: int) -> type[Painter]:
    """The class of replicas that hold so many adapters."""

    class Holding(Painter):
        """A replica."""

        @serve.multiplexed(max_num_models_per_replica=held)
        async def adapter(self, name: str) -> Adapter:
            """As the class above."""
            return await super().adapter(name)

    return Holding
