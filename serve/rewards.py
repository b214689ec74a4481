"""The reward service: finished latents and prompts in; component scores, objective and its gradient at the latents out.

It holds the decoder and the reward models, so that nobody else needs them: trainers pull its gradient back
through velocities, samplers only sample. One request is one batch. Whoever deploys it imports this module: model libraries
are imported in a replica.
"""

from typing import TypedDict

import numpy as np
import torch
from ray import serve
from torch import Tensor

from flowbp_ray import rewards
from flowbp_ray.config import AlignConfig
from flowbp_ray.pictures import to_uint8
from flowbp_ray.rewards.objective import Component, objective, scored


class Scores(TypedDict):
    """The answer: float32, ``(B,)`` for each component and the objective, ``(B, C, h, w)`` for the gradient."""

    components: dict[str, np.ndarray]
    objective: np.ndarray
    gradient: np.ndarray


class Seen(TypedDict):
    """What `look` answers: ``components`` ``(B,)`` each, and uint8 ``pictures (B, height, width, 3)``."""

    components: dict[str, np.ndarray]
    pictures: np.ndarray


class Rewards:
    """A replica. All samples of a batch are independent, so batches of any size give the same answers."""

    def __init__(self, config: AlignConfig) -> None:
        from flowbp_ray.backbones import family_of
        from flowbp_ray.backbones.backbone import DTYPES

        torch.set_num_threads(config.cluster.threads)
        device = "cuda" if config.cluster.reward_gpus else "cpu"
        self.family = family_of(config.model.source, config.model.revision)
        self.vae = self.family.vae_class.from_pretrained(
            config.model.source, subfolder="vae", revision=config.model.revision, torch_dtype=DTYPES[config.model.dtype]
        )
        self.vae.requires_grad_(False).eval().to(device)
        self.components = [Component(c.name, rewards.load(c).to(device), c.weight, c.clip) for c in config.reward.components]

    def score(self, latents: np.ndarray, prompts: list[str]) -> Scores:
        """Decode ``latents (B, C, h, w)``, score, and differentiate the objective.

        ValueError for a shape that the decoder does not take; DeadRewardError, naming the component and the prompts, where
        a score or the gradient is not finite.
        """
        answer = objective(self._checked(latents, prompts), prompts, self._decode, self.components)
        return {
            "components": {name: values.cpu().numpy() for name, values in answer.components.items()},
            "objective": answer.objective.cpu().numpy(),
            "gradient": answer.gradient.cpu().numpy(),
        }

    @torch.no_grad()
    def look(self, latents: np.ndarray, prompts: list[str]) -> Seen:
        """Decode ``latents (B, C, h, w)`` to pictures and score these, without gradient: for evaluation. Errors as `score`'s."""
        pictures = self._decode(self._checked(latents, prompts))
        scores = {c.name: scored(c, pictures, prompts).cpu().numpy() for c in self.components}
        return {"components": scores, "pictures": to_uint8(pictures)}

    def _decode(self, latents: Tensor) -> Tensor:
        return self.family.decode_latents(self.vae, latents)

    def _checked(self, latents: np.ndarray, prompts: list[str]) -> Tensor:
        channels = self.family.latent_channels(self.vae)
        if latents.ndim != 4 or latents.shape[:2] != (len(prompts), channels):
            raise ValueError(f"latents are {latents.shape}, but {len(prompts)} prompts need ({len(prompts)}, {channels}, h, w)")
        # Ray hands out read-only arrays that lie in its store.
        return torch.from_numpy(latents.astype(np.float32)).to(self.vae.device)


def application(config: AlignConfig) -> serve.Application:
    """The application of a configuration: its replicas and what each reserves."""
    cluster = config.cluster
    deployment = serve.deployment(
        num_replicas=cluster.reward_replicas,
        ray_actor_options={"num_cpus": cluster.reward_cpus, "num_gpus": cluster.reward_gpus},
        # One batch at a time: a second one in the same replica would only share its cores.
        max_ongoing_requests=1,
    )
    return deployment(Rewards).bind(config)
