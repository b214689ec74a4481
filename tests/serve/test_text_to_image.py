"""What the service makes of requests and names; adapters never mix. tests/e2e/test_images_run.py asks the real service."""

import asyncio
import gc
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from fastapi import HTTPException
from mlflow import MlflowClient

from flowbp_ray import backbones
from flowbp_ray.backbones.sd3 import SD3Backbone
from flowbp_ray.pictures import file_of, to_uint8
from flowbp_ray.training import EXPORT_FILE, adapter
from serve.catalogue import Catalogue, label, state_of
from serve.guard import parsed
from serve.painter import Painter, Painting, Picture, ReplacedError
from serve.text_to_image import SEEDS, Asked, TextToImage, api, wanted


def settings(tmp_path, **more):
    given = {"model": {"path": "shapes"}, "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", **more}
    return TextToImage.model_validate(given)


def asked(**more):
    return Asked(prompt="a red ring", **more)


def test_a_request_is_as_many_pictures_of_seeds_that_count_on(tmp_path):
    made = wanted(asked(n=2, seed=SEEDS - 1, size="32x64", steps=3, guidance_scale=1, strength=0.5), settings(tmp_path))
    assert made == [Picture("a red ring", s, 0.5, 3, 1.0, 64, 32) for s in (SEEDS - 1, 0)]
    (default,) = wanted(asked(size="auto"), settings(tmp_path, sampling={"steps": 7, "guidance_scale": 2.0}))
    assert default[2:] == (1.0, 7, 2.0, 64, 64)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body: Invalid JSON"),
        (b"[]", "the body: Input should be an object"),
        (b"{}", "prompt: Field required"),
        (b'{"prompt": ""}', "prompt: String should have at least 1 character"),
        (b'{"prompt": "a", "negative_prompt": "b"}', "negative_prompt: Extra inputs are not permitted"),
        (b'{"prompt": "a", "size": "64"}', "size: String should match pattern"),
        (b'{"prompt": "a", "strength": 5}', "strength: Input should be less than or equal to 4"),
        (b'{"prompt": "a", "seed": -1}', "seed: Input should be greater than or equal to 0"),
    ],
)
def test_what_is_no_request_is_refused(body, said):
    with pytest.raises(HTTPException) as found:
        parsed(Asked, body)
    assert found.value.status_code == 400
    assert found.value.detail.startswith(said)


@pytest.mark.parametrize(
    ("more", "said"), [({"n": 11}, "n: 11"), ({"size": "9999x9999"}, "size: "), ({"steps": 101}, "steps: 101")]
)
def test_too_much_is_refused(more, said, tmp_path):
    with pytest.raises(HTTPException) as found:
        wanted(asked(**more), settings(tmp_path))
    assert (found.value.status_code, found.value.detail[: len(said)]) == (400, said)


def test_a_name_is_a_folder_of_the_configured_one_and_nothing_else(tmp_path):
    (tmp_path / "all" / "mine").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    for place in (tmp_path / "all" / "mine", tmp_path / "secret"):
        (place / EXPORT_FILE).write_bytes(b"1")
    catalogue = Catalogue(settings(tmp_path, adapters=str(tmp_path / "all"), registered=["aligned"]), "shapes")
    assert catalogue.resolve(None) == catalogue.resolve("shapes") == ""
    first = catalogue.resolve("mine")
    assert first.startswith(f"folder:{tmp_path}/all/mine#")
    (tmp_path / "all" / "mine" / EXPORT_FILE).write_bytes(b"22")
    assert catalogue.resolve("mine") not in ("", first)
    run = "0" * 32
    for name in (
        "é" * 200,
        "a" * 300,
        "mine\0",
        "..",
        "../secret",
        str(tmp_path / "secret"),
        "mine/..",
        "all",
        "aligned",
        "aligned/1",
        "aligned@champion",
        run,
    ):
        with pytest.raises(HTTPException) as found:
            catalogue.resolve(name)
        assert found.value.status_code == 404
    assert catalogue.names() == ["shapes", "mine"]


def test_a_run_is_another_adapter_once_it_went_on(tmp_path):
    settled = settings(tmp_path, runs=True)
    client = MlflowClient(settled.tracking_uri)
    run = client.create_run("0").info.run_id
    names = []
    for _ in range(2):
        client.set_terminated(run, end_time=1 + len(names))
        names.append(Catalogue(settled, "shapes").resolve(run))
    assert names == [f"run:{run}#1", f"run:{run}#2"]
    assert label(names[0]) == run


