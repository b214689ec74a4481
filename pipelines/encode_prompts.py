"""Encode all prompts of a recipe once, into a folder of embeddings that align then reads in place of loading text encoders.

    python -m pipelines.encode_prompts my.yaml --output embeds
    python -m pipelines.align my.yaml prompts.embeds=embeds
    python -m pipelines.encode_prompts configs/flux1/sparse_adapter.yaml configs/placement/gpu80.yaml --output embeds …

On this machine or on the cluster of RAY_ADDRESS, by cluster.samplers processes. What is in the folder is not encoded again: the
same command goes on where it stopped, and adds the prompts of another recipe for the same model.
"""

import argparse
import shlex
from pathlib import Path

from flowbp_ray.config import AlignConfig, load, paths
from flowbp_ray.config.models import check_model
from flowbp_ray.tracking.store import masked
from pipelines import check_lasts, checking, ending, parsed


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.encode_prompts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "given",
        nargs="+",
        metavar="config | section.setting=value",
        help="YAML files, as for align, and what to change in them; the model and all prompts are taken",
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder, which all machines of a cluster have to share")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what is to be encoded, and start nothing")
    args = parsed(parser)
    if not args.files:
        parser.error("name a configuration, such as configs/shapes/sparse.yaml")
    return args


def main() -> None:
    """Check, encode what is missing, and say what to do with it."""
    args = arguments()
    with checking():
        # The folder may be in the recipe already, before it is there.
        config = load(args.files[0], [*args.overrides, "prompts.embeds=null"], args.files[1:])
        check_model(config, None)
        folder = paths.folder_to_be(paths.absolute(args.output))
        check_lasts("--output", folder)
        from pipelines import quiet_libraries

        quiet_libraries()
        from pipelines.align import pinned

        config = pinned(config)
        if args.dry_run:
            print(intended(config, folder))
            return
        from flowbp_ray.rollouts import embeds
        from pipelines.session import cluster, unused

        prompts = embeds.wanted(config)
        missing = embeds.start(config, folder).missing(prompts)
    if missing:
        with ending(f"the same command goes on from what is in {folder}"), cluster(unused(config, "trainer", "reward", "judge")):
            encode(config, folder, missing)
    size = sum(f.stat().st_size for f in folder.glob("*.parquet")) / 2**20
    print(f"encoded {len(missing):,} prompts, {len(prompts) - len(missing):,} were there; {folder} has {size:,.1f} MiB")
    given = shlex.join([*map(str, args.files), *args.overrides, f"prompts.embeds={folder}"])
    print(f"next     python -m pipelines.align {masked(given)}")


def intended(config: AlignConfig, folder: Path) -> str:
    """What would be encoded, and where to. ValueError if the folder is another encoder's."""
    from flowbp_ray.rollouts import embeds

    missing = prompts = embeds.wanted(config)
    if (folder / embeds.ENCODER_FILE).exists():
        begun = embeds.Embeds(folder)
        begun.check(embeds.whole_encoder_of(config))
        missing = begun.missing(prompts)
    return (
        f"{len(prompts):,} different prompts, the empty one among them; {len(prompts) - len(missing):,} of them are in {folder}, "
        f"{len(missing):,} are to be encoded by {config.cluster.samplers} processes. Nothing was started."
    )


def encode(config: AlignConfig, folder: Path, prompts: list[str]) -> None:
    """Encode these on the connected cluster. RuntimeError if they cannot be seen from here afterwards."""
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy

    from flowbp_ray.rollouts.embeds import Embeds
    from flowbp_ray.rollouts.encoding import ENCODED_AT_ONCE, Encoder
    from pipelines.session import progress, quiet_streams

    quiet_streams()
    cluster = config.cluster
    texts = [p for p in prompts if p]
    batches = [texts[start : start + ENCODED_AT_ONCE] for start in range(0, len(texts), ENCODED_AT_ONCE)]
    if "" in prompts:
        batches.append([""])
    encoded = ray.data.from_arrow([pa.table({"prompt": batch}) for batch in batches]).map_batches(
        Encoder,
        fn_constructor_args=(config, folder),
        compute=ActorPoolStrategy(size=cluster.samplers),
        num_cpus=cluster.sampler_cpus,
        num_gpus=cluster.sampler_gpus,
        batch_size=None,
        batch_format="numpy",
    )
    with progress(len(prompts), "encode", "prompt") as bar:
        for block in encoded.iter_batches(batch_size=None, batch_format="numpy"):
            bar.update(len(block["prompt"]))
    if lost := Embeds(folder).missing(prompts):
        raise RuntimeError(
            f"{len(lost):,} prompts were encoded, but their files are not in {folder}: set --output to a folder that all "
            "machines of the cluster share"
        )


if __name__ == "__main__":
    main()
