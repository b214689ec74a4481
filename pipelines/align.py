"""Align a text-to-image flow model to a reward, on this machine or on the cluster of RAY_ADDRESS.

    python -m pipelines.align configs/shapes/sparse.yaml
    python -m pipelines.align configs/shapes/sparse.yaml train.steps=20 sampling.guidance_scale=3
    python -m pipelines.align configs/flux1/sparse_adapter.yaml configs/placement/gpu80.yaml prompts.path=prompts.txt …
    ray job submit --working-dir . -- python -m pipelines.align configs/shapes/sparse.yaml

Further YAML files change the first one. Any setting can be given as section.setting=value; the last one wins.
"""

import argparse
import json
import secrets
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

from flowbp_ray.config import AlignConfig, ConfigError, dump, load, paths
from flowbp_ray.tracking.store import masked, tracking_uri
from flowbp_ray.training import EXPORT_FILE
from pipelines import files_and_overrides


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.align", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/shapes/sparse.yaml")
    parser.add_argument("changes", nargs="*", metavar="file | section.setting=value", help="what to change in it")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would be done, and start nothing")
    args = parser.parse_intermixed_args()
    args.more, args.overrides = files_and_overrides(args.changes)
    return args


def main() -> None:
    """Check the configuration, then run it."""
    args = arguments()
    try:
        config = load(args.config, args.overrides, args.more)
        config = pinned(config)
        plan = intended(config)
        if args.dry_run:
            print(plan)
            return
        from pipelines.alignment import align
        from pipelines.session import cluster, reason
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: nothing was started")

    folder = config.output / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.surrogate.method}-{secrets.token_hex(2)}"
    try:
        with cluster(config):
            signal.signal(signal.SIGTERM, interrupt)  # `ray job stop`; from now on, since ray.init takes it for itself
            outcome = align(config, folder)
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted: nothing runs any more; {latest_checkpoint(folder)}")
    except Exception as error:  # the boundary to the user: one sentence in place of pages of remote tracebacks
        if not folder.exists():
            sys.exit(f"\nstopped: {reason(error)}")
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(f"\nstopped: {reason(error)}\n{latest_checkpoint(folder)}; all of the error is in {folder / 'error.txt'}")
    print()
    print((outcome.folder / "table.md").read_text(encoding="utf-8"))
    for name, note in outcome.notes.items():
        print(f"{name:<9} {note}")
    loader = "pipe.load_lora_weights" if config.adapter else "DiffusionPipeline.from_pretrained"
    print(f"{outcome.exported.name:<9} {outcome.exported}   ({loader} takes it)")
    if (outcome.folder / "before_after.png").exists():
        print(f"pictures  {outcome.folder / 'before_after.png'}")
    command = outcome.info["command"].removeprefix(f"{Path.cwd()}/")
    print(f"curves    {outcome.info['page']}" + (f"   after: {command}" if command else ""))


def interrupt(signum: int, frame: FrameType | None) -> None:
    """End as by Ctrl-C."""
    raise KeyboardInterrupt


def latest_checkpoint(folder: Path) -> str:
    """Where a run's newest complete checkpoint is (Ray Train lists it when all of it is there), and what to do with it."""
    listed = folder / "checkpoint_manager_snapshot.json"
    try:
        latest = json.loads(listed.read_text())["latest_checkpoint_result"] if listed.exists() else None
        checkpoint = None if latest is None else folder / latest["checkpoint_dir_name"]
    except json.JSONDecodeError:
        # Ray rewrites the list in place and was stopped at that. The learner writes a checkpoint's state.json last.
        checkpoint = max((f.parent for f in folder.glob("checkpoint_*/state.json")), default=None)
    if checkpoint is None:
        return "there is no checkpoint of it yet"
    if not (checkpoint / EXPORT_FILE).exists():
        return f"the last checkpoint is {checkpoint}, with the transformer as diffusers loads it"
    return f"the last checkpoint is {checkpoint}: start from it with adapter.init_from={checkpoint}"


