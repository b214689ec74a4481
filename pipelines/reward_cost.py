"""What the reward service costs over the same objective in one process: milliseconds, bytes, and a replica killed under load."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray import serve
from torch import Tensor

from flowbp_ray.config import AlignConfig, load
from flowbp_ray.rollouts.asking import Request
from flowbp_ray.rollouts.stages import service
from pipelines.session import cluster
from serve.rewards import Scores, application, here

CONFIG = Path(__file__).parents[1] / "configs" / "shapes" / "sparse.yaml"
APPLICATION = "benchmark"
#: Latents (batch, channels, height, width): a micro-batch of the embedded default, and pictures of 512 × 512 by SD3.5's decoder's
#: channels and factor of 8.
SIZES = {"embedded default, 64 px": (6, 4, 16, 16), "SD3.5, 512 px": (2, 16, 64, 64)}


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A third reward, which costs nothing."""
    return images.mean((1, 2, 3))


def decoder(folder: Path) -> Path:
    """A model folder with a narrow random decoder of SD3.5's channels and factor: what travels is of the same size, and little is
    computed beside it."""
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(latent_channels=16, block_out_channels=[4] * 4, norm_num_groups=4, layers_per_block=1, **kinds)
    vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    vae.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42"})
    )
    return folder


def configured(model: str, own: bool) -> AlignConfig:
    """Three rewards of which one is only watched, decoded by two replicas; if ``own`` each with two replicas of its own."""
    replicas = ", deployment: {replicas: 2, cpus: 0.1}" if own else ""
    components = (
        f"{{name: preference, path: shapes/reward, weight: 1{replicas}}}",
        f'{{name: brightness, kind: function, path: "pipelines.reward_cost:brightness", weight: 1{replicas}}}',
        f"{{name: judge, path: shapes/judge, weight: 0{replicas}}}",
    )
    settings = [f"reward.components=[{', '.join(components)}]", f"model.path={model}"]
    return load(CONFIG, [*settings, "cluster.reward_replicas=2", "cluster.reward_cpus=0.1"])


def measure(repeats: int, clients: int, told: Callable[[str], object]) -> list[dict[str, Any]]:
    """A row for each size and placement, on a local cluster."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch, cluster(configured("shapes", own=True)):
        models = {"embedded default, 64 px": "shapes", "SD3.5, 512 px": str(decoder(Path(scratch)))}
        for size, shape in SIZES.items():
            latents = [np.random.default_rng(n).standard_normal(shape, dtype=np.float32) for n in range(clients)]
            prompts = [f"{n} red rings" for n in range(shape[0])]
            local = here(configured(models[size], own=False))
            alone = [local.score(one, prompts) for one in latents]
            for own in (False, True):
                told(f"{size}, {'each reward in two processes of its own' if own else 'all in one process of two'}")
                serve.run(application(configured(models[size], own)), name=APPLICATION, route_prefix=None)
                try:
                    rows.append({"size": size, "own": own} | case(local, latents, prompts, alone, repeats, own))
                finally:
                    serve.delete(APPLICATION)
    return rows


def case(
    local: Any, latents: list[np.ndarray], prompts: list[str], alone: list[Scores], repeats: int, own: bool
) -> dict[str, Any]:
    """One size and placement: in turn here and served, then by several clients at once, of whose rewards one is killed."""
    rewards = service(APPLICATION)

    def ask(number: int) -> Scores:
        answer: Scores = Request(rewards, "score", latents[number], prompts, what="scoring", prompts=prompts).result()
        return answer

    for number in range(len(latents)):  # both replicas of everything are warm
        ask(number)
    seconds: dict[str, list[float]] = {"here": [], "served": []}
    for _ in range(repeats):
        for name, do in (("here", lambda: local.score(latents[0], prompts)), ("served", lambda: ask(0))):
            began = time.perf_counter()
            do()
            seconds[name].append(time.perf_counter() - began)

    def wrong(number: int) -> bool:
        answer, wanted = ask(number), alone[number]
        return bool(
            np.abs(answer["gradient"] - wanted["gradient"]).max() > 1e-4 * np.abs(wanted["gradient"]).max()
            or np.abs(answer["objective"] - wanted["objective"]).max() > 1e-4 * np.abs(wanted["objective"]).max()
        )

    numbers = [n % len(latents) for n in range(repeats * len(latents))]
    with ThreadPoolExecutor(len(latents)) as pool:
        pending = [pool.submit(wrong, n) for n in numbers]
        while sum(p.done() for p in pending) < len(pending) // 3:
            time.sleep(0.01)
        killed = kill("reward-preference" if own else "Rewards")
        answers = [p.result() for p in pending]  # an answer that is lost raises
    here_ms, served_ms = (1000 * statistics.median(v) for v in seconds.values())
    return {
        "here_ms": here_ms,
        "served_ms": served_ms,
        "added_ms": served_ms - here_ms,
        "latents_bytes": latents[0].nbytes,
        "written_bytes": written(latents[0], prompts, local, own),
        "requests_under_load": len(answers),
        "wrong": sum(answers),
        "killed": killed,
    }


def written(latents: np.ndarray, prompts: list[str], local: Any, own: bool) -> int:
    """Bytes that one request has Ray serialize, each once: what goes to the service and comes back, and of rewards with processes
    of their own the pictures, which all of them read, and the gradients of those with a weight. What is read lies where it was
    written."""

    def size(value: object) -> int:
        context = ray._private.worker.global_worker.get_serialization_context()
        return int(context.serialize(value).total_bytes)

    answer = local.score(latents, prompts)
    total = size(latents) + size(answer)
    if own:
        pictures = np.ascontiguousarray(local.look(latents, prompts)["pictures"].transpose(0, 3, 1, 2).astype(np.float32))
        total += size(pictures)
        for component in local.components:
            scores = answer["components"][component.name]
            total += size((scores, pictures if component.weight else None))
    return total


def kill(deployment: str) -> int:
    """Kill one of a deployment's replicas; how many were killed."""
    title = f"ServeReplica:{APPLICATION}:{deployment}"
    found = [p for p in psutil.process_iter(["cmdline"]) if title in " ".join(p.info["cmdline"] or ())]
    for process in found[:1]:
        process.kill()
    return len(found[:1])


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    lines = [
        "| latents | rewards | in one process | served | added | bytes written | of the latents' | under load | wrong or lost |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        where = "2 processes each" if row["own"] else "with the decoder"
        lines.append(
            f"| {row['size']} | {where} | {row['here_ms']:.0f} ms | {row['served_ms']:.0f} ms | {row['added_ms']:+.0f} ms | "
            f"{row['written_bytes']:,} | {row['written_bytes'] / row['latents_bytes']:.1f} × | {row['requests_under_load']}, "
            f"{row['killed']} replica killed | {row['wrong']} |"
        )
    return "\n".join(lines)
