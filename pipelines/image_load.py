"""Text to image under load: many clients over HTTP, adapters that come and go, a replica killed, an adapter replaced."""

import base64
import io
import itertools
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import requests
from PIL import Image
from ray import serve

from flowbp_ray.backbones import load
from flowbp_ray.config.paths import MODELS
from flowbp_ray.training import adapter
from pipelines import interrupt

ADAPTERS = ("one", "two", "three", "four")
OTHER = "other"  # what is put in place of the last one
SEEDS = 4
PROMPT = "a red ring left of two blue squares"
TOKEN = "benchmark"


@dataclass
class Load:
    """What the clients saw."""

    pictures: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    #: Whether the last adapter may be the other one by now.
    replaced: bool = False


def adapters(folder: Path) -> None:
    """Random adapters of the embedded default that are far apart, and one more beside them."""
    backbone = load(MODELS["shapes"])
    adapter.add_adapter(backbone, rank=4, alpha=4.0, targets=backbone.lora_targets(backbone.transformer), seed=0)
    fresh = adapter.read(backbone.transformer)
    for number, name in enumerate((*ADAPTERS, OTHER)):
        state = {k: v + 0.02 * (number + 1) for k, v in fresh.items()}
        adapter.export(backbone, state, folder / "adapters" / name, weights="raw")


def measure(clients: int, seconds: float, replicas: int, told: Callable[[str], object]) -> dict[str, Any]:
    """One by one, then under load, on a local cluster."""
    from serve.text_to_image import TextToImage, build

    with tempfile.TemporaryDirectory() as scratch, socket.socket() as free:
        adapters(Path(scratch))
        (Path(scratch) / "token").write_text(TOKEN)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        settings = {
            "model": {"path": "shapes"},
            "adapters": f"{scratch}/adapters",
            "images": {"replicas": replicas, "cpus": 0.1},
            "adapters_held": 3,  # of four, so that they come and go
            "token_file": f"{scratch}/token",
            "tracking_uri": f"sqlite:///{scratch}/mlflow.db",
        }
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
        signal.signal(signal.SIGTERM, interrupt)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
            serve.run(build(TextToImage.model_validate(settings)), name="images", route_prefix="/")
            return loaded(f"http://127.0.0.1:{port}", Path(scratch), clients, seconds, told)
        finally:
            ray.shutdown()


def loaded(at: str, folder: Path, clients: int, seconds: float, told: Callable[[str], object]) -> dict[str, Any]:
    """The figures of a service that runs."""
    asked = [(name, seed) for seed in range(SEEDS) for name in ADAPTERS]
    told("one by one")
    for name in ADAPTERS:  # whatever is loaded the first time
        draw(at, name, 0)
    began = time.perf_counter()
    references = {key: draw(at, *key) for key in asked}
    alone = len(asked) / (time.perf_counter() - began)
    others = {seed: draw(at, OTHER, seed) for seed in range(SEEDS)}
    apart = min(np.abs(a - b).max() for a, b in itertools.combinations([*references.values(), *others.values()], 2))
    if apart <= 1:
        raise RuntimeError(f"two of the pictures are {apart} levels apart: a wrong one would not be told")
    seen, until = Load(), time.monotonic() + seconds
    lock = threading.Lock()

    def ask(number: int) -> None:
        while time.monotonic() < until:
            name, seed = asked[number % len(asked)]
            number += clients
            try:
                picture = draw(at, name, seed)
            except (requests.RequestException, ValueError) as error:
                with lock:
                    seen.errors.append(f"{name}: {error}")
                continue
            right = [references[name, seed]] + ([others[seed]] if name == ADAPTERS[-1] and seen.replaced else [])
            with lock:
                seen.pictures += 1
                if not any(np.abs(picture - one).max() <= 1 for one in right):
                    seen.wrong.append(f"{name}, seed {seed}")

    told(f"{clients} clients for {seconds:g} s")
    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, n) for n in range(clients)]
        time.sleep(seconds / 3)
        killed = kill()
        time.sleep(seconds / 3)
        seen.replaced = True
        replace(folder / "adapters" / OTHER, folder / "adapters" / ADAPTERS[-1])
        for one in asking:
            one.result()
    took = time.monotonic() - began
    final = draw(at, ADAPTERS[-1], 0)
    return {
        "clients": clients,
        "seconds": took,
        "pictures": seen.pictures,
        "one_by_one_per_second": alone,
        "under_load_per_second": seen.pictures / took,
        "ratio": seen.pictures / took / alone,
        "errors": len(seen.errors),
        "first_error": seen.errors[0] if seen.errors else None,
        "wrong": len(seen.wrong),
        "killed": killed,
        "replaced": bool(np.abs(final - others[0]).max() <= 1),
    }


def draw(at: str, name: str, seed: int) -> np.ndarray:
    """A picture ``(H, W, 3)``; ValueError for any answer but one."""
    answer = requests.post(
        f"{at}/v1/images/generations",
        json={"model": name, "prompt": PROMPT, "seed": seed},
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=120,
    )
    if answer.status_code != 200:
        raise ValueError(f"{answer.status_code}: {answer.text[:300]}")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))).astype(int)


def kill() -> int:
    """Kill one of this cluster's replicas that sample; how many were killed."""
    own = psutil.Process().children(recursive=True)
    found = [p for p in own if "ServeReplica:images:Painter" in " ".join(p.cmdline())]
    for process in found[:1]:
        process.kill()
    return len(found[:1])


def replace(by: Path, folder: Path) -> None:
    """Put an adapter in the place of another one, a file at a time and each of them whole."""
    for file in by.iterdir():
        (folder / f".{file.name}").write_bytes(file.read_bytes())
        (folder / f".{file.name}").replace(folder / file.name)


def table(row: dict[str, Any]) -> str:
    """The figures as Markdown."""
    return "\n".join(
        [
            "| clients | seconds | pictures | a second, one by one | under load | ratio | errors | wrong | killed | replaced |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            f"| {row['clients']} | {row['seconds']:.0f} | {row['pictures']} | {row['one_by_one_per_second']:.1f} | "
            f"{row['under_load_per_second']:.1f} | {row['ratio']:.2f} × | {row['errors']} | {row['wrong']} | "
            f"{row['killed']} replica | {'1 adapter' if row['replaced'] else 'none'} |",
        ]
    )
