"""Encoding once, in this process, on tiny random models of every family; tests/e2e has it done on a cluster."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from flowbp_ray import backbones
from flowbp_ray.backbones.backbone import Conditioning
from flowbp_ray.config import load
from flowbp_ray.rollouts import embeds
from flowbp_ray.rollouts.encoding import Encoder
from flowbp_ray.rollouts.pictures import Painter
from flowbp_ray.rollouts.sampler import Sampler
from flowbp_ray.training.learner import Learner
from pipelines import align

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
SMALL = (
    "train.batch=4",
    "train.micro_batch=4",
    "train.workers=1",
    "train.policy_lag=0",
    "adapter.rank=2",
    "sampling.steps=3",
    "sampling.height=32",
    "sampling.width=48",
    "surrogate={method: sparse, active_steps: 2}",
    "evaluation.per_task=4",
    "evaluation.preview_prompts=4",
)
TRAINING, EVALUATION = ["a red ring", "two circles", "a ring above a cross"], ["two circles", "a cross"]
WANTED = ["a red ring", "two circles", "a ring above a cross", "a cross", ""]


def configured(model, place, *overrides):
    (place / "training.txt").write_text("\n".join(TRAINING), encoding="utf-8")
    (place / "evaluation.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in EVALUATION), encoding="utf-8")
    paths = [f"model.path={model}", f"prompts.path={place}/training.txt", f"evaluation.prompts={place}/evaluation.jsonl"]
    return load(SPARSE, [*SMALL, *paths, *overrides])


def encode(config, folder):
    """As the job does it, in files of two prompts; how many were encoded."""
    missing = embeds.start(config, folder).missing(embeds.wanted(config))
    encoder, texts = Encoder(config, folder), [p for p in missing if p]
    for prompts in [texts[:2], texts[2:], [p for p in missing if not p]]:
        if prompts:
            encoder(block_of(prompts))
    return len(missing)


def block_of(prompts):
    return {"prompt": np.array(prompts, dtype=object)}


@pytest.fixture(scope="module", params=[tiny.sd3, tiny.flux1, tiny.flux2, tiny.z_image], ids=lambda made: made.__name__)
def family(request, tmp_path_factory):
    """A configuration without and with embeddings."""
    place = tmp_path_factory.mktemp(request.param.__name__)
    model = tiny.saved(request.param, place / "model")
    encode(configured(model, place), place / "embeds")
    return configured(model, place), configured(model, place, f"prompts.embeds={place}/embeds")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """Model, where the prompts are, and a folder of embeddings, none of which is to be changed."""
    place = tmp_path_factory.mktemp("sd3")
    model = tiny.saved(tiny.sd3, place / "model")
    encode(configured(model, place), place / "embeds")
    return model, place, place / "embeds"


def equal(one, other):
    return all(torch.equal(v, other.tensors[k]) and v.dtype == other.tensors[k].dtype for k, v in one.tensors.items())


def test_they_are_what_the_backbone_encodes(family):
    """In batches of four and more, which are rounded alike, and of the negative prompt alone."""
    plain, configuration = family
    assert embeds.wanted(plain) == WANTED
    found, backbone = embeds.opened(configuration), backbones.load(plain.model.source)
    assert sorted(found.places) == sorted(WANTED)
    for prompts in (WANTED[:4], WANTED[:4] * 3, [""]):
        assert equal(backbone.encode(prompts), found(prompts))


def test_what_becomes_of_a_prompt_does_not_depend_on_the_others(family, tmp_path):
    plain, configuration = family
    embeds.start(plain, tmp_path)
    Encoder(plain, tmp_path)(block_of([WANTED[3]]))
    assert equal(embeds.opened(configuration)([WANTED[3]]), embeds.Embeds(tmp_path)([WANTED[3]]))


def test_sampler_learner_and_evaluation_do_the_same_with_them_and_hold_no_text_encoder(family):
    results = []
    for config in family:
        learner = Learner(config)
        sampler = Sampler(config, TRAINING, lambda _, learner=learner: learner.policy())
        block = sampler({"number": np.array([0])})
        gradients = np.random.default_rng(0).standard_normal(block["inputs"].shape).astype(np.float32)
        learner.accumulate(block | {"gradients": gradients})
        shown = learner.preview(EVALUATION * 2, [1, 2, 3, 4])
        painters = Painter(config, None), Painter(config, Path(config.model.source))
        painted = [paint(block_of(EVALUATION * 2) | {"seed": np.arange(4)})["latents"] for paint in painters]
        results.append((block, learner.weights.gradient, shown, painted))
        for held in (learner.backbone, sampler.backbone, *(painter.backbone for painter in painters)):
            parts = [getattr(held.pipeline, name) for name in held.text_parts()]
            assert [part is None for part in parts] == [config.prompts.embeds is not None] * len(parts)
    (one, gradient, shown, painted), (other, *same) = results
    for column in ("prompt", "latents", "inputs", "weight"):
        np.testing.assert_array_equal(one[column], other[column])
    assert gradient.norm() > 0
    assert torch.equal(gradient, same[0])
    assert torch.equal(shown, same[1])
    np.testing.assert_array_equal(painted, same[2])
    np.testing.assert_array_equal(*painted)


def test_who_encodes_holds_nothing_else(family, tmp_path):
    plain, _ = family
    embeds.start(plain, tmp_path)
    backbone = Encoder(plain, tmp_path).backbone
    assert backbone.transformer is None
    assert backbone.vae is None


def test_any_tensors_come_back_as_they_were(tmp_path):
    written = Conditioning(
        {"prompt_embeds": torch.randn(3, 5, 4).to(torch.bfloat16), "lengths": torch.tensor([1, 2**40, 3]), "f": torch.randn(3, 2)}
    )
    embeds.write(tmp_path, ["überall", "", "two\nlines"], written)
    (tmp_path / embeds.ENCODER_FILE).write_text('{"encoder": {}}')
    found = embeds.Embeds(tmp_path)(["two\nlines", "überall"])
    assert equal(found, Conditioning({k: v[[2, 0]] for k, v in written.tensors.items()}))
    assert parquet.read_metadata(next(tmp_path.glob("*.parquet"))).num_row_groups == 3


def test_another_encoder_is_refused_before_anything_starts(sd3, tmp_path):
    model, place, folder = sd3
    other = shutil.copytree(model, tmp_path / "other")
    config = configured(other, place, f"prompts.embeds={folder}")
    embeds.check(config)  # a copy is the same encoder
    weights = load_file(other / "text_encoder_2" / "model.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first] + 1e-3}, other / "text_encoder_2" / "model.safetensors", {"format": "pt"})
    sentence = r"are of another encoder than .*: the file text_encoder_2/model\.safetensors is not the same\. Set prompts\.embeds"
    for refused in (embeds.check, align.intended, lambda _: embeds.start(config, folder)):
        with pytest.raises(ValueError, match=sentence):
            refused(config)


def test_other_files_of_the_same_encoder_make_no_difference(sd3, tmp_path):
    model, place, folder = sd3
    other = shutil.copytree(model, tmp_path / "other")
    (other / "text_encoder" / "model.fp16.safetensors").write_bytes(b"a variant")
    (other / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"aligned")
    config = configured(other, place, f"prompts.embeds={folder}")
    embeds.check(config)
    (other / "tokenizer_3" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"the file tokenizer_3/tokenizer_config\.json is not the same"):
        embeds.check(config)


def test_another_dtype_is_refused_where_they_are_opened(sd3):
    model, place, folder = sd3
    with pytest.raises(ValueError, match=r"of another encoder than .*: dtype is float32 there and bfloat16 here"):
        embeds.backbone_of(configured(model, place, f"prompts.embeds={folder}", "model.dtype=bfloat16"), "cpu")


def test_a_prompt_that_is_not_there_is_named_with_what_to_do(sd3, tmp_path):
    model, place, folder = sd3
    sentence = f"the prompt 'a blue cross' is not among the 5 in {folder}"
    ending = f": add what is missing with python -m pipelines.encode_prompts, this configuration and --output {folder}"
    with pytest.raises(ValueError, match=sentence + ending):
        embeds.backbone_of(configured(model, place, f"prompts.embeds={folder}"), "cpu").encode(["a cross", "a blue cross"])
    (tmp_path / "more.txt").write_text("a cross\na blue cross\na blue ring\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{sentence}, nor are 1 others{ending}"):
        embeds.check(configured(model, place, f"prompts.embeds={folder}", f"prompts.path={tmp_path}/more.txt"))


def test_a_folder_that_has_no_embeddings_is_refused(sd3, tmp_path):
    model, place, _ = sd3
    with pytest.raises(ValueError, match=r"has no encoder\.json that can be read, so no embeddings"):
        embeds.check(configured(model, place, f"prompts.embeds={tmp_path}"))
    (tmp_path / "mine.txt").write_text("not to be touched")
    with pytest.raises(ValueError, match=r"has no encoder\.json that can be read, so no embeddings"):
        embeds.start(configured(model, place), tmp_path)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_an_interruption_left_is_whole_and_is_not_encoded_again(sd3, tmp_path, monkeypatch):
    model, place, folder = sd3
    config, whole = configured(model, place), contents(folder)
    stopped = tmp_path / "stopped"
    embeds.start(config, stopped)
    encoder, write = Encoder(config, stopped), parquet.write_table

    def interrupted(table, file, **settings):
        write(table, file, **settings)
        file.write_bytes(file.read_bytes()[:100])
        raise KeyboardInterrupt

    encoder(block_of(WANTED[:2]))
    monkeypatch.setattr(parquet, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoder(block_of(WANTED[2:4]))
    monkeypatch.undo()
    assert sorted(f.suffix for f in stopped.iterdir()) == [".json", ".parquet", ".tmp"]
    assert sorted(embeds.Embeds(stopped).places) == sorted(WANTED[:2])
    assert encode(config, stopped) == 3
    assert contents(stopped) == whole
    assert encode(config, stopped) == 0


def test_a_torn_file_is_never_taken_for_a_whole_one(sd3, tmp_path):
    model, place, folder = sd3
    config, torn = configured(model, place), shutil.copytree(folder, tmp_path / "torn")
    with_embeds = configured(model, place, f"prompts.embeds={torn}")
    for length in (0, 50, -1):
        file, *_ = sorted(torn.glob("*.parquet"))
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(ValueError, match=rf"{file} is not whole: let python -m pipelines\.encode_prompts make it again"):
            embeds.check(with_embeds)
        assert 1 <= encode(config, torn) <= 2
        assert contents(torn) == contents(folder)
    damaged, start = bytearray(file.read_bytes()), len(file.read_bytes()) // 2
    damaged[start : start + 64] = bytes(64)
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{file} cannot be read: .*; remove it, and let"):
        embeds.opened(with_embeds)(WANTED)
