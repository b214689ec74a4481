"""Let a registered model's version stand against the champion, and move the alias if it wins by more than its standard error.

    python -m pipelines.promote models:/shapes-aligned/3
    python -m pipelines.promote models:/shapes-aligned/3 evaluation.per_task=100 --metric reward/judge
    python -m pipelines.promote models:/FLUX.1-dev-aligned/3 evaluation.prompts=prompts.txt --alias production

Both are judged on the same prompts and noise, by the version's own configuration and what is changed in it here; where there is
no champion yet, the base model is what has to be beaten. Pictures and scores are kept, so a champion is judged once. Exit code 0:
the alias is the version's; 1: it stays where it was, or something failed; 2: something given is wrong.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from flowbp_ray.config import AlignConfig, ConfigError, load
from flowbp_ray.rollouts.prompts import pictured
from flowbp_ray.tracking.store import check_server, tracking_uri
from pipelines import checking, ending, evaluate, parsed
from pipelines.align import check_rewards, pinned

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from pipelines.report import Result


class Side(NamedTuple):
    """One of the two: its name, and its adapter's folder; None is the base model."""

    name: str
    adapter: Path | None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.promote", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", metavar="models:/NAME/VERSION", help="the candidate")
    parser.add_argument("given", nargs="*", metavar="file | section.setting=value", help="what to change in its configuration")
    parser.add_argument("--alias", default="champion", help="which alias is at stake (default: %(default)s)")
    parser.add_argument(
        "--metric",
        help="what decides, by its name in the table (default: mean, the exact checker's, else the one reward of weight 0)",
    )
    return parsed(parser)


def main() -> None:
    """Judge both, then decide."""
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        with checking():
            config, candidate, champion, sides = contest(args, Path(scratch))
            metric = args.metric or deciding(config)
            check_metric(config, metric)
            check_rewards(config)
            check_server(config.tracking.uri)
            folders = [evaluate.prepared(config, side.adapter, side.name, None) for side in sides]
            from pipelines.session import cluster, unused
        with ending("no alias was moved, and the same command goes on", folders[1] / "error.txt"):
            with cluster(unused(config, "trainer")):
                pictures = sum(map(len, pictured(config).values()))
                theirs, ours = (
                    evaluate.evaluated(config, side.adapter, folder, pictures)
                    for side, folder in zip(sides, folders, strict=True)
                )
            won = decide(config, args.alias, candidate, champion, theirs, ours, metric)
    sys.exit(0 if won else 1)


def contest(
    args: argparse.Namespace, scratch: Path
) -> tuple[AlignConfig, "ModelVersion", "ModelVersion | None", tuple[Side, Side]]:
    """The configuration that both are judged by, the candidate's version and the champion's if there is one, and both sides, the
    candidate second. ConfigError if they cannot be compared."""
    from mlflow import MlflowClient

    from flowbp_ray.tracking import registry

    if not args.version.startswith("models:/"):
        raise ConfigError(f"{args.version!r} is no version of a registered model: write models:/NAME/VERSION")
    uri = evaluate.store_of(args)
    found = registry.find(uri, args.version)
    candidate = found.version
    assert candidate is not None
    file, adapter = found.fetch(folder_in(scratch, "candidate"))
    # The run's own may be another place by now, or have no password.
    config = pinned(load(file, [*args.overrides, f"tracking.uri={uri}"], args.files))
    ours = Side(f"version {candidate.version}", adapter)
    aliases = MlflowClient(uri).get_registered_model(candidate.name).aliases
    if args.alias not in aliases:
        return config, candidate, None, (Side("base", None), ours)
    champion = f"models:/{candidate.name}/{aliases[args.alias]}"
    if str(aliases[args.alias]) == str(candidate.version):
        raise ConfigError(f"{champion} is the {args.alias} already")
    theirs = registry.find(uri, champion)
    file, adapter = theirs.fetch(folder_in(scratch, "champion"))
    its = yaml.safe_load(file.read_text("utf-8"))["model"]  # all else of it may be gone by now, such as its prompts
    base, ours_of = ((m["path"], m["revision"]) for m in (its, config.model.model_dump()))
    if base != ours_of:
        said = [path if revision is None else f"{path} at {revision}" for path, revision in (base, ours_of)]
        raise ConfigError(f"the {args.alias}, {champion}, is an adapter of {said[0]}, and {args.version} of {said[1]}")
    assert theirs.version is not None
    return config, candidate, theirs.version, (Side(f"version {theirs.version.version}", adapter), ours)


def folder_in(scratch: Path, name: str) -> Path:
    """A new folder."""
    (scratch / name).mkdir()
    return scratch / name


def deciding(config: AlignConfig) -> str:
    """What decides: never what was trained for. ConfigError if it has to be named."""
    if config.evaluation.checked or config.evaluation.geneval:
        return "mean"
    watched = [c.name for c in config.reward.components if c.weight == 0]
    if len(watched) != 1:
        raise ConfigError(f"name what decides with --metric, such as reward/NAME: {len(watched)} rewards have weight 0")
    return f"reward/{watched[0]}"


def check_metric(config: AlignConfig, metric: str) -> None:
    """ConfigError for what is known to decide nothing, before anything is judged."""
    if metric == "watermarked":
        raise ConfigError("of 'watermarked' less is better, so more of it wins nothing: let another score decide")
    rewards = [f"reward/{c.name}" for c in config.reward.components]
    if metric.startswith("reward/") and metric not in rewards:
        raise ConfigError(f"there is no {metric!r} among the scores: --metric takes {', '.join(rewards)} and the tasks")


def decide(
    config: AlignConfig,
    alias: str,
    candidate: "ModelVersion",
    champion: "ModelVersion | None",
    theirs: "Result",
    ours: "Result",
    metric: str,
) -> bool:
    """Print the table, move the alias if it is won, and note on the version what became of it; whether it was won."""
    from mlflow import MlflowClient

    from flowbp_ray.rollouts.evaluation import differences
    from flowbp_ray.tracking.registry import PROMOTION
    from pipelines.report import table

    gained = differences(theirs.pictures, ours.pictures)
    if metric not in gained:
        raise ConfigError(f"there is no {metric!r} among the scores: --metric takes {', '.join(gained)}")
    if gained[metric].value > 0 and not gained[metric].error:
        raise ConfigError(f"{metric} has no error to compare a gain with: judge more pictures, or prompts that are not all alike")
    won = gained[metric].value > gained[metric].error
    against = f"version {champion.version}" if champion else "the base model"
    by = f"{metric} {gained[metric].value:+.4g} ± {gained[metric].error:.2g} over {against}"
    verdict = f"{'won' if won else 'not won'}: {by}"
    client = MlflowClient(tracking_uri(config.tracking.uri))
    now = client.get_registered_model(candidate.name).aliases.get(alias)
    if str(now) != str(champion.version if champion else None):
        raise ConfigError(f"the {alias} became version {now} meanwhile, which nobody stood against here: give the command again")
    client.set_model_version_tag(candidate.name, candidate.version, PROMOTION, verdict)
    if won:
        client.set_registered_model_alias(candidate.name, alias, candidate.version)
    print(f"\n{table([ours, theirs])}\n{verdict}")
    holder = candidate.version if won else champion.version if champion else "no version"
    print(f"{alias:<9} of {candidate.name} {'is now' if won else 'stays'} {holder}")
    return won


if __name__ == "__main__":
    main()
