"""Align a text-to-image flow model to a reward, on this machine or on the cluster of RAY_ADDRESS.

    python -m pipelines.align configs/shapes/sparse.yaml
    python -m pipelines.align configs/shapes/sparse.yaml train.steps=20 sampling.guidance_scale=3
    python -m pipelines.align configs/flux1/sparse_adapter.yaml configs/placement/gpu80.yaml prompts.path=prompts.txt …
    python -m pipelines.align configs/shapes/sparse.yaml --plan
    ray job submit --working-dir . -- python -m pipelines.align configs/shapes/sparse.yaml

Further YAML files change the first one. Any setting can be given as section.setting=value; the last one wins.

A run that was interrupted, or failed, goes on from its last checkpoint when the same command is given again; what does not change
what is learned, such as cluster.samplers or train.workers, may be other then. A finished run gets more steps with
--resume FOLDER train.steps=500, which takes the configuration of the folder where none is named.
"""

import argparse
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from flowbp_ray.config import AlignConfig, ConfigError, dump, load, paths
from flowbp_ray.config.models import check_models
from flowbp_ray.tracking.store import check_server, masked, tracking_uri
from pipelines import check_lasts, checking, interrupt, page_of, parsed, refuse, runs
from pipelines.waits import advice, waits


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line, or what else is ``given``."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.align", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "given",
        nargs="*",
        metavar="config | section.setting=value",
        help="a YAML file, such as configs/shapes/sparse.yaml, and what to change in it",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run of this folder, whatever its state")
    which.add_argument("--new", action="store_true", help="start a new run, though there is an unfinished one that could go on")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="check everything, print what would be done, and start nothing")
    only.add_argument(
        "--plan", action="store_true", help="profile each stage here, and say what a run would wait for and what processes suit"
    )
    args = parsed(parser, given)
    if args.resume and not args.files:
        args.files = [args.resume / runs.CONFIG]
    if not args.files:
        parser.error("name a configuration, such as configs/shapes/sparse.yaml")
    return args


def main() -> None:
    """Check the configuration, then run it."""
    args = arguments()
    with checking():
        config, plan, folder, asked = checked(args)
        if not args.plan:
            check_server(config.tracking.uri)
        if args.dry_run:
            print(plan)
            if (folder / runs.BEGAN).exists():
                print(f"It would go on with {folder}; {latest_checkpoint(config, folder)}")
            return
        if args.plan:
            plan_placement(config)
            return
        from pipelines.alignment import align
        from pipelines.causes import reason
        from pipelines.session import cluster

    if (folder / runs.BEGAN).exists():
        print(f"going on with the run in {folder} (--new starts another one)")
    again = "the same command goes on with it"

    def stop(signum: int, frame: FrameType | None) -> None:
        """End as by Ctrl-C. Whoever sent this may give it seconds only, so what matters is said first."""
        print(f"\nstopping; {latest_checkpoint(config, folder)}; {again}", flush=True)
        interrupt(signum, frame)

    try:
        with cluster(config):
            signal.signal(signal.SIGTERM, stop)
            runs.begin(config, folder, asked)
            outcome = align(config, folder)
    except KeyboardInterrupt:
        where = f"; {latest_checkpoint(config, folder)}; {again}" if (folder / runs.BEGAN).exists() else ""
        sys.exit(f"\ninterrupted: nothing runs any more{where}")
    except ConfigError as error:  # of what the cluster is, or runs
        refuse(error)
    except Exception as error:  # the boundary to the user: one sentence in place of pages of remote tracebacks
        if not folder.exists():
            sys.exit(f"\nstopped: {reason(error)}")
        (folder / "error.txt").write_text(masked(traceback.format_exc()), encoding="utf-8")
        where = f"all of the error is in {folder / 'error.txt'}"
        sys.exit(f"\nstopped: {reason(error)}\n{latest_checkpoint(config, folder)}; {again}; {where}")
    print()
    print((outcome.folder / "table.md").read_text(encoding="utf-8"))
    for name, note in outcome.notes.items():
        print(f"{name:<9} {note}")
    if "stopped" in outcome.notes:
        print(f"go on     python -m pipelines.align --resume {outcome.folder} watch.stop=false")
    if waited := waits(outcome.seconds):
        print(f"waited    {advice(config, waited)}")
    loader = "pipe.load_lora_weights" if config.adapter else "DiffusionPipeline.from_pretrained"
    print(f"{outcome.exported.name:<9} {outcome.exported}   ({loader} takes it)")
    if (outcome.folder / "before_after.png").exists():
        print(f"pictures  {outcome.folder / 'before_after.png'}")
    print(f"curves    {page_of(outcome.info)}")


