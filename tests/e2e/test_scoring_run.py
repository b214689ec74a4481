"""The reward service over HTTP as its configuration file deploys it: right answers, and a clear no to everything else."""

import base64
import io
import json
import threading

import numpy as np
import pytest
import requests
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import SECRET, TOKEN, served

from flowbp_ray import shapes
from flowbp_ray.rewards.clip import CLIPScore

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """`serve run` of the committed file on a cluster of its own, at a free port."""
    with served("configs/serve/rewards.yaml", tmp_path_factory.mktemp("serve"), "/rewards/v1/components") as at:
        yield f"{at}/rewards"


@pytest.fixture(scope="module")
def drawn():
    """Prompts, and a picture of other things beside each, as PNG."""
    prompts = ["a red ring", "two blue squares", "a green cross above a star"]
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in prompts]
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return prompts, pictures, files


@pytest.fixture(scope="module")
def right(drawn):
    """The scores of that by each component in this process, picture by picture."""
    prompts, pictures, _ = drawn
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        scores = {"preference": CLIPScore(shapes.REWARD)(images, prompts), "judge": CLIPScore(shapes.JUDGE)(images, prompts)}
    return [{name: values[n].item() for name, values in scores.items()} for n in range(len(prompts))]


def score(url, items, **more):
    return requests.post(f"{url}/v1/score", json={"items": items}, headers=TOKEN, timeout=120, **more)


def item(prompt, file):
    return {"prompt": prompt, "image": base64.b64encode(file).decode()}


def close(found, wanted):
    assert found == [pytest.approx(w, abs=1e-3) for w in wanted]


def test_scores_are_the_models(url, drawn, right):
    prompts, _, files = drawn
    answer = score(url, [item(p, f) for p, f in zip(prompts, files, strict=True)])
    assert answer.status_code == 200, answer.text
    close(answer.json()["scores"], right)


def test_a_picture_can_be_the_body(url, drawn, right):
    prompts, _, files = drawn
    for prompt, file, wanted in zip(prompts, files, right, strict=True):
        answer = requests.post(
            f"{url}/v1/score", params={"prompt": prompt}, data=file, headers=TOKEN | {"Content-Type": "image/png"}, timeout=120
        )
        close(answer.json()["scores"], [wanted])


def test_pictures_of_several_sizes_in_one_request_keep_their_order(url, drawn, right):
    prompts, pictures, files = drawn
    buffer = io.BytesIO()
    Image.fromarray(pictures[1]).resize((96, 80)).save(buffer, "JPEG")
    answer = score(url, [item(prompts[0], files[0]), item(prompts[1], buffer.getvalue()), item(prompts[2], files[2])])
    close([answer.json()["scores"][n] for n in (0, 2)], [right[0], right[2]])


@pytest.mark.parametrize(
    ("headers", "status"), [({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": f"Basic {SECRET}"}, 401)]
)
def test_nobody_is_answered_without_the_token(url, drawn, headers, status):
    answer = requests.post(f"{url}/v1/score", json={"items": [item("a", drawn[2][0])]}, headers=headers, timeout=60)
    assert answer.status_code == status
    assert "Authorization: Bearer" in answer.json()["detail"]


def test_what_is_too_large_is_refused(url):
    answer = requests.post(
        f"{url}/v1/score",
        data=b"x" * (33 * 2**20),
        headers=TOKEN | {"Content-Type": "image/png"},
        params={"prompt": "a"},
        timeout=60,
    )
    assert (answer.status_code, answer.json()["detail"]) == (413, "a request has at most 32 megabytes")
    buffer = io.BytesIO()
    Image.new("RGB", (5000, 4000)).save(buffer, "PNG")
    answer = score(url, [item("a", buffer.getvalue())])
    assert (answer.status_code, answer.json()["detail"]) == (413, "picture 0 has 5000×4000 pixels: too many for one request")


def test_every_kind_of_request_gets_an_answer_that_the_description_has(url, drawn, right):
    description = requests.get(f"{url}/openapi.json", timeout=60).json()
    assert {"/v1/score", "/v1/components", "/healthz"} <= set(description["paths"])
    prompts, _, files = drawn
    whole = [item(p, f) for p, f in zip(prompts, files, strict=True)]
    wrong, answers, stop = [], [], threading.Event()

    def job():
        while not stop.is_set():
            answer = score(url, whole)
            answers.append(answer.status_code)
            if answer.status_code != 200 or answer.json()["scores"] != [pytest.approx(w, abs=1e-3) for w in right]:
                wrong.append(answer.text)

    session, counts = requests.Session(), {}
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    )
    texts = st.text(max_size=30)
    png = files[0]
    bytes_ = st.binary(max_size=300) | st.integers(0, len(png)).map(lambda n: png[:n]) | st.sampled_from(files)
    flipped = st.tuples(st.integers(0, len(png) - 1), st.integers(1, 255)).map(
        lambda at: png[: at[0]] + bytes([png[at[0]] ^ at[1]]) + png[at[0] + 1 :]
    )
    images = (bytes_ | flipped).map(lambda b: base64.b64encode(b).decode()) | texts
    items = st.fixed_dictionaries({}, optional={"prompt": texts | junk, "image": images | junk, "more": junk})
    bodies = junk | st.fixed_dictionaries({"items": st.lists(items, max_size=3) | junk})
    kinds = st.sampled_from(["application/json", "image/png", "image/jpeg", "image/gif", "text/html", "", "multipart/form-data"])
    tokens = st.sampled_from([TOKEN["Authorization"]] * 6 + ["Bearer ", "Bearer wrong", "Basic c2VjcmV0", "x"])
    places = [(path, method) for path, methods in description["paths"].items() for method in methods]

    @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(places + [("/v1/score", "post")] * 6),
        kinds,
        tokens,
        st.none() | texts,
        bodies,
        bytes_ | flipped,
        st.booleans(),
    )
    def ask(place, kind, token, prompt, body, raw, as_json):
        (path, method), content = place, json.dumps(body).encode() if as_json else raw  # with infinities, which JSON has not
        headers = {"Authorization": token} | ({"Content-Type": kind} if kind else {})
        params = {} if prompt is None else {"prompt": prompt}
        answer = session.request(method, f"{url}{path}", params=params, headers=headers, timeout=120, data=content)
        documented = description["paths"][path][method]["responses"]
        assert str(answer.status_code) in documented, (answer.status_code, answer.text)
        assert answer.status_code < 500, answer.text
        assert SECRET not in answer.text
        counts[answer.status_code] = counts.get(answer.status_code, 0) + 1

    running = threading.Thread(target=job)
    running.start()
    try:
        ask()
    finally:
        stop.set()
        running.join()
    assert not wrong
    assert len(answers) > 10
    assert sum(counts.values()) >= 500
    assert {200, 400, 401, 415, 422} <= set(counts), counts
