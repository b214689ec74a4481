"""The whole configuration, `AlignConfig`, and its first sections; the other sections are in the files beside this one.

A setting without a default says what a run is and has to be given.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from flowbp_ray.config import paths
from flowbp_ray.config.reward import Reward
from flowbp_ray.config.section import Section, Text
from flowbp_ray.config.surrogates import AnySurrogate
from flowbp_ray.config.training import Adapter, Cluster, Evaluation, Tracking, Train, Watch
from flowbp_ray.shapes.world import SIZE

Pixels = Annotated[int, Field(gt=0, multiple_of=8)]  # the embedded default's: latents 4 times coarser, in patches of 2


class Model(Section):
    """The text-to-image flow model to align."""

    path: paths.ModelPath
    """A folder or Hugging Face id in diffusers' format; ``shapes`` means the embedded default."""
    revision: Text | None = None
    """Branch, tag or commit of a Hugging Face id; null takes its main branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format that the model computes in; latents, sigmas and sums are float32 with either."""

    @property
    def source(self) -> str:
        """What ``from_pretrained`` takes."""
        return str(paths.MODELS.get(self.path, self.path))


class Prompts(Section):
    """What pictures are asked for in training."""

    path: paths.PromptsPath
    """A text file with one prompt a line, a .jsonl file with "prompt" in every line, or a .json file with a list of either;
    ``shapes`` means the embedded world's training prompts."""
    embeds: paths.ExistingFolder | None = None
    """A folder that ``python -m pipelines.encode_prompts`` filled, so that no process loads text encoders; null encodes prompts
    when they are needed."""

    @property
    def file(self) -> Path | None:
        """The file, or None for the embedded world's prompts."""
        return None if self.path == paths.TRAINING_PROMPTS else Path(self.path)


class Sampling(Section):
    """How pictures are sampled, in training and in evaluation."""

    steps: PositiveInt = 12
    """Steps of the sampler, T: the number of velocity evaluations for a picture."""
    guidance_scale: NonNegativeFloat = 3.0
    """Weight of classifier-free guidance; at 1 and below there is none."""
    batched_branches: bool = True
    """Evaluate guidance's two branches in one batch; false evaluates one after the other, for half the memory."""
    grid: Literal["training", "stock"] = "training"
    """Noise levels: ``training`` takes linspace(1, 1/steps), shifted once, as when the models were aligned; ``stock`` takes those
    of the stock pipeline."""
    height: Pixels = 64
    """Height of a picture, in pixels; published models make multiples of 16."""
    width: Pixels = 64
    """Width of a picture, in pixels; published models make multiples of 16."""


