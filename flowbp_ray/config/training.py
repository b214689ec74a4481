"""What is trained and how, on what machines, and how it is evaluated and tracked."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict, field_validator, model_validator

from flowbp_ray.config import paths
from flowbp_ray.config.evaluators import GenEval, UnifiedReward
from flowbp_ray.config.reward import Replicas
from flowbp_ray.config.section import Decay, Section, Text
from flowbp_ray.rollouts.wire import WireDtype
from flowbp_ray.tracking.store import tracking_uri

Betas = Annotated[tuple[Decay, Decay], Strict(False)]  # YAML has lists and no tuples


class Adapter(Section):
    """The LoRA adapter that is trained."""

    rank: PositiveInt = 16
    """Inner width of each pair of matrices."""
    alpha: PositiveInt = 16
    """The adapter's output is scaled by alpha / rank."""
    targets: Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)] | None = None
    """Endings of the names of adapted modules; null leaves the choice to the backbone, or to ``init_from``."""
    init_from: paths.ExistingFolder | None = None
    """The folder of an exported adapter to start from; null starts from the base model."""
    export_strength: PositiveFloat = 1.0
    """Factor on the adapter's scale at export: less than 1 stays nearer to the base model."""


class Train(Section):
    """The updates: AdamW at a constant learning rate."""

    steps: PositiveInt = 300
    """Updates, policy versions after the first."""
    batch: PositiveInt = 32
    """Samples a step, over all workers."""
    micro_batch: PositiveInt = 16
    """Samples that a worker differentiates at once: memory and speed, not the result."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again in the backward: less memory, a third more time."""
    workers: PositiveInt = 1
    """Train workers that share a batch."""
    sharded: bool = False
    """Each worker holds a part of the model (FSDP2) and of what belongs to it; if false each holds all of it, and an adapter's
    gradients are added up once an update. Training all weights needs true."""
    unsharded_gradients: bool = False
    """With sharded: add up gradients once an update and not after every active step, for a whole model's gradients of memory
    in each worker."""
    learning_rate: PositiveFloat = 1e-4
    """AdamW's."""
    betas: Betas = (0.9, 0.999)
    """AdamW's two decays, each in [0, 1)."""
    eps: PositiveFloat = 1e-8
    """AdamW's."""
    weight_decay: NonNegativeFloat = 1e-4
    """AdamW's, per unit of learning rate."""
    max_grad_norm: PositiveFloat = 1.0
    """A longer gradient is cut to this norm."""
    max_sample_grad_norm: PositiveFloat | None = None
    """A sample's objective gradient at its reward input that is longer is cut to this norm, so that no sample decides a step
    alone; null cuts none."""
    max_skipped: NonNegativeInt = 3
    """A step without a finite gradient makes no update, is warned of and kept for a look; more than so many in a row end the
    run."""
    ema: Decay = 0.995
    """Decay per step of the averaged weights; 0 makes them the raw ones."""
    policy_lag: Literal[0, 1] = 0
    """How many versions behind the policy that samples is, exactly: 1 overlaps sampling with training."""
    wire_dtype: WireDtype = "float32"
    """What latents and the rewards' gradients are on their way in: bfloat16 halves their bytes and rounds them."""
    velocity_penalty: NonNegativeFloat = 0.0
    """Factor on the mean squared distance to the base model's velocity, averaged over the active steps; with an adapter only."""
    seed: NonNegativeInt = 0
    """Of every random draw in training, the choice of prompts among them."""
    checkpoint_every: PositiveInt = 50
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: PositiveInt | None = None
    """How many stay on the disk, the newest or, with ``best``, the best, and beside them always the last one; null keeps all."""
    storage: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://.+")] | None = None
    """Where checkpoints are kept, such as s3://bucket/folder: any URI that Ray Train takes; null keeps them in ``output``."""
    retries: NonNegativeInt = 3
    """How often training goes on by itself, from its last checkpoint, when a process or machine of it is lost; a new checkpoint
    starts the count anew."""
    best: Text | None = None
    """The metric by which the best checkpoint is exported, such as reward/judge: its mean over the steps since the checkpoint
    before. null exports the last checkpoint."""


class Watch(Section):
    """When a run that goes wrong is warned of: flowbp_ray/training/watch.py has the rules."""

    window: Annotated[int, Field(ge=3)] = 10
    """Steps over which metrics are averaged."""
    held_out_errors: PositiveFloat | None = 5.0
    """Warn when a reward of weight 0 falls by so many standard errors while the objective rises; null does not watch it."""
    grad_norm_factor: PositiveFloat | None = 10.0
    """Warn when gradients stay so many times as long as they were; null does not watch it."""
    diversity_fraction: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    """Warn when the previews' seeds are less than this part as far apart as at the start; null does not watch it."""
    stop: bool = False
    """End the training at the first warning, with a checkpoint that is evaluated and exported as usual."""


