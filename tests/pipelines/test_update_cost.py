"""What an update costs on the embedded model, as counts."""

import re
import subprocess
import sys

import pytest
from PIL import Image

pytestmark = pytest.mark.slow  # a minute of whole graphs


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    plot = tmp_path_factory.mktemp("cost") / "plot.png"
    command = [
        sys.executable,
        "-m",
        "pipelines.update_cost",
        "sampling.guidance_scale=2",
        "--samples",
        "1",
        "--steps",
        "8",
        "--output",
        str(plot),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout, plot


def test_memory_is_flat_the_whole_graph_linear_and_the_work_one_velocity_a_step(result):
    rows = {
        int(k): (float(walk), float(whole), float(flops))
        for k, walk, whole, flops in re.findall(r"^\| (\d+) \| ([\d.]+) MiB \| ([\d.]+) MiB \| ([\d.]+) \|$", result[0], re.M)
    }
    assert {1, 2, 8} <= set(rows)
    graph = rows[2][1] - rows[1][1]  # of one velocity more
    assert graph > 0.8 * rows[1][1]
    for number, (walk, whole, flops) in rows.items():
        assert walk == pytest.approx(rows[1][0], rel=0.02)
        assert whole == pytest.approx(rows[1][1] + (number - 1) * graph, rel=0.02)
        assert flops == pytest.approx(1, rel=0.01)


def test_the_exact_gradient_costs_no_more_memory(result):
    (exact,) = re.findall(r"Exact .*: ([\d.]+) MiB", result[0])
    (one,) = re.findall(r"^\| 1 \| ([\d.]+) MiB", result[0], re.M)
    assert float(exact) == pytest.approx(float(one), rel=0.05)


def test_both_curves_are_drawn(result):
    with Image.open(result[1]) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(0xB3, 0x26, 0x1E), (0x14, 0x6C, 0x2E)} <= colours
