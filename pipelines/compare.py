"""Align with several methods and seeds at equal budgets on one cluster, and put the results side by side.

    python -m pipelines.compare configs/shapes/*.yaml --seeds 3
    python -m pipelines.compare configs/shapes/sparse.yaml configs/shapes/refl.yaml train.steps=20 --seeds 1

Each configuration is a method, named as its file. They may differ in nothing but `surrogate`, and in the batch of a method
whose samples are scored more than once, with its micro-batches. So that a cell takes minutes, all have train.steps=30 and
evaluation.per_task=50, whatever their files say, unless the command gives others. Finished cells are not run again: the same
command goes on where it stopped.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np

from flowbp_ray.config import AlignConfig, ConfigError, dump, load
from flowbp_ray.surrogate.quadrature import Grid
from flowbp_ray.tracking.store import check_server
from pipelines import check_lasts, checking, ending, page_of, parsed
from pipelines.comparison import BASE, Measured, chart, evaluations, grid, read, table

#: Shorter than a recipe's own run, so that a cell takes minutes; overrides change them.
BUDGET = ("train.steps=30", "evaluation.per_task=50")
#: What belongs to a cell and not to its budget; micro-batches are memory and speed, not the result.
OWN = ("surrogate", "train.batch", "train.micro_batch")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "given", nargs="+", metavar="config | section.setting=value", help="YAML files, and what to change in all"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, with seeds from 0 (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of cells and results (default: compare/ beside the runs)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be run, and start nothing")
    args = parsed(parser)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least one is needed")
    if not args.files:
        parser.error("no configuration is named: give YAML files, such as configs/shapes/*.yaml")
    return args


def cell(file: Path, overrides: list[str], seed: int) -> AlignConfig:
    """The configuration of one method and seed; the evaluation's noise and prompts are the seed's too."""
    own = [f"train.seed={seed}", f"evaluation.seed={seed}", f"tracking.run_name={file.stem}-{seed}", "evaluation.before=false"]
    return load(file, [*BUDGET, *overrides, *own])


def check_budgets(configs: dict[str, AlignConfig]) -> None:
    """ConfigError where the methods would not be compared on equal terms."""
    from flowbp_ray.rollouts.plans import plan_of
    from flowbp_ray.tracking.run import flattened

    def scored(config: AlignConfig) -> int:
        return config.train.batch * len(plan_of(config, np.linspace(1, 0, config.sampling.steps + 1), 0).reward_inputs)

    (first, reference), *others = configs.items()
    if reference.watch.stop or reference.train.best:
        raise ConfigError(
            "watch.stop and train.best would end cells after different numbers of steps: set them to false and null"
        )
    for name, config in others:
        one, two = flattened(reference.model_dump(mode="json")), flattened(config.model_dump(mode="json"))
        for key in sorted(one.keys() | two.keys()):
            if one.get(key) != two.get(key) and not key.startswith((*OWN, "tracking.run_name")):
                raise ConfigError(
                    f"{first} and {name} are not on equal terms: {key} is {one.get(key)} and {two.get(key)}; "
                    f"give all the same, for example {key}={one.get(key)}"
                )
        if scored(reference) != scored(config):
            raise ConfigError(
                f"{first} and {name} are not on equal terms: a step scores {scored(reference)} and {scored(config)} samples; "
                f"change train.batch of one of them"
            )


def main() -> None:
    """Check, then run the cells that are not there, then the table."""
    args = arguments()
    names = [f.stem for f in args.files]
    with checking():
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ConfigError(f"two configurations are named {twice[0]}: a method is named as its file, so rename one")
        if BASE in names:
            raise ConfigError(f"{BASE}.yaml is named as the base model is: a method is named as its file, so rename it")
        planned = {(f.stem, s): cell(f, args.overrides, s) for s in range(args.seeds) for f in args.files}
        first = planned[names[0], 0]
        if not first.evaluation.checked:
            raise ConfigError(f"evaluation.prompts is {first.evaluation.prompts}: methods are compared on shapes alone")
        check_budgets({n: planned[n, 0] for n in names})
        folder = (args.output or first.output.parent / "compare").expanduser().absolute()
        check_lasts("--output", folder)
        check_server(first.tracking.uri)
    if args.dry_run:
        train, pictures = first.train, 6 * first.evaluation.per_task
        print(
            f"{len(planned)} cells ({', '.join(names)}; seeds 0 to {args.seeds - 1}) of {train.steps} steps, {train.batch} "
            f"samples a step and {pictures} pictures to evaluate, and the base's. Results: {folder}. Nothing was started."
        )
        return
    with ending(f"the same command goes on from the finished cells in {folder}"):
        compare(planned, folder, args.seeds)


def compare(planned: dict[tuple[str, int], AlignConfig], folder: Path, seeds: int) -> None:
    """Run what is missing in ``folder`` on one cluster, and write and log table, chart and pictures."""
    from flowbp_ray import backbones
    from flowbp_ray.rollouts.plans import grid_of
    from pipelines import quiet_libraries
    from pipelines.session import cluster

    quiet_libraries()

    first = next(iter(planned.values()))
    of_base = {(BASE, s): named(next(c for (_, seed), c in planned.items() if seed == s), f"{BASE}-{s}") for s in range(seeds)}
    order = {k: c for s in range(seeds) for k, c in {**of_base, **planned}.items() if k[1] == s}  # whole seeds first
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    done = {key: read(file_of(folder, key), budget_of(config)) for key, config in order.items()}
    missing = [key for key, measured in done.items() if measured is None]
    print(f"{len(order) - len(missing)} of {len(order)} cells are there, in {folder}")
    if missing:
        sigmas = grid_of(first, backbones.load(first.model.source, revision=first.model.revision))
        with cluster(first):
            for number, key in enumerate(missing, 1):
                print(f"\ncell {number} of {len(missing)}: {key[0]}, seed {key[1]}")
                done[key] = measured = run(order[key], *key, folder, sigmas)
                measured.save(file_of(folder, key), budget_of(order[key]))
    report(first, [m for m in done.values() if m is not None], folder, seeds)


def named(config: AlignConfig, name: str) -> AlignConfig:
    """The same under another name in MLflow."""
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"run_name": name})})


def run(config: AlignConfig, method: str, seed: int, folder: Path, sigmas: Grid) -> Measured:
    """One cell; of the first seed the pictures too."""
    from pipelines.alignment import align, judge_base
    from pipelines.runs import unfinished

    earlier = list(folder.glob(f"runs/{method}-{seed}-*"))
    place = unfinished(config, earlier) or folder / "runs" / f"{method}-{seed}-{len(earlier)}"
    seconds, sampled, differentiated = 0.0, 0.0, 0.0
    if method == BASE:
        scores = judge_base(config, place)
    else:
        outcome = align(config, place)
        scores, seconds = outcome.aligned, statistics.median(outcome.seconds["step"])
        sampled, differentiated = evaluations(config, sigmas)
        if outcome.pictures is not None and seed == 0:
            for name, pictures in zip((BASE, method), outcome.pictures, strict=True):
                np.save(folder / f"pictures_{name}.npy", pictures)
    values, errors = {k: s.value for k, s in scores.items()}, {k: s.error for k, s in scores.items()}
    return Measured(method, seed, values, errors, seconds, sampled, differentiated)


def report(config: AlignConfig, results: list[Measured], folder: Path, seeds: int) -> None:
    """Table, chart and sheet of pictures: printed, written and in an MLflow run."""
    from flowbp_ray.tracking.run import TrackedRun
    from flowbp_ray.tracking.store import tracking_uri
    from pipelines.alignment import previewed

    text, methods = table(results, note(config, seeds)), list(dict.fromkeys(m.method for m in results))
    (folder / "table.md").write_text(text, encoding="utf-8")
    chart(results, folder / "chart.png")
    written = [folder / "table.md", folder / "chart.png"]
    files = {n: folder / f"pictures_{n}.npy" for n in methods}
    if all(f.exists() for f in files.values()):
        shown = {n: np.load(f, allow_pickle=False) for n, f in files.items()}
        grid([p for p, _ in previewed(config)], shown).save(folder / "pictures.png")
        written.append(folder / "pictures.png")
    logged = config.model_dump(mode="json") | {"surrogate": {"method": "compared", "methods": methods}}
    with TrackedRun(tracking_uri(config.tracking.uri), config.tracking.experiment, "comparison", config=logged) as tracked:
        for measured in results:
            tracked.metrics({f"{measured.method}/{k}": v for k, v in measured.values.items()}, measured.seed)
        for path in written:
            tracked.artifact(path)
    info = tracked.info()
    print(f"\n{text}")
    print(*written, f"curves    {page_of(info)}", sep="\n")


def file_of(folder: Path, key: tuple[str, int]) -> Path:
    """Where a cell's figures are kept."""
    return folder / "cells" / f"{key[0]}-{key[1]}.json"


def budget_of(config: AlignConfig) -> str:
    """The configuration as far as it decides what a cell measures."""
    return dump(config.model_copy(update={"tracking": type(config.tracking)(), "output": Path("/")}))


def note(config: AlignConfig, seeds: int) -> str:
    """What the table's figures are of."""
    train, evaluation, sampling = config.train, config.evaluation, config.sampling
    return (
        f"{seeds} seeds, {train.steps} steps at learning rate {train.learning_rate:g}. Tasks: % right by the exact checker, "
        f"{evaluation.per_task} pictures each and seed; watermarked: % of all of these; rewards: their mean. The standard error "
        "is of a row's mean over seeds, after each seed's own level. Sampled and differentiated: velocity evaluations for a "
        f"scored sample, without and with gradient. Guidance {sampling.guidance_scale:g}, {sampling.steps} steps, "
        f"weights: {evaluation.weights}."
    )


if __name__ == "__main__":
    main()
