"""What the soak takes a process for, and its slopes; the run itself is a matter of half an hour."""

import json

import numpy as np
import pytest

from pipelines.soak import role_of, slope_of, table


@pytest.mark.parametrize(
    ("line", "role"),
    [
        ("ray::MapWorker(MapBatches(SamplerStage)).submit", "MapWorker(MapBatches(SamplerStage))"),
        ("ray::MapWorker(MapBatches(SamplerStage))", "MapWorker(MapBatches(SamplerStage))"),
        ("ray::ServeReplica:rewards-0a1b2c3d:Rewards.handle_request", "ServeReplica:rewards:Rewards"),
        ("ray::Tracker.metrics", "Tracker"),
        ("ray::Tracker", "Tracker"),
        ("/x/python -m pipelines.align /x/config.yaml", "driver"),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/x", "raylet"),
        ("bash", "other"),
    ],
)
def test_a_process_is_known_by_its_title(line, role):
    assert role_of(line) == role


def test_a_slope_has_its_error():
    steps = np.arange(100.0)
    slope, error = slope_of(steps, 3 + 0.5 * steps)
    assert slope == pytest.approx(0.5)
    assert error == pytest.approx(0, abs=1e-9)
    noise = np.random.default_rng(0).standard_normal(100)
    slope, error = slope_of(steps, noise)
    assert error == pytest.approx(1 / np.sqrt((steps - steps.mean()) @ (steps - steps.mean())), rel=0.2)
    assert abs(slope) < 4 * error
    assert np.isnan(slope_of(steps[:1], noise[:1])).all()


def test_the_table_is_of_the_second_half_and_of_roles_that_are_always_there(tmp_path):
    lines = []
    for second in range(20):
        tracker = {"MB": 100.0 + (50 - 5 * second if second < 10 else 0.1 * second), "files": 9, "processes": 1}
        lines.append({"second": 60.0 * second, "step": second, "Tracker": tracker})
    for second in (20, 21):  # after the last step: what evaluates and exports
        lines.append({"second": 60.0 * second, "step": 20, "Tracker": {"MB": 500.0, "files": 99, "processes": 1}})
    lines[3]["gone"] = {"MB": 1.0, "files": 1, "processes": 1}
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = table(tmp_path)
    assert "| Tracker | 1 | 101 | +100.0 ± 0.0 | 9 | +0.0 ± 0.0 |" in text
    assert "gone" not in text
    assert "20 steps, 19 minutes, 20 samples" in text