class Cluster(Section):
    """Processes and what each reserves; fractions of a CPU or GPU are allowed."""

    samplers: PositiveInt = 1
    """Processes that sample."""
    max_samplers: PositiveInt | None = None
    """Up to so many are started while there is room and work for them, and stopped again; null keeps the number. With
    train.policy_lag 0 the number is fixed."""
    sampler_cpus: NonNegativeFloat = 1.0
    """CPUs for each sampler."""
    sampler_gpus: NonNegativeFloat = 0.0
    """GPUs for each sampler."""
    trainer_cpus: NonNegativeFloat = 1.0
    """CPUs for each train worker."""
    trainer_gpus: NonNegativeFloat = 0.0
    """GPUs for each train worker."""
    reward_replicas: PositiveInt = 1
    """Processes that decode and score."""
    reward_cpus: NonNegativeFloat = 1.0
    """CPUs for each reward replica."""
    reward_gpus: NonNegativeFloat = 0.0
    """GPUs for each reward replica."""
    reward_max_replicas: PositiveInt | None = None
    """Up to so many are started while requests wait; null keeps the number."""
    threads: PositiveInt = 1
    """torch's threads in each of these processes."""
    compile: bool = False
    """Have torch.compile make kernels of the transformer's blocks in samplers and train workers: minutes when a run starts, less
    time in each step, results that differ as roundings do. It takes a C++ compiler."""
    attention: str | None = None
    """One of diffusers' attention backends by its name (such as _native_flash) in samplers and train workers, for FLUX.1 and
    FLUX.2, and for Z-Image one that takes a mask; null leaves the choice to torch."""

    @property
    def rewards(self) -> Replicas:
        """The reward replicas."""
        return Replicas(
            replicas=self.reward_replicas,
            max_replicas=self.reward_max_replicas,
            cpus=self.reward_cpus,
            gpus=self.reward_gpus,
        )

    @model_validator(mode="after")
    def _replicas(self) -> Self:
        if self.max_samplers is not None and self.max_samplers < self.samplers:
            raise ValueError(f"max_samplers is {self.max_samplers}, below samplers, {self.samplers}: raise it or set it to null")
        if self.reward_max_replicas is not None and self.reward_max_replicas < self.reward_replicas:
            raise ValueError(
                f"reward_max_replicas is {self.reward_max_replicas}, below reward_replicas, {self.reward_replicas}: raise it or "
                "set it to null"
            )
        return self


class Evaluation(Section):
    """How base and aligned model are compared: same prompts, seeds, guidance and steps."""

    prompts: paths.PromptsPath = "shapes"
    """A file as in prompts.path, whose pictures the rewards judge, and what else is asked for below; ``shapes`` means the
    embedded world's six tasks of evaluation prompts, which its exact checker judges too."""
    per_task: PositiveInt = 300
    """Pictures for each of the six tasks, or of a file's prompts, in turn."""
    per_prompt: PositiveInt | None = None
    """Pictures of each of a file's prompts (GenEval's own is 4), however many; null takes per_task pictures."""
    geneval: GenEval | None = None
    """Judge by GenEval: ``{}`` for its published models; needs ``prompts`` in its format."""
    unified_reward: UnifiedReward | None = None
    """Judge by UnifiedReward, which a server of yours runs."""
    judge_cpus: NonNegativeFloat = 0.01
    """CPUs for each process that judges: GenEval's models need whole ones, or a GPU."""
    judge_gpus: NonNegativeFloat = 0.0
    """GPUs for each process that judges."""
    batch: PositiveInt = 50
    """Pictures sampled at once."""
    seed: NonNegativeInt = 0
    """Of the noise that pictures start from."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights are evaluated and exported; sampling in training is always raw."""
    before: bool = True
    """Evaluate the base model too, for the comparison."""
    preview_prompts: NonNegativeInt = 8
    """Prompts pictured at the start, along the way and at the end; 0 is none."""
    preview_seeds: PositiveInt = 2
    """Pictures for each of these prompts, of which one is shown; how far they are apart is logged as diversity. 1 has none."""
    preview_every: PositiveInt = 25
    """Steps between previews along the way."""

    @property
    def checked(self) -> bool:
        """Whether the embedded world's exact checker judges."""
        return self.prompts == paths.TRAINING_PROMPTS


class Tracking(Section):
    """Where MLflow puts the run."""

    experiment: Text = "flowbp_ray"
    """The MLflow experiment, made if it is new."""
    run_name: Text | None = None
    """The MLflow run's name; null lets MLflow choose."""
    registered_model: Annotated[str, Field(pattern=r"^[^/:@]+$")] | None = None
    """The model in MLflow's registry of which each run's export is a version; null takes the base's name and "-aligned"."""
    uri: Text | None = None
    """MLflow's tracking URI; null takes MLFLOW_TRACKING_URI, else a database under ~/.flowbp_ray."""

    @field_validator("uri")
    @classmethod
    def _everywhere(cls, uri: str | None) -> str | None:
        return tracking_uri(uri) if uri else None
