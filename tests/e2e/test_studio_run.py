"""The whole way on real clusters: align, register, serve, promote; the studio in a real browser (``--screenshots FOLDER``)."""

import base64
import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import openai
import pytest
from axe_playwright_python.sync_playwright import Axe
from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from serving import ROOT, SECRET, served

from flowbp_ray.config import dump, load
from flowbp_ray.shapes import BASE
from flowbp_ray.tracking import registry
from flowbp_ray.tracking.run import TrackedRun
from flowbp_ray.training import adapter

SPARSE = ROOT / "configs" / "shapes" / "sparse.yaml"
SMALL = (
    "train.steps=3",
    "train.batch=4",
    "train.micro_batch=4",
    "sampling.steps=4",
    "surrogate.active_steps=2",
    "adapter.rank=2",
    "evaluation.per_task=3",
    "evaluation.preview_every=1",
    "evaluation.preview_prompts=3",
    "cluster.samplers=1",
)
PROMPT = "two blue squares"
CHROMIUM = shutil.which("chromium")
QUIET = (
    "--no-sandbox",  # as root
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

pytestmark = pytest.mark.drill


def settings(place):
    return [*SMALL, f"output={place}/runs", f"tracking.uri=sqlite:///{place}/mlflow.db"]


def command(module, *given, check=True):
    done = subprocess.run(
        [sys.executable, "-m", f"pipelines.{module}", *map(str, given)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A run as `align` leaves it, its version in the registry, and before it one of an adapter that spoils pictures."""
    place = tmp_path_factory.mktemp("aligned")
    config = load(SPARSE, settings(place))
    backbone = adapter.adapted(config, "cpu")
    state = {k: v + 0.2 for k, v in adapter.read(backbone.transformer).items()}
    adapter.export(backbone, state, place / "spoilt", weights="raw")
    uri = config.tracking.uri
    spoilt = TrackedRun(uri, "flowbp_ray", "spoilt", config=config.model_dump(mode="json"))
    registry.register(uri, spoilt.run_id, registry.Exported(place / "spoilt", config, dump(config), 1, "", ()))
    printed = command("align", SPARSE, *settings(place)).stdout
    assert "model     models:/shapes-aligned/2" in printed
    return place


@pytest.fixture(scope="module")
def at(aligned, tmp_path_factory):
    """The committed configuration's application with the studio, and the rewards that score for it."""

    def change(config):
        (images,) = (a for a in config["applications"] if a["name"] == "text_to_image")
        images["args"] |= {"tracking_uri": f"sqlite:///{aligned}/mlflow.db", "sampling": {"steps": 4}}
        images["args"]["studio"] |= {"runs": str(aligned / "runs"), "votes": str(aligned / "votes.db")}

    with served("configs/serve/studio.yaml", tmp_path_factory.mktemp("serve"), "/healthz", change) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.fail("there is no chromium on PATH: install it (Debian's package is chromium)")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)


@pytest.fixture
def page(at, browser, request):
    """A page of somebody who gave the token, that notes what it asks of other hosts and what its console says."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.odd = []
    page.on("request", lambda r: urlparse(r.url).scheme == "data" or r.url.startswith(at) or page.odd.append(r.url))
    page.on("console", lambda m: m.type in ("error", "warning") and page.odd.append(m.text))
    page.on("pageerror", lambda e: page.odd.append(str(e)))
    page.goto(f"{at}/studio")
    page.get_by_label("The token of this service").fill(SECRET)
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("heading", name="Compare models")).to_be_visible()
    yield page
    assert page.odd == []
    context.close()


def wait_until(true):
    """The page's policy forbids Playwright's own way, which evaluates text in it."""
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def pixels(source):
    """A picture of a page, from its data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))).astype(int)


