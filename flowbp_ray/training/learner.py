"""The learner: what one train worker does with micro-batches, without knowing where they come from."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from flowbp_ray.backbones.backbone import DTYPES
from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.batches import Block, Chunk, policy_version
from flowbp_ray.rollouts.kept import Kept
from flowbp_ray.rollouts.plans import grid_of, plan_of
from flowbp_ray.rollouts.wire import widen
from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.training import adapter, checkpoints, full
from flowbp_ray.training.checkpoints import Policies, Progress
from flowbp_ray.training.update import accumulate
from flowbp_ray.training.weights import AddUp, ShardedWeights, Weights, shard


class Learner:
    """Backbone, what is trained of it, AdamW and the averaged weights. Version ``v`` is what is trained after ``v`` updates.

    Sharded, it needs a process group, and every worker has to do the same at the same time.
    """

    def __init__(self, config: AlignConfig, rank: int = 0) -> None:
        torch.set_num_threads(config.cluster.threads)
        self.config, self.rank, train = config, rank, config.train
        device = "cuda" if config.cluster.trainer_gpus else "cpu"
        self.backbone = adapter.trainable(config, "cpu" if train.sharded else device)
        transformer = self.backbone.transformer
        if train.sharded:
            shard(self.backbone, device, DTYPES[config.model.dtype])
        self.negative, self.texts = self.backbone.encode([""]), Kept(self.backbone)
        self.sigmas = grid_of(config, self.backbone)
        self.weights = ShardedWeights(transformer) if train.sharded else Weights(transformer)
        self.optimizer = AdamW(
            self.weights.parameters.values(),
            lr=train.learning_rate,
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
        )
        self.averaged = self.weights.read()
        self.progress = Progress()
        self.parts = 0  # micro-batches of this step so far
        self.guidance = adapter.guidance_of(config.sampling.guidance_scale, config.surrogate, self.backbone)

    @property
    def version(self) -> int:
        """What is held: the number of steps so far."""
        return self.progress.version

    @property
    def publishers(self) -> int:
        """How many workers have a part of the trained weights, and of a checkpoint, that is theirs."""
        return self.config.train.workers if self.config.train.sharded else 1

    @property
    def publishes(self) -> bool:
        """Whether this one is of those."""
        return self.rank < self.publishers

    @property
    def plan(self) -> Plan:
        """The surrogate of the step that is to be done next."""
        return plan_of(self.config, self.sigmas, self.version)

    def policy(self) -> Iterator[Chunk]:
        """What samplers load of the raw weights from this worker: a shard, or, from the first worker, all."""
        if self.publishes:
            yield from self.weights.chunks(torch.float32 if self.config.adapter else DTYPES[self.config.model.dtype])

    def accumulate(self, block: Block) -> None:
        """Add a micro-batch's share of the step's gradient; RuntimeError if it is of another step or policy version."""
        version = policy_version(self.config, self.version)
        if (block["step"] != self.version).any() or (block["version"] != version).any():
            raise RuntimeError(
                f"step {self.version} was given samples of step {sorted(set(block['step'].tolist()))} "
                f"and policy version {sorted(set(block['version'].tolist()))}, not {version}"
            )
        plan, train = self.plan, self.config.train
        self.parts += 1
        before_last = None
        if train.unsharded_gradients:
            synchronise = self.backbone.transformer.set_requires_gradient_sync
            synchronise(False)
            if self.parts == train.batch // train.micro_batch // train.workers:
                before_last = partial(synchronise, True)
        latents, gradients = self._tensor(block, "latents"), self._tensor(block, "gradients")
        if (longest := train.max_sample_grad_norm) is not None:
            norms = gradients.flatten(2).norm(dim=2).view(*gradients.shape[:2], 1, 1, 1)
            gradients = gradients * (longest / norms.clamp(min=longest))
        copied = [plan.reward_inputs[a.reward_input].copy is not None for a in plan.active]
        accumulate(
            self.backbone,
            plan,
            self.sigmas,
            {a.index: latents[:, k] for k, a in enumerate(plan.active) if not copied[k]},
            [gradients[:, m] for m in range(gradients.shape[1])],
            self._tensor(block, "weight"),
            self.texts(block["prompt"].tolist()),
            self.negative,
            guidance=self.guidance,
            guidance_scale=self.config.sampling.guidance_scale,
            batch=train.batch // train.workers if train.sharded else train.batch,  # FSDP takes the workers' mean
            copies=[latents[:, k] for k, is_copy in enumerate(copied) if is_copy],
            velocity_penalty=train.velocity_penalty,
            before_last=before_last,
        )
        self.weights.collect()
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize()  # or what is still to be done would pass for waiting for the next micro-batch

    def update(self, add_up: AddUp | None = None) -> float:
        """One step of AdamW and of the average; returns the gradient's norm before it is cut.

        ``add_up`` replaces a tensor in place by its sum over all train workers. Where the norm is not finite all stays as it is,
        and the step is counted as skipped.
        """
        norm, progress = self.weights.finish(self.config.train.max_grad_norm, add_up), self.progress
        if math.isfinite(norm):
            self.optimizer.step()
            self.weights.average(self.averaged, self.config.train.ema)
            progress.skipped_in_a_row = 0
        else:
            progress.skipped, progress.skipped_in_a_row = progress.skipped + 1, progress.skipped_in_a_row + 1
        self.optimizer.zero_grad(set_to_none=True)
        progress.version, self.parts = progress.version + 1, 0
        return norm

    def exported(self) -> contextlib.AbstractContextManager[object]:
        """The model with the weights that are evaluated and exported, as configured: averaged or raw."""
        ema = self.config.evaluation.weights == "ema"
        return self.weights.replaced(self.averaged) if ema else contextlib.nullcontext()

    def preview(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Finished latents ``(B, C, h, w)`` by what would be exported, a micro-batch at a time, for which there is room; the
        trained weights are as before afterwards."""
        sampling, size = self.config.sampling, self.config.train.micro_batch
        with self.exported():
            if self.config.adapter:
                self.backbone.transformer.set_adapters("default", self.config.adapter.export_strength)
            try:
                return torch.cat(
                    [
                        self.backbone.sample_latents(
                            prompts[start : start + size],
                            seeds[start : start + size],
                            steps=sampling.steps,
                            guidance_scale=sampling.guidance_scale,
                            height=sampling.height,
                            width=sampling.width,
                            kind=sampling.grid,
                        )
                        for start in range(0, len(prompts), size)
                    ]
                )
            finally:
                if self.config.adapter:
                    self.backbone.transformer.set_adapters("default", 1.0)

    def save(self, folder: Path, policies: Policies) -> None:
        """This worker's part of a checkpoint: what is exported, as diffusers loads it, is the first worker's; all else is every
        worker's that has some of its own. ``policies`` are the versions in use that this worker published."""
        folder.mkdir(exist_ok=True)
        with self.exported():
            if self.config.adapter:
                state = adapter.read(self.backbone.transformer)
                if self.rank == 0:
                    which, strength = self.config.evaluation.weights, self.config.adapter.export_strength
                    adapter.export(self.backbone, state, folder, weights=which, strength=strength)
            else:
                full.save(self.backbone.transformer, folder / full.TRANSFORMER, DTYPES[self.config.model.dtype], self.rank)
        if self.publishes:
            checkpoints.write(folder, self.rank, self.publishers, self._state(), policies, self.progress)

    def restore(self, folder: Path) -> Policies:
        """Go on where the learner was that saved a checkpoint, or several of them together, sharded or not; returns what is to
        be published again. CheckpointError if the checkpoint is not whole, or not this model's."""
        self.progress, parts = checkpoints.check(folder)
        if updates := self.progress.version - self.progress.skipped:
            moments = [
                {"step": torch.tensor(float(updates)), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                for p in self.weights.parameters.values()
            ]
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": dict(enumerate(moments)), "param_groups": groups})
        checkpoints.read(folder, parts, self._state())
        return checkpoints.read_policies(folder, parts, self.rank, self.publishers) if self.publishes else {}

    def dump(self, folder: Path, blocks: Sequence[Block]) -> None:
        """Keep what this worker had in a step that was skipped just now: `restore` takes the folder, `accumulate` the
        ``blocks`` in it."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.publishes:
            progress = self.progress
            before = replace(
                progress,
                version=progress.version - 1,
                skipped=progress.skipped - 1,
                skipped_in_a_row=progress.skipped_in_a_row - 1,
            )
            checkpoints.write(folder, self.rank, self.publishers, self._state(), {}, before)
        for number, block in enumerate(blocks):
            plain = {k: v.astype(str) if v.dtype == object else v for k, v in block.items()}
            np.savez(folder / f"blocks_{self.rank}_{number}.npz", allow_pickle=False, **plain)

    def _state(self) -> checkpoints.State:
        """All tensors that change in training, as they are, by names that are the same however they are shared out."""
        state: dict[str, checkpoints.Part] = {}
        for name, parameter in self.weights.parameters.items():
            parts = {"raw": parameter, "ema": self.averaged[name]}
            if moments := self.optimizer.state.get(parameter):
                parts |= {k: moments[k] for k in ("exp_avg", "exp_avg_sq")}
            state |= {f"{which}.{name}": checkpoints.Part.of(parameter, tensor) for which, tensor in parts.items()}
        return state

    def _tensor(self, block: Block, column: str) -> Tensor:
        return torch.tensor(widen(block[column]), device=self.backbone.device)
