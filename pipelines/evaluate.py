r"""Sample a prompt file and judge the pictures: a base model, an adapter, an MLflow run or a registered model.

    python -m pipelines.evaluate configs/shapes/sparse.yaml
    python -m pipelines.evaluate configs/shapes/sparse.yaml --adapter ~/.flowbp_ray/runs/…/adapter
    python -m pipelines.evaluate --adapter RUN_ID evaluation.per_task=100
    python -m pipelines.evaluate --adapter models:/NAME@champion --beside ~/.flowbp_ray/evaluations/base-1a2b3c4d5e6f
    python -m pipelines.evaluate configs/sd35/sparse_adapter.yaml configs/placement/gpu24.yaml prompts.path=prompts.txt \
        evaluation.prompts=evaluation_metadata.jsonl evaluation.geneval={} evaluation.per_prompt=4

The configuration says the model, how pictures are sampled, and what judges them: its rewards, whatever their weights, and
evaluation.geneval and evaluation.unified_reward. An MLflow run has its configuration, so none has to be named. Pictures and
scores are kept in a folder; the same command goes on where it stopped. There are a table, an HTML report and an MLflow run at the
end.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbp_ray.config import AlignConfig, ConfigError, dump, load, settings
from flowbp_ray.config.models import check_model
from flowbp_ray.config.reward import RewardComponent
from flowbp_ray.config.schema import Model
from flowbp_ray.files import digest, replace_text
from flowbp_ray.rollouts.prompts import pictured
from flowbp_ray.tracking.store import check_server, masked, tracking_uri
from flowbp_ray.training import EXPORT_FILE
from pipelines import check_lasts, checking, ending, page_of, parsed
from pipelines.align import check_rewards, pinned

if TYPE_CHECKING:
    from pipelines.report import Result

#: Of the evaluation's settings, what makes pictures and scores what they are; of files the contents count, not their places.
PROTOCOL = ("per_task", "per_prompt", "seed")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("given", nargs="*", metavar="config | section.setting=value", help="YAML files, and what to change")
    parser.add_argument(
        "--adapter", metavar="WHAT", help="an adapter's folder, an MLflow run's id, or models:/NAME/VERSION or models:/NAME@ALIAS"
    )
    parser.add_argument("--beside", type=Path, nargs="+", default=[], metavar="FOLDER", help="earlier results to compare with")
    parser.add_argument("--output", type=Path, help="the folder (default: evaluations/ beside the runs, named by what is judged)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would be done, and start nothing")
    return parsed(parser)


def main() -> None:
    """Check everything, then sample, judge and report."""
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        with checking():
            config, adapter, name = chosen(args, Path(scratch))
            config = pinned(config)
            check_rewards(config)
            from pipelines.report import read

            beside = [read(f) for f in args.beside]
            pictures = sum(map(len, pictured(config).values()))
            folder = prepared(config, adapter, name, args.output, make=not args.dry_run)
            check_server(config.tracking.uri)
            if args.dry_run:
                print(masked(dump(config)))
                print(json.dumps(protocol_of(config), indent=1))
                print(f"{pictures} pictures to {folder}. Nothing was started.")
                return
            from pipelines.session import cluster, unused
        with ending(f"the same command goes on with what is in {folder}", folder / "error.txt"):
            with cluster(unused(config, "trainer")):
                result = evaluated(config, adapter, folder, pictures)
            finish(config, folder, [result, *beside])


def chosen(args: argparse.Namespace, scratch: Path) -> tuple[AlignConfig, Path | None, str]:
    """The configuration, the folder of the adapter or whole model if it is not the base, and a name for both.

    ConfigError if it cannot be had.
    """
    if args.adapter is None:
        if not args.files:
            raise ConfigError("name a configuration, such as configs/shapes/sparse.yaml, or an MLflow run with --adapter RUN_ID")
        return load(args.files[0], args.overrides, args.files[1:]), None, "base"
    folder = Path(args.adapter).expanduser().absolute()
    if folder.is_dir():
        if not (folder / EXPORT_FILE).is_file():
            raise ConfigError(f"--adapter {folder} has no {EXPORT_FILE}: name the folder adapter/ of a run, or one like it")
        if not args.files:
            raise ConfigError("an adapter's folder does not say how it is judged: name a configuration beside it")
        return load(args.files[0], args.overrides, args.files[1:]), folder, "adapter"
    return tracked(args, scratch)


def tracked(args: argparse.Namespace, scratch: Path) -> tuple[AlignConfig, Path, str]:
    """What an MLflow run or a registered model has."""
    from flowbp_ray.tracking import registry

    uri = store_of(args)
    found = registry.find(uri, args.adapter)
    config, adapter = found.fetch(scratch)
    return load(config, [*args.overrides, f"tracking.uri={uri}"], args.files), adapter, found.run_id[:8]


def store_of(args: argparse.Namespace) -> str:
    """The tracking URI of a command line, before there is the configuration of what it names."""
    match settings(args.files, args.overrides):
        case {"tracking": {"uri": str(uri)}}:
            return tracking_uri(uri)
    return tracking_uri(None)


def prepared(config: AlignConfig, adapter: Path | None, name: str, output: Path | None, *, make: bool = True) -> Path:
    """The folder of an evaluation of a pinned configuration, made if ``make``: ``output``, else
    one of ``evaluations`` beside the runs, by what is judged and how. ConfigError where it has pictures of something else;
    ValueError where ``prompts.embeds`` do not have all prompts."""
    check_model(config, adapter if adapter and (adapter / EXPORT_FILE).exists() else None)
    protocol = protocol_of(config)
    identity = {
        "model": config.model.model_dump(mode="json"),
        "base": base_of(config.model),
        "adapter": adapter and weights_of(adapter),
        "batch": config.evaluation.batch,  # what is kept together
    }
    key = hashlib.sha256(json.dumps([protocol, identity], sort_keys=True).encode()).hexdigest()[:12]
    folder = (output or config.output.parent / "evaluations" / f"{name.replace(' ', '-')}-{key}").expanduser().absolute()
    check_lasts("--output", folder)
    check_folder(folder, protocol, identity)
    if config.prompts.embeds:
        from pipelines import quiet_libraries

        quiet_libraries()  # first: some notices come with an import
        from flowbp_ray.rollouts import embeds  # with diffusers, which takes seconds

        there, asked = embeds.opened(config), [row["prompt"] for rows in pictured(config).values() for row in rows]
        if there and (missing := there.missing([*asked, ""])):
            raise ValueError(there.lacking(missing))
    if make:
        begin(folder, name, protocol, identity, config)
    return folder


def protocol_of(config: AlignConfig) -> dict[str, Any]:
    """All that two results have to have in common to be comparable, beside the model that is judged."""
    from importlib.metadata import version

    evaluation, geneval, unified = config.evaluation, config.evaluation.geneval, config.evaluation.unified_reward
    texts = json.dumps(list(pictured(config).items()), sort_keys=True).encode()
    return {
        "sampling": config.sampling.model_dump(mode="json"),
        "dtype": config.model.dtype,
        **evaluation.model_dump(mode="json", include=set(PROTOCOL)),
        "prompts": "sha256 " + hashlib.sha256(texts).hexdigest()[:16],
        "rewards": {c.name: {"kind": c.kind} | judge_of(c) for c in config.reward.components},
        "shapes_checker": evaluation.checked,
        "unified_reward": unified and unified.model_dump(mode="json", exclude={"url", "key_variable"}),
        "geneval": geneval and {"detector": version_of(geneval.detector), "clip": version_of(geneval.clip)},
        "versions": {package: version(package) for package in ("flowbp_ray", "torch", "diffusers", "transformers")},
    }


def judge_of(component: RewardComponent) -> dict[str, str]:
    """Which function, of which module's text, or which weights a reward is."""
    if component.kind == "function":
        module = find_spec(component.path.partition(":")[0])
        text = {"sha256": digest(Path(module.origin))[:16]} if module and module.has_location and module.origin else {}
        return {"path": component.path} | text
    return {setting: version_of(source) for setting, source, _ in component.files()}


