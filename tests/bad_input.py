"""Bad input in hundreds of ways, each a command line of align; as a program it has them all validated in its one process."""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import yaml

from flowbp_ray import shapes
from flowbp_ray.config import ConfigError, load
from flowbp_ray.config.models import METADATA
from flowbp_ray.training import EXPORT_FILE
from pipelines import align, runs

SPARSE = Path(__file__).parents[1] / "configs" / "shapes" / "sparse.yaml"
#: Known to be no section: anything else can stand for them.
LISTS = ("reward.components", "adapter.targets", "train.betas")


def leaves(node, name=""):
    items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    if not items:
        return [name]
    return [leaf for key, value in items for leaf in leaves(value, f"{name}.{key}" if name else str(key))]


def settings() -> Iterator[list[str]]:
    """Every setting with something that it cannot be, and every name with a letter less."""
    names = leaves(load(SPARSE, []).model_dump(mode="json"))
    for name in names:
        yield [f"{name}={{no: such, thing: here}}"]
        yield [f"{name}=[[[1]]]"]
        section, _, last = name.rpartition(".")
        if section and not last.isdecimal():
            yield [f"{section}.{last[:-1]}_={3}"]
    for number in ("train.steps", "train.batch", "train.learning_rate", "sampling.steps", "evaluation.per_task", "adapter.rank"):
        yield from ([f"{number}={value}"] for value in ("0", "-1", ".nan", "many", "'3'", "true", "", "1e999"))
    yield from (
        override.split()
        for override in (
            "train.batch=7",
            "train.workers=5",
            "adapter=null",
            "sampling.steps=2",
            "sampling.width=72",
            "cluster.max_samplers=1",
            "train.policy_lag=0 cluster.max_samplers=4",
            "train.storage=bucket/runs",
            "train.storage=nothing://bucket/runs",
            "train.best=reward/jugde",
            "model.revision=main",
            "cluster.attention=_native_flash",
            "adapter.targets=[nothing]",
            "train.workers=2 cluster.trainer_gpus=0.5",
            "reward.components.0.weight=0",
            "reward.components.5.weight=1",
            "nonsense",
            "=3",
            "train.=3",
            "output=s3://bucket",
            "tracking.uri=mlruns",
        )
    )


