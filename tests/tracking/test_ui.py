"""MLflow's own pages on runs as this project logs them: charts, pictures by step, the compare view, a filter."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest
import requests
from mlflow import MlflowClient
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.drill


STEPS = 4
SMALL = (
    f"train.steps={STEPS}",
    "train.batch=4",
    "train.micro_batch=4",
    "sampling.steps=4",
    "evaluation.per_task=1",
    "evaluation.before=false",
    "evaluation.preview_every=2",
    "evaluation.preview_prompts=2",
    "tracking.experiment=shapes",
    "cluster.samplers=1",
)


class Store(NamedTuple):
    """What two alignments left: MLflow's URI, the experiment, the runs by name, and the pictures' keys."""

    uri: str
    experiment: str
    runs: dict[str, str]
    keys: list[str]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The store of two short alignments, made by the command that `make demo` gives."""
    folder = tmp_path_factory.mktemp("store")
    uri, runs = f"sqlite:///{folder}/mlflow.db", {}
    for method, active in (("sparse", ["surrogate.active_steps=2"]), ("refl", ["surrogate.last_n_steps=2"])):
        given = [*SMALL, *active, f"tracking.uri={uri}", f"output={folder}/runs", f"tracking.run_name={method}"]
        command = [sys.executable, "-m", "pipelines.align", f"configs/shapes/{method}.yaml", *given]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("shapes").experiment_id
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment])}
    assert set(runs) == {"sparse", "refl"}
    keys = sorted({f.path.rpartition("/")[2].partition("+")[0] for f in client.list_artifacts(runs["sparse"], "images")})
    return Store(uri, experiment, runs, [key.removeprefix("preview~") for key in keys])


@pytest.fixture(scope="module")
def at(store):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store.uri, "--port", port, "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(120):
                assert server.poll() is None
                try:
                    if requests.get(f"http://127.0.0.1:{port}/health", timeout=10).ok:
                        break
                except requests.ConnectionError:
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def page(at):
    if CHROMIUM is None:
        pytest.fail("there is no chromium on PATH: install it (Debian's package is chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"])
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        yield page
        expect.set_options(timeout=5_000)


def test_charts_have_curves_and_pictures_by_step(page, at, store):
    """As the README of flowbp_ray/tracking says it."""
    page.goto(f"{at}/#/experiments/{store.experiment}/runs?compareRunsMode=CHART")
    for section in ("reward", "preview"):
        expect(page.get_by_role("figure").filter(has_text=section).first).to_be_attached()
    page.get_by_role("figure").filter(has_text="preview").first.scroll_into_view_if_needed()
    chart = "xpath=ancestor::*[.//button][1]"
    first_key, second_key = store.keys
    page.get_by_text(f"preview/{first_key}").first.locator(chart).get_by_role("button").nth(1).click()
    page.get_by_role("menuitem", name="Configure").click()
    page.get_by_role("dialog").get_by_text("Show run parameters").click()
    page.get_by_role("dialog").get_by_text(f"preview/{first_key}").first.click()
    page.get_by_role("option", name=f"preview/{second_key}").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Save changes").click()
    page.get_by_text("images", exact=True).first.locator(chart).get_by_role("button").first.click()
    grid = page.get_by_role("dialog")
    for text in ("sparse", "refl", f"preview/{first_key}", f"preview/{second_key}"):
        expect(grid.get_by_text(text)).to_be_visible()
    pictures = grid.locator("img")
    expect(pictures).to_have_count(4)
    first = pictures.first.get_attribute("src")
    thumb, number = grid.get_by_role("slider").bounding_box(), grid.locator("input").last
    page.mouse.click(number.bounding_box()["x"] - 25, thumb["y"] + thumb["height"] / 2)  # the last step's end of the slider
    expect(number).to_have_value(str(STEPS))
    expect(pictures.first).not_to_have_attribute("src", first)
    expect(pictures.first).to_be_visible()


def test_the_compare_view_has_both_runs_and_what_differs(page, at, store):
    runs = [store.runs[name] for name in ("sparse", "refl")]
    page.goto(f"{at}/#/compare-runs?runs={quote(json.dumps(runs))}&experiments={quote(json.dumps([store.experiment]))}")
    expect(page.get_by_text("Comparing 2 Runs from 1 Experiment")).to_be_visible()
    for text in ("sparse", "refl", "surrogate.method", "eval/aligned/mean"):  # of metrics the first ones, until it is scrolled
        expect(page.get_by_text(text, exact=True).first).to_be_attached()


def test_runs_are_found_by_their_method(page, at, store):
    by_tag = quote("tags.method = 'refl'")
    page.goto(f"{at}/#/experiments/{store.experiment}/runs?searchFilter={by_tag}")
    expect(page.get_by_text("1 matching run")).to_be_visible()
    expect(page.get_by_role("link", name="refl")).to_be_visible()