class AlignConfig(Section):
    """One alignment: model, prompts, surrogate and reward say what is done, all else how."""

    model: Model
    prompts: Prompts
    sampling: Sampling = Sampling()
    surrogate: AnySurrogate
    reward: Reward
    adapter: Adapter | None = Adapter()
    """The LoRA adapter that is trained; null trains all weights of the transformer."""
    train: Train = Train()
    watch: Watch = Watch()
    cluster: Cluster = Cluster()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    output: paths.Folder = Path("~/.flowbp_ray/runs")
    """The folder in which each run gets a folder of its own, with checkpoints (unless ``train.storage`` is set), the exported
    adapter or model, pictures, scores and metrics."""

    def reserved(self) -> dict[str, float]:
        """CPUs and GPUs that all processes reserve together, train workers or judges, whichever are more, as one comes after the
        other; one more CPU is for what only waits or passes on."""
        c, workers, judges = self.cluster, self.train.workers, self.cluster.rewards.most
        rewards = [] if self.reward.application else [c.rewards, *(r.deployment for r in self.reward.components if r.deployment)]
        return {
            "CPU": c.samplers * c.sampler_cpus
            + sum(r.replicas * r.cpus for r in rewards)
            + max(workers * c.trainer_cpus + 1, judges * self.evaluation.judge_cpus),
            "GPU": c.samplers * c.sampler_gpus
            + sum(r.replicas * r.gpus for r in rewards)
            + max(workers * c.trainer_gpus, judges * self.evaluation.judge_gpus),
        }

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        train, guidance = self.train, self.sampling.guidance_scale
        wrong = self.surrogate.contradictions(self.sampling.steps)
        share = train.micro_batch * train.workers
        if train.batch % share:
            wrong.append(
                f"train.batch is {train.batch}, no multiple of train.micro_batch × train.workers = {train.micro_batch} × "
                f"{train.workers} = {share}: every worker takes whole micro-batches, so change one of the three"
            )
        if self.surrogate.compensate_guidance and guidance <= 1:
            wrong.append(
                f"surrogate.compensate_guidance is true but at sampling.guidance_scale {guidance} there is no guidance to "
                "compensate: set it to false or raise the scale above 1"
            )
        if self.model.revision and not paths.HUB_ID.fullmatch(self.model.path):
            wrong.append(
                f"model.revision is {self.model.revision!r} but model.path is {self.model.path}, which is on this machine: "
                "only a Hugging Face id has revisions, so remove one"
            )
        if train.workers > 1 and 0 < self.cluster.trainer_gpus <= 0.5:
            wrong.append(
                f"cluster.trainer_gpus is {self.cluster.trainer_gpus:g} and train.workers {train.workers}: Ray fills one GPU "
                "before it takes the next, so two of them would be on one, which NCCL refuses; give each more than half of one, "
                "or use one worker"
            )
        if self.cluster.trainer_cpus == self.cluster.trainer_gpus == 0:
            wrong.append("cluster.trainer_cpus and cluster.trainer_gpus are 0: Ray Train's workers have to reserve some of one")
        if self.cluster.max_samplers is not None and train.policy_lag == 0:
            wrong.append(
                f"cluster.max_samplers is {self.cluster.max_samplers}, but train.policy_lag is 0: no sampler has work while one "
                "step is learned from, so the pool is fixed; set it to null, or train.policy_lag to 1"
            )
        if self.adapter is None and not train.sharded:
            wrong.append("adapter is null, so all weights are trained, and train.sharded is false: set train.sharded to true")
        if self.adapter is None and train.velocity_penalty:
            wrong.append(
                f"train.velocity_penalty is {train.velocity_penalty:g}, but adapter is null: when all weights are trained, there "
                "is no base model beside them to stay near, so set it to 0"
            )
        if train.unsharded_gradients and not train.sharded:
            wrong.append("train.unsharded_gradients is true, but train.sharded is false: nothing is sharded, so set it to false")
        scores = ["objective", *(f"reward/{c.name}" for c in self.reward.components)]
        if train.best is not None and train.best not in scores:
            close = get_close_matches(train.best, scores, n=1)
            wrong.append(
                f"train.best is {train.best!r}, which is no metric that checkpoints have: "
                + (f"did you mean {close[0]}?" if close else f"set it to one of {', '.join(scores)}, or to null")
            )
        if self.adapter and self.adapter.targets and self.adapter.init_from:
            wrong.append(
                "adapter.targets is given together with adapter.init_from, but an adapter that is started from has its targets: "
                "set adapter.targets to null"
            )
        if self.evaluation.checked and (self.sampling.height, self.sampling.width) != (SIZE, SIZE):
            wrong.append(
                f"sampling.height × sampling.width is {self.sampling.height} × {self.sampling.width}: the evaluation's checker "
                f"reads {SIZE}×{SIZE} pictures only, so set both to {SIZE}, or evaluation.prompts to a file"
            )
        if self.evaluation.checked and (self.evaluation.geneval or self.evaluation.per_prompt):
            wrong.append(
                "evaluation.geneval and evaluation.per_prompt are for a file's prompts, and evaluation.prompts is 'shapes': set "
                "it to a file, for geneval to one in its format"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self