def models(folder: Path) -> Iterator[list[str]]:
    """The embedded model with a file missing, cut short, or other."""
    files = [f.relative_to(shapes.BASE) for f in sorted(shapes.BASE.rglob("*")) if f.is_file()]
    weights = [f for f in files if f.suffix == ".safetensors"]
    configs = [f for f in files if f.name == "config.json"]
    number = 0

    def other(file: Path, content: bytes | None, beside: str | None = None) -> list[str]:
        nonlocal number
        number += 1
        copy = folder / f"model{number}"
        for each in files:
            (copy / each).parent.mkdir(parents=True, exist_ok=True)
            if each != file:
                (copy / each).symlink_to(shapes.BASE / each)
        if content is not None:
            (copy / file).write_bytes(content)
        if beside:
            (copy / file).with_name(beside).write_bytes(b"\x80\x04N.")
        return [f"model.path={copy}"]

    for file in [Path("model_index.json"), *configs, *weights]:
        whole = (shapes.BASE / file).read_bytes()
        yield other(file, None)
        yield from (other(file, whole[:length]) for length in (0, 5, len(whole) // 2, len(whole) - 3))
        yield other(file, b"\xff" + whole[1:])
    for file in weights:
        whole = (shapes.BASE / file).read_bytes()
        yield other(file, None, "diffusion_pytorch_model.bin")
        yield other(file, whole + b"more")
        yield other(file, (2**60).to_bytes(8, "little") + whole[8:])
    index = json.loads((shapes.BASE / "model_index.json").read_text())
    for name in ("StableDiffusionPipeline", "FluxKontextPipeline", None):
        yield other(Path("model_index.json"), json.dumps(index | {"_class_name": name}).encode())
    yield other(Path("model_index.json"), json.dumps(index | {"image_encoder": ["transformers", "CLIPModel"]}).encode())
    yield other(Path("model_index.json"), b"[]")


def prompts(folder: Path) -> Iterator[list[str]]:
    """Files of prompts that are none."""
    contents = {
        "empty.txt": b"",
        "blank.txt": b"\n \n\t\n",
        "latin.txt": "ein grüner Ring".encode("latin-1"),
        "utf16.txt": "a cat\n".encode("utf-16"),
        "long.txt": b"a" * 100_000,
        "twice.txt": b"a cat\na dog\na cat\n",
        "broken.jsonl": b'{"prompt": "a cat"}\n{"prompt": \n',
        "number.jsonl": b'{"prompt": 3}\n',
        "none.jsonl": b'{"text": "a cat"}\n',
        "long.jsonl": json.dumps({"prompt": "a " * 50_000}).encode(),
        "object.json": b"{}",
        "empty.json": b"[]",
        "broken.json": b"[",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        yield [f"prompts.path={folder / name}"]
        if not name.startswith("twice"):
            yield [f"evaluation.prompts={folder / name}"]
    yield [f"prompts.path={folder / 'missing.txt'}"]
    yield [f"prompts.path={folder}"]


def adapter(folder: Path, tensors: dict[str, list[int]], alpha: float = 4) -> Path:
    """An adapter's folder of zeros."""
    folder.mkdir()
    header, end = {"__metadata__": {METADATA: json.dumps({"transformer.lora_alpha": alpha})}}, 0
    for name, shape in tensors.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (folder / EXPORT_FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return folder


def adapters(folder: Path) -> Iterator[list[str]]:
    """Adapters of another model, rank or alpha, or none."""
    module = "transformer.transformer_blocks.0.attn.to_q"
    own = {f"{module}.lora_A.weight": [4, 128], f"{module}.lora_B.weight": [128, 4]}
    given = ["adapter.rank=4", "adapter.alpha=4"]
    good = adapter(folder / "good", own)
    align.checked(align.arguments([str(SPARSE), *given, f"adapter.init_from={good}"]))  # or nothing below would mean anything
    flux = {k.replace("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"): v for k, v in own.items()}
    wide = {f"{module}.lora_A.weight": [4, 256], f"{module}.lora_B.weight": [128, 4]}
    tall = {f"{module}.lora_A.weight": [4, 128], f"{module}.lora_B.weight": [256, 4]}
    two = own | {"transformer.transformer_blocks.1.attn.to_q.lora_A.weight": [8, 128]}
    for name, tensors in {"flux": flux, "wide": wide, "tall": tall, "two": two, "empty": {}}.items():
        yield [*given, f"adapter.init_from={adapter(folder / name, tensors)}"]
    yield [f"adapter.init_from={good}", "adapter.rank=8", "adapter.alpha=4"]
    yield [f"adapter.init_from={good}", "adapter.rank=4", "adapter.alpha=8"]
    whole = (good / EXPORT_FILE).read_bytes()
    for length in (0, 7, 40, len(whole) - 1):
        cut = folder / f"cut{length}"
        cut.mkdir()
        (cut / EXPORT_FILE).write_bytes(whole[:length])
        yield [*given, f"adapter.init_from={cut}"]
    pickled = folder / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04N.")
    yield [*given, f"adapter.init_from={pickled}"]


def continued(folder: Path) -> Iterator[list[str]]:
    """Runs that cannot go on so."""
    config = load(SPARSE, [f"output={folder}"])
    run = folder / "run"
    runs.begin(config, run, None)
    align.checked(align.arguments([str(SPARSE), "--resume", str(run)]))
    for other in (
        "train.learning_rate=1",
        "train.batch=48",
        "train.policy_lag=0",
        "surrogate.active_steps=3",
        "reward.components.0.clip=1",
        "adapter.rank=8",
        "sampling.guidance_scale=1",
        "watch.window=3",
        "tracking.experiment=other",
    ):
        yield ["--resume", str(run), other]
    (run / runs.LIST).write_text(
        json.dumps({"latest_checkpoint_result": {"checkpoint_dir_name": "c", "metrics": {"version": 40}}})
    )
    yield ["--resume", str(run), "train.steps=30"]
    yield ["--resume", str(folder)]
    yield ["--resume", str(folder / "nowhere")]
    changed = folder / "changed"
    shutil.copytree(run, changed)
    (changed / runs.BEGAN).write_text('{"prompts": "others", "revision": null, "finished": false}')
    yield ["--resume", str(changed)]


def files(folder: Path) -> Iterator[list[str]]:
    """Configurations that are none."""
    good = yaml.safe_load(SPARSE.read_text("utf-8"))
    for number, section in enumerate(("model", "prompts", "surrogate", "reward")):
        file = folder / f"without{number}.yaml"
        file.write_text(yaml.dump({k: v for k, v in good.items() if k != section}))
        yield [str(file), "--only"]
    for number, content in enumerate((b"", b"[", b"- 1", b"\xff\xfe", b"train: {steps: 3}\ntrain: {steps: 4}", b"a: &a [*a]")):
        file = folder / f"broken{number}.yaml"
        file.write_bytes(content)
        yield [str(file), "--only"]
    yield [str(folder), "--only"]
    yield [str(folder / "nowhere.yaml"), "--only"]


def commands(folder: Path) -> list[list[str]]:
    """The arguments of all."""
    found = [*settings()]
    for make in (models, prompts, adapters, continued, files):
        (folder / make.__name__).mkdir()
        found += make(folder / make.__name__)
    return [a[:1] if a[-1] == "--only" else [str(SPARSE), *(part for given in a for part in given.split(" "))] for a in found]


def main() -> None:
    """Validate all; print each with what was said, and what was imported for it."""
    folder = Path(sys.argv[1])
    os.environ["HF_HUB_OFFLINE"] = "1"
    answers = []
    for command in commands(folder):
        try:
            align.checked(align.arguments(command))
            said = None
        except (ConfigError, ValueError, OSError) as error:
            said = str(error)
        except Exception:  # what a person must never see
            said = traceback.format_exc()
        answers.append([command, said])
    heavy = [m for m in ("torch", "ray", "mlflow", "diffusers", "transformers") if m in sys.modules]
    print(json.dumps({"answers": answers, "imported": heavy}))


if __name__ == "__main__":
    main()
