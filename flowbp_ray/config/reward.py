"""What pictures are scored by: each reward's kind and files, and its part in the objective."""

from bisect import bisect_right
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Strict,
    ValidationInfo,
    field_validator,
    model_validator,
)

from flowbp_ray.config import paths
from flowbp_ray.config.section import NAME, Section, Text

CLIP, BERT = "openai/clip-vit-large-patch14", "google-bert/bert-base-uncased"


class Files(NamedTuple):
    """What a kind of reward is read from."""

    weights: str
    """The file that a folder or repository of the model has."""
    encoder: str | None
    """The published tokenizer or CLIP beside it; None if the model's folder has its own."""
    encoder_index: str
    """The file that a folder or repository of that has."""


FILES = {
    "clip": Files(paths.REWARD_INDEX, None, paths.TOKENIZER_INDEX),
    "clip_score": Files(paths.REWARD_INDEX, None, paths.TOKENIZER_INDEX),
    "hpsv2": Files("HPS_v2.1_compressed.pt", CLIP, paths.TOKENIZER_INDEX),
    "image_reward": Files("ImageReward.pt", BERT, paths.TOKENIZER_INDEX),
    "aesthetic": Files("sac+logos+ava1-l14-linearMSE.pth", CLIP, paths.REWARD_INDEX),
}


Schedule = Annotated[
    tuple[Annotated[tuple[NonNegativeInt, NonNegativeFloat], Strict(False)], ...], Strict(False), Field(min_length=1)
]


class Replicas(Section):
    """Processes of a deployment on Ray Serve."""

    replicas: PositiveInt = 1
    """Number of processes, at least."""
    max_replicas: PositiveInt | None = None
    """Largest number of processes: more are started while requests wait, and stopped again; null keeps the number fixed."""
    cpus: NonNegativeFloat = 1.0
    """CPUs for each process."""
    gpus: NonNegativeFloat = 0.0
    """GPUs for each process; with fractions several share one."""

    @property
    def most(self) -> int:
        """How many there ever are."""
        return self.max_replicas or self.replicas

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, below replicas, {self.replicas}: raise it or set it to null")
        return self


class RewardComponent(Section):
    """One reward and its part in the objective J = Σ weight · min(reward, clip)."""

    name: Annotated[str, Field(pattern=NAME)]
    """The name of its metrics."""
    kind: Literal["clip", "clip_score", "hpsv2", "image_reward", "aesthetic", "function"] = "clip"
    """``clip`` is a CLIPModel's logit scale times its cosine, as in PickScore; ``clip_score`` is the cosine alone; ``function``
    is a function of yours. flowbp_ray/rewards/README.md has the formula of each."""
    path: Text
    """The model: a folder, a Hugging Face id, or the file where a published checkpoint is a single one; ``shapes/reward`` and
    ``shapes/judge`` mean the embedded models. For ``function`` it is package.module:name."""
    encoder: Text | None = None
    """Folder or Hugging Face id of the tokenizer, or for ``aesthetic`` of the CLIP; null takes the published one."""
    weight: NonNegativeFloat
    """Its factor in the objective; with 0 it is only monitored."""
    schedule: Schedule | None = None
    """Pairs of a step and a factor on the weight from then on, linear between them, as in [[0, 1], [100, 0.2]]; null keeps it."""
    clip: float | None = None
    """Upper bound of the score in the objective, so that nothing more is gained above it; null sets none."""
    deployment: Replicas | None = None
    """Processes of its own, which score while other rewards do; null scores in the processes that decode pictures."""

    @field_validator("schedule")
    @classmethod
    def _forward(cls, schedule: Schedule | None) -> Schedule | None:
        steps = [step for step, _ in schedule or ()]
        if steps != sorted(set(steps)):
            raise ValueError(f"its steps are {steps}: let each be later than the one before")
        return schedule

    @field_validator("path")
    @classmethod
    def _path(cls, path: str, found: ValidationInfo) -> str:
        match found.data.get("kind"):  # without one, that alone is said
            case "clip" | "clip_score":
                return paths.model(path, paths.REWARD_MODELS, paths.REWARD_INDEX)
            case "function":
                return paths.import_path(path)
            case str(kind):
                return paths.file(path, FILES[kind].weights)
        return path

    @field_validator("encoder")
    @classmethod
    def _encoder(cls, encoder: str | None, found: ValidationInfo) -> str | None:
        kind, path = found.data.get("kind"), found.data.get("path")
        if kind == "function" and encoder is not None:
            raise ValueError("a function has none: set it to null")
        if kind not in FILES or not path:
            return encoder
        files = FILES[kind]
        if encoder is not None:
            return paths.model(encoder, {}, files.encoder_index)
        if files.encoder is None:
            paths.model(path, paths.REWARD_MODELS, files.encoder_index)
        return None

    def weight_at(self, step: int) -> float:
        """The weight in a training step."""
        if not self.schedule:
            return self.weight
        steps = [s for s, _ in self.schedule]
        after = bisect_right(steps, step)
        (s0, f0), (s1, f1) = self.schedule[max(after - 1, 0)], self.schedule[min(after, len(steps) - 1)]
        return self.weight * (f0 if s1 == s0 or step < s0 else f0 + (f1 - f0) * (step - s0) / (s1 - s0))

    @property
    def source(self) -> str:
        """A folder, a file, a Hugging Face id or an import path."""
        return str(paths.REWARD_MODELS.get(self.path, self.path))

    @property
    def encoder_source(self) -> str:
        """Folder or Hugging Face id of what goes with the model: see ``encoder``."""
        return self.encoder or FILES[self.kind].encoder or self.source

    def files(self) -> list[tuple[str, str, str]]:
        """What has to be there before it is loaded: the setting, its folder, file or Hugging Face id, and the file of that."""
        if self.kind == "function":
            return []
        files = FILES[self.kind]
        return [("path", self.source, files.weights), ("encoder", self.encoder_source, files.encoder_index)]


class Reward(Section):
    """What the pictures are scored by."""

    components: Annotated[tuple[RewardComponent, ...], Strict(False)]
    """The list of rewards, each with name, path and weight."""
    application: Text | None = None
    """Name of a Ray Serve application of serve.rewards that runs on the cluster and has these components; null starts one for
    the run."""
    decoder: Literal["plain", "checkpointed"] = "plain"
    """How the gradient goes through the decoder: ``checkpointed`` computes the decoder again in the backward pass, which takes
    less memory."""

    @field_validator("components")
    @classmethod
    def _objective(cls, components: tuple[RewardComponent, ...]) -> tuple[RewardComponent, ...]:
        if not components:
            raise ValueError("the list is empty: give it a component, with name, path and weight")
        names = [c.name for c in components]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"{twice[0]!r} is the name of two components: give each its own")
        if not any(c.weight for c in components):
            raise ValueError("no component has a weight above 0, so there is nothing to train for: give one a weight")
        return components