def look(page, name, folder):
    """Nothing that axe finds wrong, room enough at phone width, and a screenshot."""
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    if folder:
        page.screenshot(path=Path(folder) / f"studio_{name}.png", full_page=True)
    size = page.viewport_size
    page.set_viewport_size({"width": 360, "height": 740})
    wide = page.evaluate("document.documentElement.scrollWidth")
    if folder:
        page.screenshot(path=Path(folder) / f"studio_{name}_phone.png")
    page.set_viewport_size(size)
    assert wide <= 360


def test_a_registered_version_is_served_as_the_stock_pipeline_draws_it(aligned, at, plain_diffusers):
    client = openai.OpenAI(base_url=f"{at}/v1", api_key=SECRET, max_retries=0, timeout=120)
    assert [m.id for m in client.models.list()] == ["shapes", "shapes-aligned/2", "shapes-aligned/1"]
    (run,) = (f for f in (aligned / "runs").iterdir() if f.is_dir())
    drawn = {}
    for model, lora in (("shapes", None), ("shapes-aligned/2", run / "adapter")):
        answer = client.images.generate(model=model, prompt=PROMPT, extra_body={"seed": 11})
        ours = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))).astype(int)
        theirs = plain_diffusers(BASE, [PROMPT], [11], steps=4, guidance_scale=3.0, lora=lora)
        drawn[model] = (theirs[0].permute(1, 2, 0).numpy() * 255).round()
        assert np.abs(ours - drawn[model]).max() <= 1
    assert np.abs(drawn["shapes"] - drawn["shapes-aligned/2"]).max() > 1


def test_a_wrong_token_is_told_so_and_everything_else_asks_for_it(at, browser):
    page = browser.new_context().new_page()
    for path in ("", "/runs", "/blind", "/results"):
        page.goto(f"{at}/studio{path}")
        expect(page.get_by_role("heading", name="Token")).to_be_visible()
    look(page, "login", None)
    page.get_by_label("The token of this service").fill("other")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("That is another token.")
    refused = page.request.post(f"{at}/studio/pictures", data={"prompt": "p", "model": "shapes", "seed": 0}, max_redirects=0)
    assert refused.status == 303


