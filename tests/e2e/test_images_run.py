"""Text to image as its configuration file deploys it, asked by OpenAI's own client: always the pipeline's own pictures."""

import base64
import io
import itertools
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import psutil
import pytest
import requests
from mlflow import MlflowClient
from PIL import Image
from serving import SECRET, TOKEN, served

from flowbp_ray.config import dump, load
from flowbp_ray.shapes import BASE
from flowbp_ray.tracking import registry
from flowbp_ray.tracking.run import TrackedRun
from flowbp_ray.training import adapter

ROOT = Path(__file__).parents[2]
SPARSE = ROOT / "configs" / "shapes" / "sparse.yaml"
PROMPT, STEPS = "a red ring", 4
NAMES = ("shapes", "shapes-aligned/1", "shapes-aligned/2", "loose")

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with two versions, a folder with one adapter more, and another one to put in its place."""
    place = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{place}/mlflow.db"
    config = load(SPARSE, [f"tracking.uri={uri}", "adapter.rank=2"])
    backbone = adapter.adapted(config, "cpu")
    fresh, folders = adapter.read(backbone.transformer), []
    for number, name in enumerate(("one", "two", "adapters/loose", "adapters/other")):
        folders.append(place / name)
        adapter.export(backbone, {k: v + 0.03 * (number + 1) for k, v in fresh.items()}, folders[-1], weights="raw")
    for folder in folders[:2]:
        run = TrackedRun(uri, "flowbp_ray", None, config=config.model_dump(mode="json"))
        registry.register(uri, run.run_id, registry.Exported(folder, config, dump(config), 1, "", ()))
        kept = place / run.run_id / "adapter"
        shutil.copytree(folder, kept)
        run.artifact(kept)
    return uri, place, dict(zip(NAMES, [None, *folders], strict=False))


@pytest.fixture(scope="module")
def url(store, tmp_path_factory):
    """`serve run` of the committed file, with two replicas that hold two adapters each, on a cluster of its own."""
    uri, place, _ = store

    def change(config):
        config["applications"][0]["args"] |= {
            "tracking_uri": uri,
            "adapters": str(place / "adapters"),
            "runs": True,
            "images": {"replicas": 2, "cpus": 0.4},
            "adapters_held": 2,
        }

    with served("configs/serve/text_to_image.yaml", tmp_path_factory.mktemp("serve"), "/healthz", change) as at:
        yield at


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=SECRET, max_retries=0, timeout=120)


def draw(client, model, seed, n=1, **more):
    """Pictures by a model, and the answer."""
    answer = client.images.generate(
        model=model, prompt=PROMPT, n=n, size="64x64", extra_body={"seed": seed, "steps": STEPS, **more}
    )
    files = [base64.b64decode(d.b64_json) for d in answer.data]
    return [np.asarray(Image.open(io.BytesIO(f))).astype(int) for f in files], answer


def test_pictures_are_the_stock_pipelines_own(client, store, plain_diffusers):
    for model, folder in store[2].items():
        theirs = plain_diffusers(BASE, [PROMPT] * 2, [5, 6], steps=STEPS, guidance_scale=3.0, lora=folder)
        theirs = (theirs.permute(0, 2, 3, 1).numpy() * 255).round()
        ours, answer = draw(client, model, 5, n=2)
        assert [d.seed for d in answer.data] == [5, 6]
        for own, their in zip(ours, theirs, strict=True):
            assert np.abs(own - their).max() <= 1, model


def test_models_are_listed_and_an_alias_is_a_version(client, store):
    MlflowClient(store[0]).set_registered_model_alias("shapes-aligned", "champion", "1")
    assert [m.id for m in client.models.list()] == [
        "shapes", "shapes-aligned@champion", "shapes-aligned/2", "shapes-aligned/1", "loose", "other"
    ]  # fmt: skip
    by_alias, answer = draw(client, "shapes-aligned@champion", 1)
    assert answer.model == "shapes-aligned/1"
    np.testing.assert_array_equal(by_alias, draw(client, "shapes-aligned/1", 1)[0])
    MlflowClient(store[0]).set_registered_model_alias("shapes-aligned", "champion", "2")  # promoted, while it is served
    until = time.monotonic() + 30
    while draw(client, "shapes-aligned@champion", 1)[1].model != "shapes-aligned/2":
        assert time.monotonic() < until
    newest, answer = draw(client, "shapes-aligned", 1)
    assert answer.model == "shapes-aligned/2"
    assert np.abs(newest[0] - by_alias[0]).max() > 10
    assert client.models.retrieve("loose").id == "loose"
    run = MlflowClient(store[0]).get_model_version("shapes-aligned", "1").run_id
    np.testing.assert_array_equal(by_alias, draw(client, run, 1)[0])


def test_strength_goes_from_the_base_to_the_adapter_and_beyond(client):
    (base,), _ = draw(client, None, 2)
    (none,), _ = draw(client, "loose", 2, strength=0)
    assert np.abs(none - base).max() <= 1
    distances = [np.abs(draw(client, "loose", 2, strength=s)[0][0] - base).mean() for s in (0.25, 0.5, 1)]
    assert distances == sorted(distances)
    assert distances[0] > 0.5


def test_formats(client, url):
    answer = client.images.generate(
        prompt=PROMPT, response_format="url", output_format="jpeg", extra_body={"seed": 1, "steps": 1}
    )
    assert answer.data[0].url.startswith("data:image/jpeg;base64,/9j/")
    assert answer.data[0].b64_json is None
    drawn = client.images.generate(prompt=PROMPT, n=2, extra_body={"steps": 1})
    assert len({d.b64_json for d in drawn.data}) == 2


def test_what_cannot_be_is_refused_in_openais_words(client, url):
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer TOKEN"):
        client.with_options(api_key="other").models.list()
    with pytest.raises(openai.NotFoundError, match="there is no model 'nothing': GET /v1/models has a list"):
        draw(client, "nothing", 1)
    with pytest.raises(openai.NotFoundError):
        draw(client, "../store", 1)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("shapes-aligned/9")
    with pytest.raises(openai.BadRequestError, match="quality: Extra inputs are not permitted"):
        client.images.generate(prompt=PROMPT, quality="hd")
    with pytest.raises(openai.BadRequestError, match="pictures of 68×64 pixels: this model makes sizes that are multiples of 8"):
        client.images.generate(prompt=PROMPT, size="64x68")
    large = requests.post(f"{url}/v1/images/generations", headers=TOKEN, data=b" " * (33 * 2**20), timeout=60)
    assert large.status_code == 413


def test_metrics_of_the_replicas_are_there(client, url):
    draw(client, "loose", 0)
    assert requests.get(f"{url}/metrics", timeout=60).status_code == 401
    until = time.monotonic() + 60
    while "ray_flowbp_pictures_total{" not in (text := requests.get(f"{url}/metrics", headers=TOKEN, timeout=60).text):
        assert time.monotonic() < until, text[:1000]
        time.sleep(1)
    assert "ray_serve_deployment" in text
    assert all(line.startswith(("ray_serve_", "ray_flowbp_", "# ")) for line in text.splitlines())


def test_no_picture_is_wrong_while_a_replica_is_killed_and_an_adapter_is_replaced(client, store):
    """Eight clients over four adapters, two of which a replica holds; then the loose one is another one, and a replica dies."""
    references = {(m, s): draw(client, m, s)[0][0] for m in (*NAMES, "other") for s in range(3)}
    apart = [np.abs(a - b).max() for a, b in itertools.combinations(references.values(), 2)]
    assert min(apart) > 1  # else a wrong one would not be told
    wrong, done, replaced = [], [], threading.Event()

    def ask(number):
        model, seed = NAMES[number % len(NAMES)], number // len(NAMES) % 3
        try:
            (picture,), _ = draw(client, model, seed)
        except openai.OpenAIError as error:
            wrong.append(f"{model} {seed}: {error}")
            return
        right = [references[model, seed]] + ([references["other", seed]] if model == "loose" and replaced.is_set() else [])
        if not any(np.abs(picture - one).max() <= 1 for one in right):
            wrong.append(f"{model} {seed}: another picture")
        done.append(number)

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, n) for n in range(96)]
        while len(done) < 24 and not wrong:
            time.sleep(0.05)
        painters = [p for p in psutil.process_iter(["cmdline"]) if "Painter" in " ".join(p.info["cmdline"] or [])]
        assert len(painters) == 2
        painters[0].kill()
        while len(done) < 48 and not wrong:
            time.sleep(0.05)
        replaced.set()
        other, loose = store[1] / "adapters" / "other", store[1] / "adapters" / "loose"
        for file in other.iterdir():  # as anybody would who does not want half a file to be read
            (loose / f".{file.name}").write_bytes(file.read_bytes())
            (loose / f".{file.name}").replace(loose / file.name)
        for future in asked:
            future.result()
    assert not wrong
    assert len(done) == 96
    (now,), _ = draw(client, "loose", 0)
    assert np.abs(now - references["other", 0]).max() <= 1
