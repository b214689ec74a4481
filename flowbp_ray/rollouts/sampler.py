"""A sampler: rolls out one micro-batch with the policy version that it asks for, and keeps what its plan needs."""

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from flowbp_ray.config import AlignConfig
from flowbp_ray.randomness import prompt_indices, seed_of
from flowbp_ray.rollouts.batches import Block, Chunk, MicroBatch
from flowbp_ray.rollouts.kept import Kept
from flowbp_ray.rollouts.plans import grid_of, plan_of
from flowbp_ray.rollouts.rollout import roll_out
from flowbp_ray.rollouts.wire import narrow
from flowbp_ray.surrogate.inputs import noised_copies, reward_inputs, sample_weights
from flowbp_ray.training.adapter import merge, plain_weights, trainable
from flowbp_ray.training.weights import load_chunk


class Sampler:
    """A backbone, no autograd. ``fetch(version)`` gives the trained weights, ``prompts`` are all there are."""

    def __init__(self, config: AlignConfig, prompts: Sequence[str], fetch: Callable[[int], Iterable[Chunk]]) -> None:
        torch.set_num_threads(config.cluster.threads)
        self.config, self.prompts, self.fetch = config, prompts, fetch
        device = "cuda" if config.cluster.sampler_gpus else "cpu"
        self.backbone = trainable(config, device)
        self.plain = plain_weights(self.backbone.transformer) if config.adapter else None
        self.trained = {name: p for name, p in self.backbone.transformer.named_parameters() if p.requires_grad}
        self.negative, self.texts = self.backbone.encode([""]), Kept(self.backbone)
        self.sigmas = grid_of(config, self.backbone)
        self.version = -1

    def __call__(self, block: Block) -> Block:
        """Roll out the micro-batch whose number is the one row of ``block["number"]``."""
        began = time.perf_counter()
        config, sampling = self.config, self.config.sampling
        batch = MicroBatch.of(config, int(block["number"][0]))
        self.hold(batch.version)
        loading, began = time.perf_counter() - began, time.perf_counter()
        plan = plan_of(config, self.sigmas, batch.step)
        chosen = prompt_indices(config.train.seed, batch.step, config.train.batch, len(self.prompts))
        prompts = [self.prompts[chosen[s]] for s in batch.samples]
        conditioning = self.texts(prompts)

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            return self.backbone.velocity(latents, sigma, conditioning, self.negative, sampling.guidance_scale)

        rollout = roll_out(self.noise(batch, "noise"), self.sigmas, velocity, plan)
        cached = plan, rollout.latents, rollout.velocities, self.sigmas
        copies = noised_copies(*cached, [self.noise(batch, f"copy {m}") for m in range(plan.copies)]) if plan.copies else []
        with torch.no_grad():
            inputs = reward_inputs(*cached, copies, [velocity(c, self.sigmas[plan.steps - 1]) for c in copies])
        weights = sample_weights(*cached)
        seen = [plan.reward_inputs[a.reward_input].copy for a in plan.active]
        active = [rollout.latents[a.index] if c is None else copies[c] for a, c in zip(plan.active, seen, strict=True)]
        number = len(prompts)
        return {
            "step": np.full(number, batch.step),
            "part": np.full(number, batch.part),
            "version": np.full(number, batch.version),
            "sample": np.array(batch.samples),
            "prompt": np.array(prompts, dtype=object),
            "latents": self.sent(active),  # (B, active, C, h, w): what each active velocity is evaluated at
            "inputs": self.sent(inputs),  # (B, reward inputs, C, h, w)
            "weight": weights.cpu().numpy(),
            "loading_seconds": np.full(number, loading / number),
            "sampling_seconds": np.full(number, (time.perf_counter() - began) / number),
        }

    def sent(self, tensors: list[Tensor]) -> np.ndarray:
        """Tensors ``(B, …)`` as they travel, ``(B, number, …)``."""
        return narrow(torch.stack(tensors, 1).cpu().numpy(), self.config.train.wire_dtype)

    def noise(self, batch: MicroBatch, purpose: str) -> Tensor:
        """Standard normal latents ``(B, C, h, w)``, a function of seed, step, sample and purpose."""
        seeds = [seed_of(self.config.train.seed, batch.step, s, purpose) for s in batch.samples]
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return self.backbone.initial_latents(generators, self.config.sampling.height, self.config.sampling.width)

    def hold(self, version: int) -> None:
        """Have the weights of ``version`` in the model, in place and chunk by chunk; RuntimeError if what is in it then is not
        what was published, or not all of it."""
        if version == self.version:
            return
        self.version = -1
        values = sum(load_chunk(self.trained, chunk) for chunk in self.fetch(version))
        if values != (whole := sum(p.numel() for p in self.trained.values())):
            raise RuntimeError(f"policy version {version} has {values} values, but {whole} are trained")
        merge(self.backbone.transformer, self.plain)
        self.version = version
