"""The reward service: finished latents and prompts in; component scores, objective and its gradient at the latents out.

It holds the decoder and the reward models, so that nobody else needs them: trainers pull its gradient back
through velocities, samplers only sample. One request is one batch. A reward with a deployment of its own is asked over its
handle while others score. Whoever deploys this imports this module: model libraries are imported in a replica.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import numpy as np
import ray
import torch
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from flowbp_ray import rewards
from flowbp_ray.config import AlignConfig
from flowbp_ray.config.reward import Replicas, Reward, RewardComponent
from flowbp_ray.config.schema import Model
from flowbp_ray.pictures import to_uint8
from flowbp_ray.rewards.objective import Component, Graded, Part, graded_by, objective
from flowbp_ray.rollouts.asking import Request, answering
from flowbp_ray.rollouts.wire import narrow, widen

#: The namespace of actors that applications belong to.
OWNERS = "flowbp_ray"


class Scores(TypedDict):
    """The answer: float32, ``(B,)`` for each component and the objective, ``(B, C, h, w)`` for the gradient, which is of the
    dtype that the latents came in."""

    components: dict[str, np.ndarray]
    objective: np.ndarray
    gradient: np.ndarray


class Seen(TypedDict):
    """What `look` answers: ``components`` ``(B,)`` each, and uint8 ``pictures (B, height, width, 3)``."""

    components: dict[str, np.ndarray]
    pictures: np.ndarray


class RewardModel:
    """A replica of one reward."""

    def __init__(self, component: RewardComponent, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.component = Component(component.name, rewards.load(component).to(device), component.weight, component.clip)
        self.device = device

    @answering
    def grade(self, pictures: np.ndarray, prompts: list[str], weight: float) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores ``(B,)`` and, for a weight other than 0, the part's gradient at pictures ``(B, 3, H, W)`` in 0…1."""
        graded = replace(self.component, weight=weight).grade(tensor(pictures, self.device), prompts)
        return array(graded.scores), None if graded.gradient is None else array(graded.gradient)

    def check_health(self) -> None:
        """Serve replaces a replica whose device no longer computes."""
        torch.ones(1, device=self.device).sum().item()


class Sent:
    """The pictures that were sent last: all rewards with processes of their own read one copy."""

    def __init__(self) -> None:
        self.pictures: Tensor | None = None
        self.reference: ray.ObjectRef | None = None

    def __call__(self, pictures: Tensor) -> ray.ObjectRef:
        """Where they are in the object store."""
        if self.pictures is not pictures or self.reference is None:
            self.pictures, self.reference = pictures, ray.put(array(pictures))
        return self.reference


@dataclass
class ServedReward:
    """One reward in a deployment of its own."""

    name: str
    handle: DeploymentHandle
    weight: float
    clip: float | None
    sent: Sent

    def start(self, pictures: Tensor, prompts: list[str]) -> Callable[[], Graded]:
        """As of all parts."""
        what = f"the reward {self.name!r}"
        asked = Request(self.handle, "grade", self.sent(pictures), prompts, self.weight, what=what, prompts=prompts)

        def answer() -> Graded:
            scores, gradient = asked.result()
            here = pictures.device
            return Graded(tensor(scores, here), None if gradient is None else tensor(gradient, here))

        return answer