def test_while_mlflow_does_not_answer_its_names_are_asked_for_later_and_others_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / EXPORT_FILE).write_bytes(b"1")
    settled = settings(tmp_path, tracking_uri="http://127.0.0.1:9", registered=["aligned"], adapters=str(tmp_path))
    catalogue = Catalogue(settled, "shapes")
    for ask in (lambda: catalogue.resolve("aligned@champion"), catalogue.names):
        with pytest.raises(HTTPException, match="MLflow does not answer") as found:
            ask()
        assert found.value.status_code == 503
    assert catalogue.resolve("shapes") == ""
    assert catalogue.resolve("mine").startswith("folder:")


def test_the_description_has_what_the_service_takes():
    described = api.openapi()["paths"]
    body = described["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False
    assert {"prompt", "model", "n", "size", "seed", "strength"} <= set(body["properties"])
    assert {"/v1/models", "/healthz"} <= set(described)


def test_png_is_exact():
    import io

    from PIL import Image

    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    read = np.asarray(Image.open(io.BytesIO(file_of(picture))))
    np.testing.assert_array_equal(read, picture)


def adapters_of(backbone, tmp_path):
    """Folders of three adapters that are far apart."""
    targets = backbone.lora_targets(backbone.transformer)
    adapter.add_adapter(backbone, rank=2, alpha=2.0, targets=targets, seed=0)
    fresh, folders = adapter.read(backbone.transformer), {}
    for number in range(3):
        folders[f"a{number}"] = tmp_path / f"a{number}"
        adapter.export(backbone, {k: v + 0.1 * (number + 1) for k, v in fresh.items()}, folders[f"a{number}"], weights="raw")
    return folders


@pytest.fixture
def adapters(tiny_pipeline, tmp_path):
    return adapters_of(SD3Backbone.from_pretrained(tiny_pipeline), tmp_path)


def painter_of(path, monkeypatch):
    """A replica's object, without Serve around it."""
    quiet = SimpleNamespace(Counter=lambda *_, **__: SimpleNamespace(inc=lambda **_: None))
    monkeypatch.setattr("serve.painter.metrics", quiet)
    settings = {"model": {"path": str(path)}, "sampling": {"batched_branches": False}}
    return Painter(Painting.model_validate(settings), "sqlite:////nowhere.db")


@pytest.fixture
def painter(tiny_pipeline, monkeypatch):
    return painter_of(tiny_pipeline, monkeypatch)


def test_a_painter_samples_as_it_is_configured(painter):
    assert painter.backbone.batched_branches is False


def named(folder):
    """A folder as the catalogue names it between processes."""
    return f"folder:{folder}#{state_of(folder / EXPORT_FILE)}"


def test_adapters_that_are_sampled_at_once_never_mix(painter, adapters, tiny_pipeline):
    picture = Picture("a red ring", 3, 1.0, 2, 2.0, 64, 64)
    references = {}
    for name, folder in adapters.items():
        own = SD3Backbone.from_pretrained(tiny_pipeline)
        own.pipeline.load_lora_weights(folder)
        references[name] = to_uint8(own.sample([picture.prompt], [3], steps=2, guidance_scale=2.0, height=64, width=64))
    own = SD3Backbone.from_pretrained(tiny_pipeline)
    references["base"] = to_uint8(own.sample([picture.prompt], [3], steps=2, guidance_scale=2.0, height=64, width=64))
    distances = [np.abs(references[a].astype(int) - references[b]).max() for a in references for b in references if a < b]
    assert min(distances) > 10
    held = {name: painter.fetched(named(folder)) for name, folder in adapters.items()} | {"base": None}
    wrong = []

    def ask(name):
        for _ in range(4):
            got = painter.sample(held[name], [picture])
            if np.abs(got.astype(int) - references[name]).max() > 1:
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in held]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    half = painter.sample(held["a0"], [picture._replace(strength=0.0)])
    assert np.abs(half.astype(int) - references["base"]).max() <= 1


@pytest.mark.parametrize("family", [tiny.flux1, tiny.flux2, tiny.z_image])
def test_every_family_is_served_as_it_samples_by_itself(family, tmp_path, monkeypatch):
    path = tiny.saved(family, tmp_path / "model")
    folders = adapters_of(backbones.load(path), tmp_path)
    painter = painter_of(path, monkeypatch)
    picture = Picture("a red ring", 3, 1.0, 2, 2.0, 32, 32)

    def alone(folder):
        own = backbones.load(path)
        if folder:
            own.pipeline.load_lora_weights(folder)
        return to_uint8(own.sample([picture.prompt], [3], steps=2, guidance_scale=2.0, height=32, width=32)).astype(int)

    base, first, second = alone(None), alone(folders["a0"]), alone(folders["a1"])
    assert min(np.abs(base - first).max(), np.abs(first - second).max()) > 10
    held = [painter.fetched(named(folders[name])) for name in ("a0", "a1")]
    for by, strength, right in ((held[0], 1.0, first), (held[1], 1.0, second), (None, 1.0, base), (held[0], 0.0, base)):
        assert np.abs(painter.sample(by, [picture._replace(strength=strength)]) - right).max() <= 1