def version_of(source: str) -> str:
    """Which weights a judge has: the SHA-256 of a file, or of all in a folder, or a Hugging Face id's commit."""
    from huggingface_hub import snapshot_download

    path = Path(source)
    if not path.is_absolute():
        return f"commit {Path(snapshot_download(source, allow_patterns=['*.md'])).name}"  # the folder is named by it
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".json"))
    return "sha256 " + hashlib.sha256("".join(digest(f) for f in files).encode()).hexdigest()[:16]


def base_of(model: Model) -> dict[str, str] | None:
    """Which weights a base model's folder has, part by part; a Hugging Face id's commit is its revision."""
    folder = Path(model.source)
    if not folder.is_absolute():
        return None
    if (size := sum(file.stat().st_size for file in folder.glob("*/*"))) > 2**30:
        print(f"reading {size / 1e9:.0f} GB in {folder}, to know which weights these are", file=sys.stderr)
    return {part.name: version_of(str(part)) for part in sorted(folder.iterdir()) if part.is_dir()}


def weights_of(folder: Path) -> str:
    """Which weights an adapter's folder has, or a whole pipeline's."""
    return digest(folder / EXPORT_FILE) if (folder / EXPORT_FILE).exists() else version_of(str(folder / "transformer"))


def check_folder(folder: Path, protocol: dict[str, Any], identity: dict[str, Any]) -> None:
    """ConfigError where a folder has pictures of something else."""
    known = folder / "protocol.json"
    if folder.exists() and not known.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and no evaluation: name another folder")
    if known.exists():
        there = json.loads(known.read_text("utf-8"))
        for key, ours in {**protocol, **identity}.items():
            if (theirs := {**there["protocol"], **there["identity"]}.get(key)) != ours:
                raise ConfigError(f"{folder} has an evaluation with {key} {theirs}, not {ours}: name another folder")


