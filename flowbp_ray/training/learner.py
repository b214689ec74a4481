"""The learner: what one train worker does with micro-batches, without knowing where they come from."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import AdamW

from flowbp_ray.config import AlignConfig
from flowbp_ray.rollouts.batches import Block, Policy, policy_version
from flowbp_ray.rollouts.plans import grid_of, plan_of
from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.training import adapter
from flowbp_ray.training.update import accumulate, clip_by_norm


class Learner:
    """Backbone, adapter, AdamW and the averaged weights. Version ``v`` is the adapter after ``v`` updates."""

    def __init__(self, config: AlignConfig) -> None:
        torch.set_num_threads(config.cluster.threads)
        self.config, train = config, config.train
        self.backbone = adapter.adapted(config, "cuda" if config.cluster.trainer_gpus else "cpu")
        self.negative = self.backbone.encode([""])
        self.sigmas = grid_of(config, self.backbone)
        self.parameters = adapter.parameters(self.backbone.transformer)
        self.optimizer = AdamW(
            self.parameters, lr=train.learning_rate, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )
        # Summed in float64, so that the float32 gradient does not depend on how a step's micro-batches are shared out.
        self.gradient = torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.float64, device=self.backbone.device)
        self.averaged = adapter.read(self.backbone.transformer)
        self.version = 0
        self.guidance = adapter.guidance_of(config.sampling.guidance_scale, config.surrogate, self.backbone)

    @property
    def plan(self) -> Plan:
        """The surrogate of the step that is to be done next."""
        return plan_of(self.config, self.sigmas, self.version)

    def policy(self) -> Policy:
        """The raw weights as samplers load them."""
        state = adapter.read(self.backbone.transformer)
        return Policy(self.version, {k: v.numpy() for k, v in state.items()}, adapter.checksum(state))

    def accumulate(self, block: Block) -> None:
        """Add a micro-batch's share of the step's gradient; RuntimeError if it is of another step or policy version."""
        version = policy_version(self.config, self.version)
        if (block["step"] != self.version).any() or (block["version"] != version).any():
            raise RuntimeError(
                f"step {self.version} was given samples of step {sorted(set(block['step'].tolist()))} "
                f"and policy version {sorted(set(block['version'].tolist()))}, not {version}"
            )
        plan = self.plan
        latents, gradients = self._tensor(block, "latents"), self._tensor(block, "gradients")
        if (longest := self.config.train.max_sample_grad_norm) is not None:
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
            self.backbone.encode(block["prompt"].tolist()),
            self.negative,
            guidance=self.guidance,
            guidance_scale=self.config.sampling.guidance_scale,
            batch=self.config.train.batch,
            copies=[latents[:, k] for k, is_copy in enumerate(copied) if is_copy],
            velocity_penalty=self.config.train.velocity_penalty,
        )
        gradients = [p.grad for p in self.parameters]
        if missing := sum(g is None for g in gradients):
            raise RuntimeError(f"{missing} of {len(gradients)} adapter parameters received no gradient in step {self.version}")
        self.gradient += torch.cat([g.flatten() for g in gradients if g is not None])
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, add_up: Callable[[Tensor], None] | None = None) -> float:
        """One step of AdamW and of the average; returns the gradient's norm before it is cut.

        ``add_up`` replaces the flat float64 gradient in place by its sum over all train workers. FloatingPointError where
        it is not finite; no update is made then.
        """
        if add_up is not None:
            add_up(self.gradient)
        flat = self.gradient.float()
        self.gradient.zero_()
        norm = clip_by_norm([flat], self.config.train.max_grad_norm)
        for parameter, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averaged = adapter.average(self.averaged, adapter.read(self.backbone.transformer), self.config.train.ema)
        self.version += 1
        return norm

    def evaluated(self) -> adapter.State:
        """The weights that are evaluated and exported, as configured: averaged or raw."""
        return self.averaged if self.config.evaluation.weights == "ema" else adapter.read(self.backbone.transformer)

    def preview(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Finished latents ``(B, C, h, w)`` by what would be exported; the trained weights are as before afterwards."""
        sampling, raw = self.config.sampling, adapter.read(self.backbone.transformer)
        adapter.write(self.backbone.transformer, self.evaluated())
        self.backbone.transformer.set_adapters("default", self.config.adapter.export_strength)
        try:
            return self.backbone.sample_latents(
                prompts,
                seeds,
                steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                height=sampling.height,
                width=sampling.width,
                kind=sampling.grid,
            )
        finally:
            adapter.write(self.backbone.transformer, raw)
            self.backbone.transformer.set_adapters("default", 1.0)

    def save(self, folder: Path) -> None:
        """A checkpoint: the exported adapter as diffusers loads it; beside it raw and averaged weights and the optimizer."""
        strength = self.config.adapter.export_strength
        adapter.export(self.backbone, self.evaluated(), folder, weights=self.config.evaluation.weights, strength=strength)
        raw = adapter.read(self.backbone.transformer)
        states = {f"raw.{k}": v for k, v in raw.items()} | {f"ema.{k}": v for k, v in self.averaged.items()}
        save_file(states, folder / "state.safetensors")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps({"version": self.version}) + "\n")

    def _tensor(self, block: Block, column: str) -> Tensor:
        return torch.tensor(block[column], device=self.backbone.device)
