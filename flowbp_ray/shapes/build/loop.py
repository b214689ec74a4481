"""The one training loop of all stages: data by step number, AdamW or Muon, averaged weights, exact resume."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

CHECKPOINT_EVERY, LOG_EVERY = 250, 50  # steps


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains: linear warm-up, then constant, then linear decay to zero over
    the last ``decay`` share of the steps."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    decay: float = 0.3
    weight_decay: float = 0.01
    average: float = 0.999
    muon: bool = False  # for the matrices of stacked layers; everything else is always AdamW's

    def factor(self, step: int) -> float:
        """Learning rate of a step as a share of the highest."""
        rest = (self.steps - step) / max(self.decay * self.steps, 1)
        return min(1.0, (step + 1) / self.warmup, rest)


class Float32(TorchFunctionMode):
    """Takes float32 for bfloat16: Muon asks for bfloat16, and a CPU that has to emulate it takes four times the whole step."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Every torch call passes here."""
        return args[0].float() if func is Tensor.bfloat16 else func(*args, **(kwargs or {}))


def optimizers(model: nn.Module, schedule: Schedule) -> list[Optimizer]:
    """AdamW for all parameters; with ``schedule.muon`` the linear layers of stacked blocks are Muon's (same learning rate)."""
    blocks = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
    }
    hidden = [p for name, p in model.named_parameters() if schedule.muon and name in blocks]
    rest = [p for name, p in model.named_parameters() if not (schedule.muon and name in blocks)]
    common = {"lr": schedule.learning_rate, "weight_decay": schedule.weight_decay}
    made: list[Optimizer] = [AdamW(rest, betas=(0.9, 0.99), **common)]
    return [*made, Muon(hidden, adjust_lr_fn="match_rms_adamw", **common)] if hidden else made


def train(
    model: nn.Module,
    batches: Dataset,
    loss: Callable[[nn.Module, dict[str, Tensor], torch.Generator], tuple[Tensor, dict[str, float]]],
    schedule: Schedule,
    work: Path,
    *,
    seed: int,
    device: str,
    workers: int,
    stop_after: int | None = None,
    keep_after: int | None = None,
) -> nn.Module:
    """Train ``model`` and return its averaged copy.

    ``batches[step]`` is the batch of a step, so a resumed run sees what an undisturbed one would.
    State goes to ``work/state.pt`` every 250 steps and the losses to ``work/log.jsonl``; a run that finds
    its state goes on from there. ``stop_after`` ends the run early at a step, keeping the schedule. The averaged
    weights after ``keep_after`` steps (0: those it starts from) stay in ``work/kept.pt``.
    """
    work.mkdir(parents=True, exist_ok=True)
    (work / "schedule.json").write_text(json.dumps(asdict(schedule)) + "\n")
    model.to(device).train()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(schedule.average))
    steppers = optimizers(model, schedule)
    rates = [LambdaLR(o, schedule.factor) for o in steppers]
    parts = {"model": model, "averaged": averaged}
    parts |= {f"optimizer_{i}": o for i, o in enumerate(steppers)} | {f"rate_{i}": r for i, r in enumerate(rates)}
    state_file = work / "state.pt"
    start = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        start = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def save(step: int) -> None:
        torch.save({"step": step} | {k: p.state_dict() for k, p in parts.items()}, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").replace(state_file)

    if start == keep_after == 0:
        torch.save(averaged.module.state_dict(), work / "kept.pt")
    end = min(schedule.steps, stop_after or schedule.steps)
    loader = DataLoader(batches, batch_size=None, sampler=range(start, end), num_workers=workers)
    progress = tqdm(loader, desc=work.name, initial=start, total=schedule.steps, unit="step", mininterval=1.0)
    began = time.perf_counter()
    for step, batch in enumerate(progress, start):
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        value, figures = loss(model, {k: v.to(device) for k, v in batch.items()}, generator)
        model.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{work.name}: the gradient of step {step} is not finite; lower the learning rate")
        with Float32():
            for stepper in steppers:
                stepper.step()
        for rate in rates:
            rate.step()
        averaged.update_parameters(model)
        if (step + 1) % LOG_EVERY == 0:
            row = {"step": step + 1, "loss": value.item(), "seconds": round(time.perf_counter() - began, 1), **figures}
            with (work / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            progress.set_postfix(loss=f"{row['loss']:.4f}")
        if step + 1 == keep_after:
            torch.save(averaged.module.state_dict(), work / "kept.pt")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == end:
            save(step + 1)
    return averaged.module.eval()
