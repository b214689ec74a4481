"""MLflow's own pages on runs as this project logs them: charts, pictures by step, the compare view, a filter."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import requests
from playwright.sync_api import expect, sync_playwright

from flowbp_ray.config import load
from flowbp_ray.tracking.run import TrackedRun

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two methods' runs: curves, and a picture of two prompts after 0, 15 and 30 steps."""
    uri, runs = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db", []
    for number, method in enumerate(("sparse", "refl")):
        config = load(ROOT / "configs" / "shapes" / f"{method}.yaml", [f"tracking.uri={uri}"])
        run = TrackedRun(uri, "shapes", method, config=config.model_dump(mode="json"))
        run.prompts("shapes", ["a red ring"], "training")
        for step in range(30):
            run.metrics({"objective": step / 10 + number, "reward/preference": 9 + step / 20}, step)
        for step in (0, 15, 30):
            for key in ("00 a red ring", "01 two blue squares"):
                run.picture(f"preview/{key}", np.full((64, 64, 3), 8 * step + number, np.uint8), step)
        run.finish("FINISHED")
        runs.append(run)
    return uri, runs


@pytest.fixture(scope="module")
def at(store):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store[0], "--port", port, "--workers", "1"]
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
    page.goto(f"{at}/#/experiments/{store[1][0].experiment_id}/runs?compareRunsMode=CHART")
    for section in ("reward", "preview"):
        expect(page.get_by_role("figure").filter(has_text=section).first).to_be_attached()
    page.get_by_role("figure").filter(has_text="preview").first.scroll_into_view_if_needed()
    chart = "xpath=ancestor::*[.//button][1]"
    page.get_by_text("preview/00").first.locator(chart).get_by_role("button").nth(1).click()
    page.get_by_role("menuitem", name="Configure").click()
    page.get_by_role("dialog").get_by_text("Show run parameters").click()
    page.get_by_role("dialog").get_by_text("preview/00").first.click()
    page.get_by_role("option", name="preview/01").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Save changes").click()
    page.get_by_text("images", exact=True).first.locator(chart).get_by_role("button").first.click()
    grid = page.get_by_role("dialog")
    for text in ("sparse", "refl", "preview/00 a red ring", "preview/01 two blue squares"):
        expect(grid.get_by_text(text)).to_be_visible()
    pictures = grid.locator("img")
    expect(pictures).to_have_count(4)
    first = pictures.first.get_attribute("src")
    thumb, number = grid.get_by_role("slider").bounding_box(), grid.locator("input").last
    page.mouse.click(number.bounding_box()["x"] - 25, thumb["y"] + thumb["height"] / 2)  # the last step's end of the slider
    expect(number).to_have_value("30")
    expect(pictures.first).not_to_have_attribute("src", first)
    expect(pictures.first).to_be_visible()


def test_the_compare_view_has_both_runs_and_what_differs(page, at, store):
    runs = [run.run_id for run in store[1]]
    page.goto(f"{at}/#/compare-runs?runs={quote(json.dumps(runs))}&experiments={quote(json.dumps([store[1][0].experiment_id]))}")
    expect(page.get_by_text("Comparing 2 Runs from 1 Experiment")).to_be_visible()
    for text in ("sparse", "refl", "surrogate.method", "reward/preference"):
        expect(page.get_by_text(text, exact=True).first).to_be_attached()


def test_runs_are_found_by_their_method(page, at, store):
    by_tag = quote("tags.method = 'refl'")
    page.goto(f"{at}/#/experiments/{store[1][0].experiment_id}/runs?searchFilter={by_tag}")
    expect(page.get_by_text("1 matching run")).to_be_visible()
    expect(page.get_by_role("link", name="refl")).to_be_visible()