def begin(folder: Path, name: str, protocol: dict[str, Any], identity: dict[str, Any], config: AlignConfig) -> None:
    """Make the folder, with what it is for."""
    for part in ("pictures", "scores"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"name": name, "protocol": protocol, "identity": identity}, indent=1)
    replace_text(folder / "protocol.json", text + "\n")
    replace_text(folder / "config.yaml", masked(dump(config)))


def evaluated(config: AlignConfig, adapter: Path | None, folder: Path, number: int) -> "Result":
    """All pictures, sampled and judged on the connected cluster."""
    from flowbp_ray.rollouts.evaluation import evaluate
    from pipelines.report import write
    from pipelines.rewarding import rewarding, wait_for
    from pipelines.runs import alone
    from pipelines.session import progress, quiet_streams

    quiet_streams()
    exported = (adapter / EXPORT_FILE).read_bytes() if adapter and (adapter / EXPORT_FILE).exists() else adapter
    with alone(folder), rewarding(config, folder) as rewards:
        wait_for(config, rewards)
        with progress(number, "evaluate", "picture") as bar:
            pictures = evaluate(config, rewards, exported, bar.update, folder)
    return write(folder, pictures)


def finish(config: AlignConfig, folder: Path, results: "list[Result]") -> None:
    """Table, report and MLflow run."""
    from flowbp_ray.tracking.run import TrackedRun
    from pipelines.report import html, table

    text = table(results)
    replace_text(folder / "table.md", text)
    replace_text(folder / "report.html", html(results, folder))
    named = config.tracking.run_name or f"evaluate {results[0].name}"
    tracking, rows = config.tracking, [row["prompt"] for some in pictured(config).values() for row in some]
    with TrackedRun(tracking_uri(tracking.uri), tracking.experiment, named, config=config.model_dump(mode="json")) as run:
        run.prompts(config.evaluation.prompts, rows, "evaluation")
        run.metrics({f"eval/{k}": s.value for k, s in results[0].scores.items()}, 0)
        run.metrics({f"eval/{k}_error": s.error for k, s in results[0].scores.items()}, 0)
        for file in ("table.md", "report.html", "protocol.json", "result.json"):
            run.artifact(folder / file, "evaluation")
    info = run.info()
    print(f"\n{text}\nreport    {folder / 'report.html'}\npictures  {folder / 'pictures'}")
    print(f"MLflow    {page_of(info)}")


if __name__ == "__main__":
    main()
