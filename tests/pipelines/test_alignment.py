"""Which prompts are pictured along an alignment. tests/e2e has it run."""

from pathlib import Path

from flowbp_ray.config import load
from flowbp_ray.shapes.captions import TASKS, parse, task_of
from pipelines.alignment import previewed

CONFIG = load(Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml", [])


def test_previews_take_the_tasks_in_turn():
    shown = previewed(CONFIG)
    assert len(shown) == CONFIG.evaluation.preview_prompts
    assert [seed for _, seed in shown] == list(range(len(shown)))
    assert len({prompt for prompt, _ in shown}) == len(shown)
    assert [task_of(parse(prompt)) for prompt, _ in shown] == [*TASKS, *TASKS][: len(shown)]