def intended(config: AlignConfig) -> str:
    """The resolved configuration, the first step's surrogate, and what would be sampled and reserved.

    ValueError or OSError for what would stop the run later: prompts, their embeddings, rewards and the adapter to start from are
    looked at.
    """
    import numpy as np

    from flowbp_ray.rollouts.plans import plan_of
    from flowbp_ray.rollouts.prompts import pictured, read_prompts

    if (config.adapter and config.adapter.init_from) or config.prompts.embeds:
        from pipelines import quiet_libraries

        quiet_libraries()  # first: some notices come with an import
        from flowbp_ray.rollouts import embeds  # both with diffusers, which takes seconds
        from flowbp_ray.training.adapter import check_start

        check_start(config)
        embeds.check(config)
    check_rewards(config)
    train, prompts = config.train, read_prompts(config.prompts)
    reserved = ", ".join(f"{number:g} {kind}s" for kind, number in config.reserved().items() if number)
    pictures = sum(map(len, pictured(config).values())) * (2 if config.evaluation.before else 1)
    return "\n".join(
        [
            masked(dump(config)),
            "The first step's surrogate, on a grid without shift:",
            plan_of(config, np.linspace(1, 0, config.sampling.steps + 1), 0).table(),
            "",
            f"{train.steps} steps of {train.batch} samples from {len(prompts)} prompts, {pictures} pictures to evaluate; "
            f"processes reserve {reserved}.",
            f"MLflow: {masked(tracking_uri(config.tracking.uri))}; files: {config.output}. Nothing was started.",
        ]
    )


def check_rewards(config: AlignConfig) -> None:
    """ValueError or OSError unless every reward's files are here or on the hub, and one's own can be imported."""
    for number, component in enumerate(config.reward.components):
        if component.kind == "function":
            from flowbp_ray.rewards.user import imported

            imported(component.source)
        for setting, source, file in component.files():
            check_model(f"reward.components.{number}.{setting}", source, file, None)


def pinned(config: AlignConfig) -> AlignConfig:
    """The configuration with the commit that its model's revision is now, so that all processes load, and the run's record
    has, the same one. OSError if there is no such model."""
    from huggingface_hub import snapshot_download

    source, revision = config.model.source, config.model.revision
    check_model("model.path", source, paths.MODEL_INDEX, revision)
    if Path(source).is_absolute():
        return config
    folder = snapshot_download(source, revision=revision, allow_patterns=[paths.MODEL_INDEX])  # named by its commit
    return config.model_copy(update={"model": config.model.model_copy(update={"revision": Path(folder).name})})


def check_model(setting: str, source: str, file: str, revision: str | None) -> None:
    """OSError unless the source is on this machine, or the Hugging Face hub (or its cache here) has the ``file`` of it.

    Nothing is downloaded: a reward's file may have gigabytes, and the machine that loads it may be another.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import DryRunError, HfHubHTTPError

    # A path on this machine has it, or the configuration would have been refused.
    if Path(source).is_absolute() or isinstance(try_to_load_from_cache(source, file, revision=revision), str):
        return
    nothing = f"{setting} is {source!r}: there is no such folder here, and the Hugging Face hub does not give"
    try:
        # Unlike a model's from_pretrained this does not go on trying for half a minute where there is no network.
        there = snapshot_download(source, revision=revision, allow_patterns=[file], etag_timeout=10, dry_run=True)
    except OSError as error:
        reason = error.__cause__ if isinstance(error, DryRunError) and error.__cause__ else error
        lines = [line for line in str(reason).splitlines() if line]
        # An HTTP error begins with its number, and says in the second line what it is about.
        raise OSError(f"{nothing} it ({' '.join(lines[: 2 if isinstance(reason, HfHubHTTPError) else 1])})") from error
    if not there:
        raise OSError(f"{nothing} its {file}: name a repository that has it")


if __name__ == "__main__":
    main()
