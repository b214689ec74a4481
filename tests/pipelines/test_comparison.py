"""The comparison's figures: blocks, tables, pictures and what is finished."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from flowbp_ray.backbones.grids import shifted_grid
from flowbp_ray.config import load
from flowbp_ray.shapes.captions import TASKS
from pipelines.comparison import Measured, chart, evaluations, grid, read, summary, table

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


def cell(method, seed, mean, reward=10.0, error=0.02):
    values = dict.fromkeys(TASKS, mean) | {"mean": mean, "reward/preference": reward, "watermarked": 0.5}
    return Measured(method, seed, values, dict.fromkeys(values, error), 1.5, 24.0, 4.0)


def test_a_seed_s_own_level_is_no_error():
    cells = [cell(m, s, mean + level) for m, mean in (("a", 0.5), ("b", 0.6)) for s, level in enumerate((0.0, 0.1, -0.2))]
    of = summary(cells, "mean")
    assert of.means["b"] - of.means["a"] == pytest.approx(0.1)
    assert of.error == pytest.approx(0, abs=1e-9)


def test_the_error_is_that_of_a_two_way_layout():
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 0.1, (4, 3))
    of = summary([cell(f"m{i}", s, values[i, s]) for i in range(4) for s in range(3)], "mean")
    # Against least squares: what no method's and no seed's constant explains.
    design = np.zeros((12, 7))
    for i in range(4):
        for s in range(3):
            design[3 * i + s, [i, 4 + s]] = 1
    rest = np.linalg.lstsq(design, values.ravel(), rcond=None)[1]
    rest = rest if rest.size else ((values.ravel() - design @ np.linalg.pinv(design) @ values.ravel()) ** 2).sum()
    assert of.error == pytest.approx(float(np.sqrt(rest / 6 / 3)))
    assert of.resolved == pytest.approx(stats.t.ppf(0.975, 6) * np.sqrt(2) * of.error)


def test_one_seed_has_the_error_of_its_pictures():
    of = summary([cell("a", 0, 0.5, error=0.03), cell("b", 0, 0.6, error=0.02)], "mean")
    assert of.error == pytest.approx(0.03)


def test_the_table_says_what_is_resolved():
    small = np.array([0.001, -0.001, 0.0])
    cells = [cell("base", s, 0.4, 9.0) for s in range(3)]
    cells += [cell("far", s, 0.6 + small[s], 10 + 5 * small[s]) for s in range(3)]
    cells += [cell("near", s, 0.4005 - small[s], 9.0) for s in range(3)]
    text = table(cells, "What they are.")
    assert "| far | 10.00 |" in text
    assert "| base | 9.00 | 40.0 |" in text
    (mean,) = (line for line in text.splitlines() if line.startswith("- mean of the tasks"))
    assert text.splitlines()[-1].endswith(
        "watermarked: differences over 0.00 are resolved (two-sided 5 %, not corrected for the pairs): none"
    )
    assert "far > near; far > base" in mean
    assert "near > base" not in mean


def test_a_finished_cell_is_read_and_one_of_another_configuration_is_refused(tmp_path):
    file, one = tmp_path / "a-0.json", cell("a", 0, 0.5)
    assert read(file, "settings") is None
    one.save(file, "settings")
    assert read(file, "settings") == one
    with pytest.raises(ValueError, match=r"a-0\.json was measured with another configuration"):
        read(file, "others")


def test_evaluations_are_counted_by_branch():
    sigmas = shifted_grid(12, 3.0)
    config = load(SPARSE, ["train.steps=3", "surrogate.active_steps=4", "train.batch=48"])
    assert evaluations(config, sigmas) == (24.0, 4.0)
    attached = load(SPARSE, ["train.steps=3", "surrogate.active_steps=4", "surrogate.detach_negative=false", "train.batch=48"])
    assert evaluations(attached, sigmas) == (24.0, 8.0)
    plain = load(SPARSE, ["train.steps=3", "surrogate.active_steps=4", "sampling.guidance_scale=1", "train.batch=48"])
    assert evaluations(plain, sigmas) == (12.0, 4.0)


def test_chart_and_pictures_are_drawn(tmp_path):
    cells = [cell(m, s, v, 10 + v) for m, v in (("base", 0.4), ("sparse", 0.5), ("refl", 0.45)) for s in range(2)]
    chart(cells, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert (0x4C, 0x72, 0xB0) in set(picture.convert("RGB").get_flattened_data())  # the bars
    page = grid(["a red ring", "a blue circle"], {m: np.full((2, 64, 64, 3), 250, np.uint8) for m in ("base", "sparse")})
    assert page.width > 256
