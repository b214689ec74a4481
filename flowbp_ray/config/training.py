"""What is trained and how, on what machines, and how it is evaluated and tracked."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict, field_validator, model_validator

from flowbp_ray.config import paths
from flowbp_ray.config.evaluators import GenEval, UnifiedReward
from flowbp_ray.config.reward import Replicas
from flowbp_ray.config.section import REGISTERED, URI, Decay, Section, Text
from flowbp_ray.rollouts.wire import WireDtype
from flowbp_ray.tracking.store import tracking_uri

Betas = Annotated[tuple[Decay, Decay], Strict(False)]  # YAML has lists and no tuples


class Adapter(Section):
    """The LoRA adapter that is trained."""

    rank: PositiveInt = 16
    """Inner width of each pair of matrices: the rank of what they add to a weight."""
    alpha: PositiveInt = 16
    """The adapter's output is scaled by alpha / rank."""
    targets: Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)] | None = None
    """Endings of the names of the modules that are adapted; null leaves the choice to the backbone, or to ``init_from``."""
    init_from: paths.ExistingFolder | None = None
    """The folder of an exported adapter, or of a checkpoint, to start from; null starts from the base model."""
    export_strength: PositiveFloat = 1.0
    """Factor on the adapter's scale at export: values below 1 stay nearer to the base model."""


class Train(Section):
    """The updates: AdamW at a constant learning rate."""

    steps: PositiveInt = 300
    """Number of updates, each of which makes the next version of the policy."""
    batch: PositiveInt = 32
    """Samples in a step, over all workers."""
    micro_batch: PositiveInt = 16
    """Samples that a worker differentiates at once: memory and speed, not the result."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again in the backward pass: less memory, a third more time."""
    workers: PositiveInt = 1
    """Number of train workers, which share a batch."""
    sharded: bool = False
    """Let each worker hold only a part of the model (FSDP2), and of all that belongs to it. With false each worker holds all of
    it, and an adapter's gradients are added up once an update. Training all weights needs true."""
    unsharded_gradients: bool = False
    """With ``train.sharded``: add up the workers' gradients once an update instead of after every active step. Each worker then
    needs memory for the gradients of the whole model."""
    learning_rate: PositiveFloat = 1e-4
    """AdamW's learning rate."""
    betas: Betas = (0.9, 0.999)
    """AdamW's two decay rates, each at least 0 and below 1."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 1e-4
    """AdamW's weight decay, per unit of learning rate."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest norm of an update's gradient: a longer one is scaled down to it."""
    max_sample_grad_norm: PositiveFloat | None = None
    """Largest norm of the gradient of one sample's objective at its reward input: a longer one is scaled down to it, so that no
    sample decides a step alone; null limits none."""
    max_skipped: NonNegativeInt = 3
    """How many steps in a row may have no finite gradient before the run ends. Such a step makes no update and is
    warned of; the first in a row is kept in the run's folder."""
    ema: Decay = 0.995
    """Decay per step of the averaged weights; with 0 they equal the raw ones."""
    policy_lag: Literal[0, 1] = 0
    """By how many versions, exactly, the policy that samples is behind the one that is trained: 1 overlaps sampling with
    training."""
    wire_dtype: WireDtype = "float32"
    """Number format in which latents and the rewards' gradients go from process to process: bfloat16 halves their bytes and
    rounds them."""
    velocity_penalty: NonNegativeFloat = 0.0
    """How strongly updates are held near the base model: this times the mean squared difference of both models' velocities at the
    active steps is added to the loss. It has to be 0 if ``adapter`` is null."""
    seed: NonNegativeInt = 0
    """Seed of every random draw in training, the choice of prompts among them."""
    checkpoint_every: PositiveInt = 50
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: PositiveInt | None = None
    """How many checkpoints stay on the disk: the newest or, with ``train.best``, the best ones, and always the last one beside
    them; null keeps all."""
    storage: Annotated[str, Field(pattern=URI)] | None = None
    """Where checkpoints are kept: any place that Ray Train takes; null keeps them in ``output``."""
    retries: NonNegativeInt = 3
    """How often training goes on by itself, from its last checkpoint, when one of its processes or machines is lost; each new
    checkpoint starts the count anew."""
    best: Text | None = None
    """The metric that decides which checkpoint is exported, such as reward/judge: the one with the highest mean over the steps
    since the checkpoint before it. null exports the last checkpoint."""


