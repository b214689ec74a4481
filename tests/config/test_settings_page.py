"""docs/settings.md is what the command prints, and has every setting."""

from pathlib import Path

from flowbp_ray.config import AlignConfig, load
from pipelines import list_settings

ROOT = Path(__file__).parents[2]


def test_the_committed_page_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["list_settings"])
    list_settings.main()
    page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    assert page == capsys.readouterr().out, "python -m pipelines.list_settings > docs/settings.md"


def test_every_setting_of_a_recipe_is_on_the_page():
    page = list_settings.page()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [f"## {name}" for name in AlignConfig.model_fields]
    for recipe in (ROOT / "configs" / "shapes").glob("*.yaml"):
        config = load(recipe, [])
        _, part = page.split(f"### surrogate.method={config.surrogate.method}\n")
        own = set(type(config.surrogate).model_fields) - {"method", "detach_negative", "compensate_guidance"}
        assert own == {
            line.split("`")[1].removeprefix("surrogate.") for line in part.split("\n#")[0].splitlines() if "| `" in line
        }
        assert all(
            f"\n| `{name}.{field}` |" in page for name, section in config if name != "output" for field in section.model_dump()
        )


def test_what_a_type_allows_and_a_default_are_said():
    rows = list_settings.page().splitlines()
    for row in (
        "| `sampling.height` | `64` | Height of a picture, in pixels; published models make multiples of 16. "
        "A whole number above 0 and a multiple of 8. |",
        "| `train.betas` | `[0.9, 0.999]` | AdamW's two decay rates, each at least 0 and below 1. A list of 2. |",
        "| `reward.components.0.deployment.cpus` | `1.0` | CPUs for each process. A number of at least 0. |",
        "| `surrogate.most` | `null` | Largest K, or null for all steps. |",
    ):
        assert row in rows
    (kind,) = [row for row in rows if row.startswith("| `surrogate.weights` | required |")]
    assert kind.endswith(" One of `euler`, `leap`, `lagrange`, `lagrange_last_leg`. |")