def test_pictures_are_sampled_together_if_they_agree_in_all_but_prompt_and_seed(painter):
    sampled, one = [], Picture("a red ring", 0, 1.0, 2, 2.0, 64, 64)

    def sample(by, pictures):
        sampled.append([(by and by.name, *picture) for picture in pictures])
        return np.array([picture.seed for picture in pictures])

    painter.sample = sample
    others = [{"strength": 0.5}, {"steps": 3}, {"guidance_scale": 1.0}, {"height": 32}, {"width": 32}]
    asked = [(None, one._replace(prompt=f"{n} rings", seed=n)) for n in range(10)]
    asked += [(None, one._replace(seed=10 + n, **other)) for n, other in enumerate(others)]
    asked += [(SimpleNamespace(name="mine"), one._replace(seed=15))]
    answers = asyncio.run(Painter.batched.__wrapped__(painter, asked))  # what `serve.batch` calls, which only works in a replica
    assert [int(answer) for answer in answers] == list(range(16))
    assert sorted(map(len, sampled)) == [1] * 6 + [2, 8]  # at most 8 together


def test_an_adapter_that_nothing_uses_is_dropped_and_can_be_had_again(painter, adapters):
    picture = Picture("a red ring", 3, 1.0, 1, 1.0, 64, 64)
    first = painter.fetched(named(adapters["a0"]))
    before = painter.sample(first, [picture])
    assert painter._loaded() == [first.name]
    name = first.name
    del first
    gc.collect()
    second = painter.fetched(named(adapters["a1"]))
    painter.sample(second, [picture])
    assert painter._loaded() == [second.name]
    again = painter.fetched(named(adapters["a0"]))
    np.testing.assert_array_equal(painter.sample(again, [picture]), before)
    assert again.name != name


def test_an_adapter_of_another_model_is_refused(painter, adapters, tiny_pipeline, tmp_path):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    state = load_file(adapters["a0"] / EXPORT_FILE)
    save_file({k.replace("transformer_blocks", "double_blocks"): v for k, v in state.items()}, other / EXPORT_FILE)
    with pytest.raises(ValueError, match="the adapter in other is another model's"):
        painter.fetched(named(other))
    with pytest.raises(ValueError, match="is no folder here, and MLflow"):
        painter.fetched("models:/nothing/1")


def test_a_folder_is_the_adapter_that_it_was_when_it_was_looked_up_or_none(painter, adapters):
    picture = Picture("a red ring", 3, 1.0, 1, 1.0, 64, 64)
    name, folder = named(adapters["a0"]), adapters["a0"]
    first, other = painter.fetched(name), painter.fetched(named(adapters["a1"]))
    wanted, others = painter.sample(first, [picture]), painter.sample(other, [picture])
    # What somebody puts beside it, or has half written, is not taken for it.
    for beside in (f".{EXPORT_FILE}", f"old_{EXPORT_FILE}"):
        (folder / beside).write_bytes((adapters["a1"] / EXPORT_FILE).read_bytes())
    np.testing.assert_array_equal(painter.sample(painter.fetched(name), [picture]), wanted)
    (folder / f".{EXPORT_FILE}").replace(folder / EXPORT_FILE)
    with pytest.raises(ReplacedError):
        painter.fetched(name)
    np.testing.assert_array_equal(painter.sample(painter.fetched(named(folder)), [picture]), others)
    np.testing.assert_array_equal(painter.sample(first, [picture]), wanted)  # held, whatever became of the folder
    (folder / EXPORT_FILE).unlink()
    with pytest.raises(ReplacedError):
        painter.fetched(name)


@pytest.mark.parametrize("broken", ["rank", "half"])
def test_an_adapter_that_is_not_whole_is_refused(painter, adapters, tmp_path, broken):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    folder.mkdir()
    state = load_file(adapters["a0"] / EXPORT_FILE)
    last = next(name for name in sorted(state, reverse=True) if "lora_B" in name)
    state[last] = state[last][:, :1].contiguous()
    if broken == "half":
        del state[last]
    save_file(state, folder / EXPORT_FILE)
    with pytest.raises(ValueError, match="the adapter in broken is not whole: of transformer_blocks"):
        painter.fetched(named(folder))