class Watch(Section):
    """When to warn of a run that goes wrong: flowbp_ray/training/watch.py has the rules."""

    window: Annotated[int, Field(ge=3)] = 10
    """Number of steps over which metrics are averaged."""
    held_out_errors: PositiveFloat | None = 5.0
    """Warn when a reward of weight 0 falls by more than this many standard errors while the objective rises; null never does."""
    grad_norm_factor: PositiveFloat | None = 10.0
    """Warn when the gradient's norm stays above this many times its usual value at the start; null never does."""
    diversity_fraction: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    """Warn when previews of the same prompt from different seeds are less than this fraction as far apart as at the start; null
    never does."""
    stop: bool = False
    """End the training at the first warning, with a checkpoint that is evaluated and exported as usual."""


class Cluster(Section):
    """The processes of a run, and what each reserves; fractions of a CPU or GPU are allowed."""

    samplers: PositiveInt = 1
    """Number of processes that sample pictures."""
    max_samplers: PositiveInt | None = None
    """Largest number of samplers: more are started while there is room and work for them, and stopped again; null keeps the
    number fixed, as it has to be with ``train.policy_lag`` 0."""
    sampler_cpus: NonNegativeFloat = 1.0
    """CPUs for each sampler."""
    sampler_gpus: NonNegativeFloat = 0.0
    """GPUs for each sampler."""
    trainer_cpus: NonNegativeFloat = 1.0
    """CPUs for each train worker."""
    trainer_gpus: NonNegativeFloat = 0.0
    """GPUs for each train worker."""
    reward_replicas: PositiveInt = 1
    """Number of processes that decode and score pictures."""
    reward_cpus: NonNegativeFloat = 1.0
    """CPUs for each reward replica."""
    reward_gpus: NonNegativeFloat = 0.0
    """GPUs for each reward replica."""
    reward_max_replicas: PositiveInt | None = None
    """Largest number of reward replicas: more are started while requests wait; null keeps the number fixed."""
    threads: PositiveInt = 1
    """Number of torch's threads in each of these processes."""
    compile: bool = False
    """Compile the transformer's blocks by torch.compile in samplers and train workers: a run takes minutes longer to start, each
    step takes less time, and results differ by roundings. It needs a C++ compiler."""
    attention: str | None = None
    """Attention backend of diffusers, such as _native_flash, for samplers and train workers. FLUX.1 and FLUX.2 take any, Z-Image
    one that takes a mask, Stable Diffusion none. null leaves the choice to torch."""

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
    """How base and aligned model are compared: with the same prompts, seeds, guidance and steps."""

    prompts: paths.PromptsPath = "shapes"
    """A file of prompts like that of ``prompts.path``: their pictures are judged by the rewards, and by the judges below that are
    set. ``shapes`` means the embedded world's evaluation prompts of six tasks, which its exact checker judges too."""
    per_task: PositiveInt = 300
    """Number of pictures for each of the six tasks, or of a file that has no tasks; its prompts are taken in turn."""
    per_prompt: PositiveInt | None = None
    """Number of pictures for each prompt of a file, however many prompts it has (GenEval takes 4); null takes
    ``evaluation.per_task`` pictures."""
    geneval: GenEval | None = None
    """Judge by GenEval: ``{}`` takes its published models. ``evaluation.prompts`` has to be in its format."""
    unified_reward: UnifiedReward | None = None
    """Judge by UnifiedReward, which runs on a server of yours."""
    judge_cpus: NonNegativeFloat = 0.01
    """CPUs for each process that judges: GenEval's models need whole CPUs, or a GPU."""
    judge_gpus: NonNegativeFloat = 0.0
    """GPUs for each process that judges."""
    batch: PositiveInt = 50
    """Number of pictures that are sampled at once."""
    seed: NonNegativeInt = 0
    """Seed of the noise that pictures start from."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights are evaluated and exported, averaged or raw ones; in training the raw ones sample."""
    before: bool = True
    """Evaluate the base model too, for the comparison."""
    preview_prompts: NonNegativeInt = 8
    """Number of prompts whose pictures are logged at the start, along the way and at the end; 0 logs none."""
    preview_seeds: PositiveInt = 2
    """Number of pictures for each of these prompts. One of them is shown; how far they are apart is logged as diversity, unless
    it is only one."""
    preview_every: PositiveInt = 25
    """Steps between these previews."""

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
    registered_model: Annotated[str, Field(pattern=REGISTERED)] | None = None
    """Name of the model in MLflow's registry that each run's export becomes a version of; null takes the base model's name and
    "-aligned"."""
    uri: Text | None = None
    """MLflow's tracking URI; null takes MLFLOW_TRACKING_URI, else a database under ~/.flowbp_ray."""

    @field_validator("uri")
    @classmethod
    def _everywhere(cls, uri: str | None) -> str | None:
        return tracking_uri(uri) if uri else None