class Rewards:
    """A replica. All samples of a batch are independent, so batches of any size give the same answers."""

    def __init__(
        self,
        model: Model | None,
        reward: Reward,
        threads: int,
        device: str,
        served: dict[str, DeploymentHandle],
        owner: str | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self.device, self.vae, self.owner = device, None, owner
        if model is not None:
            from flowbp_ray.backbones import family_of
            from flowbp_ray.backbones.backbone import DTYPES

            self.family = family_of(model.source, model.revision)
            self.vae = self.family.vae_class.from_pretrained(
                model.source, subfolder="vae", revision=model.revision, torch_dtype=DTYPES[model.dtype], use_safetensors=True
            )
            self.vae.requires_grad_(False).eval().to(device)
            if reward.decoder == "checkpointed":
                self.vae.enable_gradient_checkpointing()
        sent = Sent()
        self.components: list[Component | ServedReward] = [
            ServedReward(c.name, served[c.name], c.weight, c.clip, sent)
            if c.name in served
            else Component(c.name, rewards.load(c).to(device), c.weight, c.clip)
            for c in reward.components
        ]
        self.described = description(model, reward)

    @answering
    def score(self, latents: np.ndarray, prompts: list[str], weights: dict[str, float] | None = None) -> Scores:
        """Decode ``latents (B, C, h, w)``, score, and differentiate the objective, with other ``weights`` where they are given.
        Latents are float32, or what `flowbp_ray.rollouts.wire.narrow` made of it.

        ValueError for a shape that the decoder does not take; DeadRewardError, naming the component and the prompts, where
        a score or the gradient is not finite.
        """
        if weights is None:
            weights = {c.name: c.weight for c in self.components}
        # An asker need not know of all that is served here: what it gives no weight is scored, and no part of its objective.
        parts: list[Part] = [replace(c, weight=weights.get(c.name, 0.0)) for c in self.components]
        answer = objective(self._checked(latents, prompts), prompts, self._decode, parts)
        return {
            "components": {name: array(values) for name, values in answer.components.items()},
            "objective": array(answer.objective),
            "gradient": narrow(array(answer.gradient), "bfloat16" if latents.dtype == np.uint16 else "float32"),
        }

    @answering
    def look(self, latents: np.ndarray, prompts: list[str]) -> Seen:
        """Decode ``latents (B, C, h, w)`` to pictures and score these, without gradient: for evaluation. Errors as `score`'s."""
        with torch.no_grad():
            pictures = self._decode(self._checked(latents, prompts))
        return {"components": self._scored(pictures, prompts), "pictures": to_uint8(pictures)}

    @answering
    def judge(self, pictures: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
        """Scores ``(B,)`` by component of uint8 ``pictures (B, H, W, 3)``."""
        if pictures.ndim != 4 or pictures.shape[3] != 3 or len(pictures) != len(prompts) or pictures.dtype != np.uint8:
            what = f"{pictures.dtype} {pictures.shape}"
            raise ValueError(f"pictures are {what}, but {len(prompts)} prompts need uint8 ({len(prompts)}, H, W, 3)")
        return self._scored(tensor(pictures, self.device).permute(0, 3, 1, 2) / 255, prompts)

    def describe(self) -> dict[str, Any]:
        """What is served, as `description` says it."""
        return self.described

    def check_health(self) -> None:
        """Serve replaces a replica whose device no longer computes. Without its owner the whole application ends."""
        torch.ones(1, device=self.device).sum().item()
        if self.owner is not None:
            try:
                ray.get_actor(self.owner, OWNERS)
            except ValueError:
                # Not from here, since it waits until this replica is done with all that it does.
                name = serve.get_replica_context().app_name
                threading.Thread(target=serve.delete, args=(name,), daemon=True).start()

    def _scored(self, pictures: Tensor, prompts: list[str]) -> dict[str, np.ndarray]:
        parts: list[Part] = [replace(c, weight=0.0) for c in self.components]
        return {name: array(graded.scores) for name, graded in graded_by(parts, pictures, prompts).items()}

    def _decode(self, latents: Tensor) -> Tensor:
        return self.family.decode_latents(self.vae, latents)

    def _checked(self, latents: np.ndarray, prompts: list[str]) -> Tensor:
        if self.vae is None:
            raise ValueError("this service has no model, so it scores pictures and no latents: give its configuration a model")
        channels = self.family.latent_channels(self.vae)
        if latents.ndim != 4 or latents.shape[:2] != (len(prompts), channels):
            raise ValueError(f"latents are {latents.shape}, but {len(prompts)} prompts need ({len(prompts)}, {channels}, h, w)")
        return tensor(widen(latents), self.device)


def tensor(values: np.ndarray, device: str | torch.device) -> Tensor:
    """Float32 on a device. Ray hands out read-only arrays that lie in its store, hence the copy."""
    return torch.from_numpy(values.astype(np.float32)).to(device)


def array(values: Tensor) -> np.ndarray:
    """Float32 in memory of its own, in one piece."""
    return np.ascontiguousarray(values.detach().float().cpu().numpy())


def description(model: Model | None, reward: Reward) -> dict[str, Any]:
    """What two services have to have in common to give the same scores: the model's decoder and each component's files."""
    return {
        "model": None if model is None else {"path": model.path, "revision": model.revision, "dtype": model.dtype},
        "decoder": reward.decoder,
        "components": {c.name: {"kind": c.kind, "path": c.path, "encoder": c.encoder, "clip": c.clip} for c in reward.components},
    }


def deployed(what: type, name: str, replicas: Replicas, at_once: int = 1) -> serve.Deployment:
    """A deployment of the class with so many replicas, each with so many requests ``at_once``, and what each reserves."""
    scaling: dict[str, Any] = {"num_replicas": replicas.replicas}
    if replicas.max_replicas is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas.replicas, max_replicas=replicas.max_replicas, target_ongoing_requests=at_once
            )
        }
    return serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        # Of batches one at a time: a second one in the same replica would only share its cores.
        max_ongoing_requests=at_once,
        # A scoring thread may hold the interpreter for long: only a device that is lost makes a replica unhealthy.
        health_check_timeout_s=120,
        graceful_shutdown_wait_loop_s=0.5,  # at a run's end nobody asks any more, and this is waited for
        **scaling,
    )(what)


def device(replicas: Replicas) -> Literal["cuda", "cpu"]:
    """Where a replica computes."""
    return "cuda" if replicas.gpus else "cpu"


def composed(
    model: Model | None, reward: Reward, replicas: Replicas, threads: int, owner: str | None = None
) -> serve.Application:
    """The application that decodes and composes, with the deployments that rewards have of their own. It ends by itself when
    there is no actor named ``owner`` in the namespace `OWNERS` any more; None goes on for ever."""
    served = {
        c.name: deployed(RewardModel, f"reward-{c.name}", c.deployment).bind(c, threads, device(c.deployment))
        for c in reward.components
        if c.deployment
    }
    return deployed(Rewards, "Rewards", replicas).bind(model, reward, threads, device(replicas), served, owner)


def here(config: AlignConfig) -> Rewards:
    """The service of an alignment in this process, with all of its rewards."""
    return Rewards(config.model, config.reward, config.cluster.threads, device(config.cluster.rewards), {})


def application(config: AlignConfig, owner: str | None = None) -> serve.Application:
    """The application of an alignment."""
    return composed(config.model, config.reward, config.cluster.rewards, config.cluster.threads, owner)
