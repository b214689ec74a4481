"""Results of evaluations side by side."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from flowbp_ray.config import ConfigError
from flowbp_ray.rollouts.pictures import picture_file
from flowbp_ray.shapes.captions import TASKS
from flowbp_ray.shapes.evaluation import Score
from pipelines.report import html, independent, interval, read, rendered, table, wilson, write

PROTOCOL = {"sampling": {"steps": 12}, "seed": 0}


def evaluated(folder, name, right, reward, protocol=PROTOCOL, prompt="a ring <b>"):
    number = 40 * len(TASKS)
    turn = np.tile(np.arange(40) / 40, len(TASKS))
    (folder / "pictures").mkdir(parents=True)
    (folder / "protocol.json").write_text(json.dumps({"name": name, "protocol": protocol}))
    for seed in range(number):
        Image.new("RGB", (4, 4)).save(picture_file(folder, seed))
    pictures = {
        "task": np.repeat(TASKS, 40),
        "prompt": np.array([prompt] * number),
        "seed": np.arange(number),
        "right": turn < right,
        "reason": np.where(turn < right, "right", "no ring"),
        "watermarked": turn < 0,
        "reward/preference": reward + np.linspace(-1, 1, number),
    }
    return write(folder, pictures)


@pytest.fixture
def two(tmp_path):
    return [evaluated(tmp_path / "a", "base", 0.4, 10), evaluated(tmp_path / "b", "adapter", 0.5, 10.5)]


def lines(text):
    return {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}


def test_differences_are_between_the_same_pictures(two):
    found = lines(table(two))
    assert found[""] == "| | base | adapter | adapter − base |"
    # Wilson's interval of 16 and of 20 out of 40, and what four of 40 pictures gained.
    assert found["single object"] == "| single object | 40.0 [26.3, 55.4] | 50.0 [35.2, 64.8] | +10.0 [+0.7, +19.3] |"
    assert found["reward/preference"].endswith("| +0.50 [+0.50, +0.50] |")
    assert "the same prompts and noise" in table(two)


def test_other_protocols_are_not_compared_without_saying_so(two, tmp_path):
    other = evaluated(tmp_path / "c", "other", 0.5, 10.5, PROTOCOL | {"sampling": {"steps": 20}})
    text = table([two[0], other])
    assert "**Not comparable**: the protocols differ in sampling." in text
    assert "−" not in text
    assert "Not comparable" in html([two[0], other], tmp_path)


def test_a_result_is_read_back_and_what_is_none_is_refused(two, tmp_path):
    again = read(tmp_path / "a")
    assert again.scores == two[0].scores
    assert json.loads((tmp_path / "a" / "result.json").read_text())["mean"]["value"] == pytest.approx(0.4)
    with pytest.raises(ConfigError, match="has no finished evaluation"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("right", "number", "span"),  # as in any table of Wilson's
    [(0.0, 40, (0.0, 0.0876)), (1.0, 40, (0.9124, 1.0)), (0.5, 10, (0.2366, 0.7634))],
)
def test_intervals_of_shares_stay_within_bounds_and_have_a_width_at_none_and_all(right, number, span):
    score = Score(right, (right * (1 - right) / number) ** 0.5)
    assert interval("colours", score, number) == pytest.approx(span, abs=1e-4)


def test_what_is_independent_are_pictures_and_of_geneval_prompts():
    pictures = {"task": np.array(["counting"] * 4), "prompt": np.array(["a", "a", "b", "b"])}
    assert independent(pictures, "counting") == 4
    assert independent(pictures, "watermarked") == 4
    geneval = {k: np.concatenate([v, [other]]) for (k, v), other in zip(pictures.items(), ("two_object", "c"), strict=True)}
    assert independent(geneval, "counting") == 2


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.tags = [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attributes))


def test_the_page_has_pictures_of_every_task_by_both_and_nothing_from_elsewhere(two, tmp_path):
    page, text = Page(), html(two, tmp_path / "a")
    page.feed(text)
    assert len(page.images) == 2 * 12 * len(TASKS)
    assert all((tmp_path / "a" / image["src"]).is_file() for image in page.images)
    assert all(image["alt"].startswith("a ring <b>, by ") for image in page.images)
    assert "http" not in text.partition("<details>")[0]
    assert "script" not in page.tags
    assert "b" in page.tags  # the verdicts'; of the prompt it is text
    assert "<th scope=row>single object</th><td>40.0 [26.3, 55.4]</td>" in rendered(table(two))
    assert "*" not in rendered("| | a |\n| --- | ---: |\n| **mean** | 1 |\n\nAll of **it**.\n")


@pytest.mark.parametrize(("wins", "number"), [(0, 5), (5, 5), (3, 7), (60, 100)])
def test_the_interval_is_wilsons(wins, number):
    known = binomtest(wins, number).proportion_ci(method="wilson")
    assert wilson(wins / number, number) == pytest.approx((known.low, known.high), abs=1e-6)