def test_compare(page, pytestconfig):
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("shapes-aligned/1").check()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_have_text("6 of 6 pictures", timeout=120_000)
    figures = page.locator("#pictures figure")
    expect(figures).to_have_count(6)
    for number in range(6):
        assert figures.nth(number).locator("dt").all_text_contents() == ["preference", "judge"]
        assert all(np.isfinite(float(score)) for score in figures.nth(number).locator("dd").all_text_contents())
    sources = lambda: page.locator("#pictures img").evaluate_all("images => images.map(image => image.src)")  # noqa: E731
    first = sources()
    assert len(set(first)) == 6
    assert [image.get_attribute("alt") for image in page.locator("#pictures img").all()][::3] == [
        f"{PROMPT}, by shapes, seed {seed}" for seed in (0, 1)
    ]
    with page.expect_download() as download:
        page.get_by_label("Download the picture by shapes-aligned/1, seed 0").click()
    assert Image.open(download.value.path()).size == (64, 64)
    look(page, "compare", pytestconfig.getoption("screenshots"))

    unchanged = [pixels(source) for source in first[::3]]  # the base's, by seed
    page.get_by_label("Strength of the adapters").focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#amount")).to_have_text("0")
    expect(page.locator("#status")).to_have_text("6 of 6 pictures", timeout=120_000)

    def as_the_base():  # but for what a batch's size may round otherwise
        now = sources()
        return all(now) and all(np.abs(pixels(s) - unchanged[n // 3]).max() <= 1 for n, s in enumerate(now))

    wait_until(as_the_base)

    page.get_by_label("Prompt").fill("x" * 100)
    for box in page.get_by_role("checkbox").all():
        box.uncheck()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_have_text("Choose a model.")


def test_a_run_through_its_steps(page, aligned, pytestconfig):
    page.get_by_role("link", name="Runs").click()
    look(page, "runs", pytestconfig.getoption("screenshots"))
    (run,) = (f.name for f in (aligned / "runs").iterdir() if f.is_dir())
    page.get_by_role("link", name=run).click()
    slider = page.get_by_role("slider")
    expect(slider).to_have_attribute("aria-valuetext", "after 3 steps")
    now = page.locator("img.now").first
    last = now.get_attribute("src")
    slider.focus()
    page.keyboard.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "after 0 steps")
    assert now.get_attribute("src") != last
    assert "/previews/000000/" in now.get_attribute("src")
    whole = "[...document.images].filter(i => i.loading != 'lazy').every(i => i.complete && i.naturalWidth == 64)"
    wait_until(lambda: page.evaluate(whole))
    expect(page.locator(".frame.chosen")).to_have_count(3)
    expect(page.get_by_role("rowheader", name="single object")).to_be_visible()
    expect(page.locator("article")).to_have_count(18)
    look(page, "run", pytestconfig.getoption("screenshots"))
    # Nothing but pictures of runs.
    for path in ("config.yaml", "..%2F..%2Fmlflow.db", "previews/000000/../../adapter.json"):
        assert page.request.get(f"{page.url}/files/{path}").status == 404


def test_choices_without_names_add_up(page, pytestconfig):
    page.get_by_role("link", name="Blind test").click()
    said = []
    page.on("response", lambda r: "/pairs" in r.url and "json" in r.headers.get("content-type", "") and said.append(r.text()))
    page.get_by_role("combobox", name="One model").select_option("shapes")
    page.get_by_role("combobox", name="Another one").select_option("shapes-aligned/2")
    page.get_by_role("button", name="Begin").click()
    expect(page.get_by_role("button", name="← Left")).to_be_enabled(timeout=60_000)
    look(page, "blind", pytestconfig.getoption("screenshots"))
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#status")).to_have_text("1 chosen", timeout=60_000)
    page.get_by_role("button", name="Right →").click()
    expect(page.locator("#status")).to_have_text("2 chosen", timeout=60_000)
    page.keyboard.press("=")
    expect(page.locator("#status")).to_have_text("3 chosen", timeout=60_000)
    assert len(said) >= 7
    assert not any("shapes" in text for text in said)  # which is whose is not sent
    page.get_by_role("main").get_by_role("link", name="Results").click()
    row = page.locator("tr").nth(1)
    won, lost, ties = (int(row.locator("td").nth(n).text_content()) for n in (3, 4, 5))
    assert (won + lost, ties) == (2, 1)
    look(page, "results", pytestconfig.getoption("screenshots"))


def test_the_better_version_is_promoted_and_the_worse_one_is_not(aligned):
    client = MlflowClient(f"sqlite:///{aligned}/mlflow.db")
    client.set_registered_model_alias("shapes-aligned", "champion", "1")
    store = f"tracking.uri=sqlite:///{aligned}/mlflow.db"
    won = command("promote", "models:/shapes-aligned/2", store, "--metric", "reward/judge")
    assert "champion  of shapes-aligned is now 2" in won.stdout
    assert str(client.get_model_version_by_alias("shapes-aligned", "champion").version) == "2"
    assert client.get_model_version("shapes-aligned", "2").tags["promotion"].startswith("won: reward/judge +")
    lost = command("promote", "models:/shapes-aligned/1", store, "--metric", "reward/judge", check=False)
    assert (lost.returncode, "champion  of shapes-aligned stays 2" in lost.stdout) == (1, True)
    assert str(client.get_model_version_by_alias("shapes-aligned", "champion").version) == "2"
    assert "not won" in client.get_model_version("shapes-aligned", "1").tags["promotion"]
    again = command("promote", "models:/shapes-aligned/2", store, check=False)
    assert (again.returncode, again.stderr.strip().splitlines()[-1]) == (2, "models:/shapes-aligned/2 is the champion already")
    kept = json.loads(next((aligned / "evaluations").glob("version-2-*/result.json")).read_text())
    assert "reward/judge" in kept
