"""What diffusers' attention backends gain: a velocity, and an active step's forward and backward, of a published model with
random weights, on the GPU if there is one.

Each backend has a process of its own: a kernel that fails takes its process's GPU with it.
"""

import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from pipelines.full_size import GB, build, timed
from pipelines.full_size import table as markdown
from pipelines.update_cost import Update

#: Those that need torch alone. ``native`` lets torch choose, which is the default.
BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient")


def measure(name: str, batch: int, height: int, width: int, repeats: int, told: Callable[[str], object]) -> dict[str, Any]:
    """A row for each backend. ValueError for a size or a model that has no choice of them."""
    build(name, "meta", torch.bfloat16, height=height, width=width).backbone.attend(BACKENDS[0])
    rows = []
    for backend in BACKENDS:
        told(f"{name}, {backend}")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            where, dtype, row = alone.submit(measured, name, backend, batch, height, width, repeats).result()
            rows.append(row)
    sizes = {"batch": batch, "height": height, "width": width, "repeats": repeats}
    return {"model": name, "device": where, "dtype": dtype, **sizes, "rows": rows}


def measured(name: str, backend: str, batch: int, height: int, width: int, repeats: int) -> tuple[str, str, dict[str, Any]]:
    """On what, in which dtype, and one backend's row."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    update = build(name, device, dtype, batch=batch, height=height, width=width)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return where, str(dtype).removeprefix("torch."), row(update, backend, repeats)


def row(update: Update, backend: str, repeats: int) -> dict[str, Any]:
    """Median seconds and the step's peak of memory; None, and why, from where the backend fails."""
    cuda = update.latents.is_cuda
    found: dict[str, Any] = {"backend": backend, "velocity": None, "step": None, "peak": None, "failed": None}

    @torch.no_grad()
    def velocity() -> None:
        update.backbone.branch(update.latents, update.sigmas[0], update.text, update.scale)

    try:
        update.backbone.attend(backend)
        for key, run in (("velocity", velocity), ("step", update.one_velocity)):
            timed(run)  # kernels are loaded
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if cuda else 0
            found[key] = statistics.median(timed(run) for _ in range(repeats))
        if cuda:
            found["peak"] = torch.cuda.max_memory_allocated() - before
    except (RuntimeError, ValueError) as error:  # for a kernel that is not there, does not take this, or fails
        found["failed"] = str(error).splitlines()[0].partition(". ")[0]
    return found


def table(found: dict[str, Any]) -> str:
    """As Markdown, and what it is of."""
    first, body = found["rows"][0], []
    for given in found["rows"]:
        cells = [given["backend"]]
        for key in ("velocity", "step"):
            seconds, other = given[key], first[key]
            cells.append("–" if seconds is None else f"{seconds:.3f}")
            cells.append(f"{seconds / other:.2f}" if seconds and other else "–")
        cells.append("–" if given["peak"] is None else f"{given['peak'] / GB:.2f}")
        body.append([*cells, given["failed"] or ""])
    head = ["backend", "a velocity, s", "of native's", "an active step, s", "of native's", "its peak, GB", "failed with"]
    said = (
        f"{found['model']}, an adapter, {found['dtype']}; {found['batch']} of {found['height']}×{found['width']} pixels; "
        f"{found['device']}. Medians of {found['repeats']} runs; a step is one conditional velocity, forward and backward, "
        "and its peak is beside weights and gradients."
    )
    return f"{markdown(head, body)}\n\n{said}"
