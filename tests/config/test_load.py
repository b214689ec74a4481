import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from flowbp_ray import shapes
from flowbp_ray.config import AlignConfig, dump, load

CONFIGS = Path(__file__).parents[2] / "configs"
SPARSE = CONFIGS / "shapes" / "sparse.yaml"


def reload(config, folder):
    path = folder / "dump.yaml"
    path.write_text(dump(config), encoding="utf-8")
    return load(path, [])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("shapes/*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads_and_its_dump_gives_it_again(path, tmp_path):
    config = load(path, [])
    assert reload(config, tmp_path) == config


def test_a_dump_is_complete_and_independent_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red ring\n")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    config = load(SPARSE, ["prompts.path=prompts.txt", "adapter.init_from=start", "output=runs", "model.path=./start"])
    monkeypatch.chdir("/")
    assert reload(config, tmp_path) == config
    assert config.prompts.file == tmp_path / "prompts.txt"
    assert config.adapter.init_from == tmp_path / "start"
    assert config.model.source == str(tmp_path / "start")
    assert config.output == tmp_path / "runs"
    written = yaml.safe_load(dump(config))
    assert set(written) == set(AlignConfig.model_fields)
    assert all(set(written[name]) == set(type(section).model_fields) for name, section in config if name != "output")


@given(st.text(min_size=1), st.floats(0, allow_nan=False, allow_infinity=False))
@example("\x85", 0.0)
@example("a\u2028b", 0.0)
def test_any_text_and_any_number_survives_a_dump(tmp_path_factory, text, number):
    config = load(SPARSE, [])
    tracking = config.tracking.model_copy(update={"run_name": text})
    train = config.train.model_copy(update={"velocity_penalty": number})
    config = config.model_copy(update={"tracking": tracking, "train": train})
    assert reload(config, tmp_path_factory.getbasetemp()) == config


@pytest.mark.parametrize("text", ["1e-3", "-1E+5", "null", "true", "no", "12", "2024-01-01", " ", "a: b", "#", "="])
def test_text_that_looks_like_something_else_survives_a_dump(text, tmp_path):
    config = load(SPARSE, [f"tracking.run_name='{text}'"])
    assert config.tracking.run_name == text
    assert reload(config, tmp_path) == config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=20", 20),
        ("train.learning_rate=2e-4", 2e-4),
        ("train.learning_rate=.5", 0.5),
        ("sampling.guidance_scale=4", 4.0),
        ("train.policy_lag=1", 1),
        ("train.best=reward/judge", "reward/judge"),
        ("watch.held_out_errors=null", None),
        ("train.betas=[0.8, 0.95]", (0.8, 0.95)),
        ("surrogate.active_steps=2", 2),
        ("surrogate.tail=0.5", 0.5),
        ("surrogate.tail=null", None),
        ("surrogate.tail=", None),
        ("surrogate.compensate_guidance=true", True),
        ("evaluation.before=false", False),
        ("evaluation.weights=raw", "raw"),
        ("tracking.uri=http://host:5000/?a=b", "http://host:5000/?a=b"),
        ("tracking.run_name='007'", "007"),
        ("adapter.targets=[to_q, to_k]", ("to_q", "to_k")),
        ("output=/tmp/runs", Path("/tmp/runs")),
        ("model.path=owner/name", "owner/name"),
    ],
)
def test_overrides_of_every_type(override, value):
    found = load(SPARSE, [override])
    for name in override.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_overrides_reach_into_lists_replace_sections_and_the_last_one_wins():
    betas = ["train.betas=[0.5, 0.6]", "train.betas.1=0.7", "train.betas.1=0.8"]
    config = load(SPARSE, [*betas, "reward.components.1.weight=0.25", "tracking={experiment: other}"])
    assert config.train.betas == (0.5, 0.8)
    assert [c.weight for c in config.reward.components] == [1, 0.25]
    assert config.tracking.experiment == "other"
    assert config.train.steps == load(SPARSE, []).train.steps


def test_further_files_change_settings_one_by_one(tmp_path):
    more = [tmp_path / "one.yaml", tmp_path / "other.yaml"]
    more[0].write_text("train: {steps: 9, ema: 0.5}\nadapter: null\n", encoding="utf-8")
    more[1].write_text("train: {ema: 0.25, sharded: true, velocity_penalty: 0}\n", encoding="utf-8")
    config = load(SPARSE, ["train.ema=0.125"], more)
    assert (config.train.steps, config.train.ema, config.adapter) == (9, 0.125, None)
    assert config.train.batch == load(SPARSE, []).train.batch


def test_an_empty_section_can_be_filled_from_the_command_line(tmp_path):
    (tmp_path / "bare.yaml").write_text(SPARSE.read_text() + "\ntracking:\n")
    assert load(tmp_path / "bare.yaml", ["tracking.experiment=mine"]).tracking.experiment == "mine"


def test_the_words_for_the_embedded_default():
    config = load(SPARSE, [])
    assert config.model.source == str(shapes.BASE)
    assert config.prompts.file is None
    assert [c.source for c in config.reward.components] == [str(shapes.REWARD), str(shapes.JUDGE)]
    assert config.output == Path("~/.flowbp_ray/runs").expanduser()


@pytest.mark.parametrize(
    ("kind", "file", "encoder"),
    [
        ("hpsv2", "HPS_v2.1_compressed.pt", "openai/clip-vit-large-patch14"),
        ("image_reward", "ImageReward.pt", "google-bert/bert-base-uncased"),
        ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth", "openai/clip-vit-large-patch14"),
    ],
)
def test_a_checkpoint_is_a_file_the_folder_of_it_or_a_hub_id(kind, file, encoder, tmp_path):
    (tmp_path / file).touch()
    for path, source in ((tmp_path / file, str(tmp_path / file)), (tmp_path, str(tmp_path / file)), ("owner/name", "owner/name")):
        config = load(SPARSE, [f"reward.components.0={{name: a, kind: {kind}, path: {path}, weight: 1}}"])
        component = config.reward.components[0]
        assert (component.source, component.encoder_source) == (source, encoder)
        assert component.files()[0][::2] == ("path", file)
        assert reload(config, tmp_path) == config


def test_a_function_needs_no_files():
    config = load(SPARSE, ["reward.components.0={name: a, kind: function, path: 'pack.age:name', weight: 1}"])
    assert config.reward.components[0].source == "pack.age:name"
    assert config.reward.components[0].files() == []


def test_a_configuration_travels_to_other_processes_and_stays_as_it_is():
    config = load(SPARSE, [])
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 1


def test_validation_imports_nothing_heavy():
    code = (
        "import sys; from pathlib import Path; from flowbp_ray.config import load; "
        f"load(Path({str(SPARSE)!r}), ['train.steps=1']); "
        "print(*sorted({'torch', 'ray', 'transformers', 'diffusers', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