def plan_placement(config: AlignConfig) -> None:
    """Print what `pipelines.placement` finds."""
    from pipelines import placement, quiet_libraries

    quiet_libraries()
    try:
        figures = placement.profile(config, lambda text: print(text, file=sys.stderr))
    except Exception as error:  # of models and libraries: the boundary to the user, as below
        sys.exit(f"stopped: {error}\n--plan has the models of all stages in one process, here: run it where they fit")
    print(placement.report(config, figures, placement.predicted(config, figures, placement.shared_cores(config))))


def checked(args: argparse.Namespace) -> tuple[AlignConfig, str, Path, str | None]:
    """The configuration, what would be done, the run's folder, and the model's revision as it was asked for.

    ConfigError, ValueError or OSError, in one sentence, for all that can be found wrong without loading a model.
    """
    config = load(args.files[0], args.overrides, args.files[1:])
    check_lasts("output", config.output)
    asked, folder = config.model.revision, chosen(config, args.resume, args.new)
    if folder is None:
        folder = runs.new_folder(config)
        config = pinned(config)
        _ = runs.Kept(config, folder).newest  # or what is wrong with train.storage would be found late
    else:
        config = runs.as_begun(config, folder)
        runs.check(config, folder)
    return config, intended(config), folder, asked


def chosen(config: AlignConfig, resume: Path | None, new: bool) -> Path | None:
    """The folder of the run to go on with; None starts a new one. ConfigError if the named one has none."""
    if resume is not None:
        folder = resume.expanduser().absolute()
        if not (folder / runs.BEGAN).exists():
            raise ConfigError(f"{folder} has no run that could go on: it has no {runs.BEGAN}")
        return folder
    return None if new else runs.unfinished(config, config.output.glob("*"))


def latest_checkpoint(config: AlignConfig, folder: Path) -> str:
    """Which checkpoint of a run is the newest that is whole. It is asked as a run ends, so no error of storage is raised."""
    try:
        newest = runs.Kept(config, folder).newest
    except OSError as error:
        return f"its last checkpoint cannot be named: {error}"
    return f"its last checkpoint, of {newest.steps} steps, is {newest.path}" if newest else "it has no checkpoint yet"


def intended(config: AlignConfig) -> str:
    """The resolved configuration, the first step's surrogate, and what would be sampled and reserved.

    ValueError or OSError for what would stop the run later: prompts, their embeddings, rewards and the adapter to start from are
    looked at.
    """
    import numpy as np

    from flowbp_ray.rollouts.plans import plan_of
    from flowbp_ray.rollouts.prompts import pictured, read_prompts

    check_models(config)
    if config.prompts.embeds:
        from pipelines import quiet_libraries

        quiet_libraries()  # first: some notices come with an import
        from flowbp_ray.rollouts import embeds  # with diffusers, which takes seconds

        embeds.check(config)
    check_rewards(config)
    train, prompts = config.train, read_prompts(config.prompts)
    needs = [
        f"{number:g} {what}" for number, what in zip(config.reserved().values(), ("logical CPUs", "GPUs"), strict=True) if number
    ]
    pictures = sum(map(len, pictured(config).values())) * (2 if config.evaluation.before else 1)
    return "\n".join(
        [
            masked(dump(config)),
            "The first step's surrogate, on a grid without shift:",
            plan_of(config, np.linspace(1, 0, config.sampling.steps + 1), 0).table(),
            "",
            f"{train.steps} steps of {train.batch} samples from {len(prompts):,} prompts ({len(set(prompts)):,} different ones); "
            f"{pictures:,} pictures to evaluate; processes reserve {' and '.join(needs)}.",
            f"MLflow: {masked(tracking_uri(config.tracking.uri))}; files: {config.output}. Nothing was started.",
        ]
    )


def check_rewards(config: AlignConfig) -> None:
    """ValueError or OSError unless the files of every reward and judge are here or on the hub, and one's own can be imported."""
    for number, component in enumerate(config.reward.components):
        if component.kind == "function":
            from flowbp_ray.rewards.user import imported

            imported(component.source)
        for setting, source, file in component.files():
            check_model(f"reward.components.{number}.{setting}", source, file, None)
    if geneval := config.evaluation.geneval:
        check_model("evaluation.geneval.detector", geneval.detector, paths.REWARD_INDEX, None)
        check_model("evaluation.geneval.clip", geneval.clip, paths.REWARD_INDEX, None)


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
        answered = isinstance(reason, HfHubHTTPError)
        # An HTTP error begins with its number, and says in the second line what it is about.
        why = " ".join(lines[: 2 if answered else 1])
        do = "if it is gated, accept its licence there and log in with `hf auth login`" if answered else "see to the network"
        raise OSError(f"{nothing} it ({why}): {do}, or download it elsewhere and give its folder") from error
    if not there:
        raise OSError(f"{nothing} its {file}: name a repository that has it")


if __name__ == "__main__":
    main()
