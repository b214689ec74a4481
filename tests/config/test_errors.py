from pathlib import Path

import pytest

from flowbp_ray.config import ConfigError, load

GOOD = """\
model: {path: shapes}
prompts: {path: shapes}
surrogate: {method: sparse}
reward:
  components:
    - {name: preference, path: shapes/reward, weight: 1}
    - {name: judge, path: shapes/judge, weight: 0}
"""
CONFIGS = Path(__file__).parents[2] / "configs"
FIRST = "reward.components.0={name: a, weight: 1, "


def refusal(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    load(path, [])
    return path


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        # keys
        ("train.stpes=20", "train.stpes is no setting: did you mean train.steps?"),
        ("trian.steps=20", "trian is no setting: did you mean train?"),
        ("learning_rate=1", "learning_rate is no setting: did you mean train.learning_rate?"),
        ("sampling.lerning_rate=1", "sampling.lerning_rate is no setting: did you mean train.learning_rate?"),
        ("surrogate.active_step=3", "surrogate.active_step is no setting: did you mean surrogate.active_steps?"),
        ("train.late_bias=3", "train.late_bias is no setting: did you mean surrogate.late_bias?"),
        ("train.stop_ratio=3", "train.stop_ratio is no setting: train has steps, batch"),  # another method's
        ("reward.components.0.wieght=3", "reward.components.0.wieght is no setting: did you mean reward.components.0.weight?"),
        ("model.zzz=3", "model.zzz is no setting: model has path, revision, dtype"),
        ("zzz=3", "zzz is no setting: the configuration has model, prompts, sampling"),
        ("train={1: 2}", "train.1: Keys should be strings"),
        # missing
        ("model={}", "model.path is missing: a folder or Hugging Face id in diffusers' format; 'shapes' means"),
        ("surrogate={}", "surrogate.method is missing: set it to one of refl, draft_lv, drtune, leapalign, sparse, bridge, "),
        ("train.betas=[0.9]", "train.betas.1 is missing"),
        # types
        ("train.steps=ten", "train.steps must be a whole number, not 'ten'"),
        ("train.steps=2.5", "train.steps must be a whole number, not 2.5"),
        ("train.steps='20'", "train.steps must be a whole number, not '20'"),
        ("train.steps=true", "train.steps must be a whole number, not true"),
        ("train.steps=", "train.steps must be a whole number, not nothing (null)"),
        ("train.learning_rate=fast", "train.learning_rate must be a number, not 'fast'"),
        ("train.learning_rate=.inf", "train.learning_rate must be a finite number, not inf"),
        ("train.betas=0.9", "train.betas must be a list, not 0.9"),
        ("train.betas=[0.9, 0.9, 0.9]", "train.betas must be a list of at most 2, not [0.9, 0.9, 0.9]"),
        ("evaluation.before=1", "evaluation.before must be true or false, not 1"),
        ("tracking.run_name=7", "tracking.run_name must be text (in quotes if it looks like something else), not 7"),
        ("tracking.experiment=''", "tracking.experiment must be text that is not empty, not ''"),
        ("adapter.targets=to_q", "adapter.targets must be a list, not 'to_q'"),
        ("adapter.targets=[]", "adapter.targets must be a list of at least 1, not []"),
        ("train=fast", "train must be a section of settings, not 'fast'"),
        ("output=3", "output must be a path, not 3"),
        # ranges and choices
        ("train.steps=0", "train.steps must be greater than 0, not 0"),
        ("train.ema=1", "train.ema must be less than 1, not 1"),
        ("train.betas.0=1", "train.betas must be a list, not {'0': 1}"),
        ("train.velocity_penalty=-1", "train.velocity_penalty must be at least 0, not -1"),
        ("train.policy_lag=2", "train.policy_lag must be 0 or 1, not 2"),
        ("surrogate.tail=1.5", "surrogate: tail is 1.5: it must be above 0 and at most 1, or null"),
        ("surrogate.method=sparce", "surrogate.method must be one of 'refl', 'draft_lv', 'drtune', 'leapalign', 'sparse', "),
        ("sampling.height=60", "sampling.height must be a multiple of 8, not 60"),
        ("model.dtype=float16", "model.dtype must be 'float32' or 'bfloat16', not 'float16'"),
        ("reward.components.0.name=a b", "reward.components.0.name must be a name of letters, digits, _, . and -, which"),
        (
            "train.storage=/tmp/x",
            "train.storage must be a URI such as s3://bucket/folder (for a local folder set output), not '/tmp",
        ),
        ("tracking.registered_model=a/b", "tracking.registered_model must be a name without /, : and @, not 'a/b'"),
        # files
        ("model.path=shpaes", "/shpaes: did you mean 'shapes'?"),
        ("model.path=../no/such", "../no/such: give a folder, a Hugging Face id (owner/name), or shapes"),
        ("model.path=''", "model.path: '' is no local path"),
        ("reward.components.0.path=shapes/rewrad", "/shapes/rewrad: did you mean 'shapes/reward'?"),
        ("model.path=/etc", "model.path: the folder /etc has no model_index.json: name the folder that save_pretrained wrote"),
        ("reward.components.0.path=/etc", "reward.components.0.path: the folder /etc has no config.json: name the folder"),
        ("reward.components.0.kind=hps", "reward.components.0.kind must be 'clip', 'clip_score', 'hpsv2', 'image_reward', "),
        (
            "reward.components.0.kind=hpsv2",
            "/shapes/reward: give HPS_v2.1_compressed.pt, a folder that has it, or a Hugging Face",
        ),
        (f"{FIRST}kind: image_reward, path: /etc}}", "reward.components.0.path: the folder /etc has no ImageReward.pt: name a"),
        (
            f"{FIRST}kind: aesthetic, path: /no/such.pth}}",
            "reward.components.0.path: there is no file /no/such.pth: give sac+logos",
        ),
        (
            f"{FIRST}kind: function, path: score}}",
            "reward.components.0.path: 'score' is no import path: write package.module:name",
        ),
        (
            f"{FIRST}kind: function, path: 'a:b', encoder: c/d}}",
            "reward.components.0.encoder: a function has none: set it to null",
        ),
        (
            f"{FIRST}path: shapes/reward, encoder: /etc}}",
            "reward.components.0.encoder: the folder /etc has no tokenizer_config.json",
        ),
        (
            f"{FIRST}path: shapes/reward, encoder: /no/such}}",
            "there is no model folder /no/such: give a folder, a Hugging Face id",
        ),
        ("prompts.path=/no/such.txt", "prompts.path: there is no file /no/such.txt; 'shapes' means"),
        ("adapter.init_from=/no/such", "adapter.init_from: there is no folder /no/such"),
        ("output=/etc/passwd", "output: /etc/passwd is a file: name a folder"),
        ("output=~nobody_here/runs", "output: '~nobody_here/runs': there is no such home folder"),
        ("output=s3://bucket/runs", "output: 's3://bucket/runs' is no local path"),
        ("tracking.uri=sqlite:///mlflow.db", "tracking.uri: 'sqlite:///mlflow.db' depends on the working directory"),
        ("tracking.uri=/tmp/mlruns", "tracking.uri: '/tmp/mlruns' is no tracking URI for MLflow 3"),
        ("tracking.uri=mongodb://me:secret@host/db", "tracking.uri: 'mongodb://me:***@host/db' is no tracking URI"),
        (f"output=/{300 * 'a'}", "aaa cannot be read: File name too long"),
        # contradictions
        ("train.batch=24", "train.batch is 24, no multiple of train.micro_batch × train.workers = 16 × 1 = 16"),
        ("train.workers=3", "train.batch is 32, no multiple of train.micro_batch × train.workers = 16 × 3 = 48"),
        ("sampling.steps=3", "surrogate does not go with sampling.steps = 3: active_steps is 4: it must be at most 3"),
        ("surrogate.tail=0.2", "surrogate does not go with sampling.steps = 12: active_steps is 4: it must be at most 3"),
        ("model.revision=v2", "model.revision is 'v2' but model.path is shapes, which is on this machine"),
        ("adapter={targets: [attn.to_q], init_from: /etc}", "adapter.targets is given together with adapter.init_from"),
        (
            "sampling.width=128",
            "sampling.height × sampling.width is 64 × 128: the evaluation's checker reads 64×64 pictures only",
        ),
        ("adapter=null", "adapter is null, so all weights are trained, and train.sharded is false: set train.sharded to true"),
        ("adapter={rank: 0}", "adapter.rank must be greater than 0, not 0"),
        ("train.unsharded_gradients=true", "train.unsharded_gradients is true, but train.sharded is false"),
        (
            "train.best=reward/juge",
            "train.best is 'reward/juge', which is no metric that checkpoints have: did you mean reward/judge?",
        ),
        ("train.best=zzz", "checkpoints have: set it to one of objective, reward/preference, reward/judge, or to null"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints must be greater than 0, not 0"),
        ("watch.window=2", "watch.window must be at least 3, not 2"),
        ("watch.diversity_fraction=1", "watch.diversity_fraction must be less than 1, not 1"),
        ("watch.stopp=true", "watch.stopp is no setting: did you mean watch.stop?"),
        ("reward.components.0.weight=0", "reward.components: no component has a weight above 0"),
        ("reward.components.1.name=preference", "reward.components: 'preference' is the name of two components"),
        ("reward.components=[]", "reward.components: the list is empty: give it a component, with name, path and weight"),
        # overrides themselves
        ("train.steps", "'train.steps' is no override: write section.setting=value"),
        ("train..steps=3", "'train..steps=3' is no override"),
        ("train.betas=[0.9", "'train.betas=[0.9', line 1: invalid YAML: "),
        ("tracking.run_name=2024-13-45", "'tracking.run_name=2024-13-45': invalid YAML: month must be in 1..12"),
        ("model.path.x=3", "'model.path.x=3': x cannot be set inside 'shapes', which is a value and not a section"),
        (
            "reward.components.2.weight=1",
            "'reward.components.2.weight=1': reward.components is a list: write reward.components.0 (preference) or reward.",
        ),
        ("reward.components.judge.weight=1", "is a list: write reward.components.0 (preference) or reward.components.1 (judge)"),
    ],
)
def test_a_bad_override_is_one_sentence(good, override, sentence):
    message = refusal(good, override)
    assert sentence in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "",
            "model is missing: set model.path\nprompts is missing: set prompts.path\nsurrogate.method is missing",
        ),
        ("just words", "has to consist of sections such as 'train:'"),
        ("- a\n- b", "has to consist of sections such as 'train:'"),
        ("model:\n  path: shapes\n bad: [", "bad.yaml, line 3: invalid YAML: "),
        ("model:\n\tpath: shapes", "bad.yaml, line 2: invalid YAML: found character '\\t'"),
        ("model:\n  path: shapes\n  path: other", "bad.yaml, line 3: invalid YAML: the key path appears twice"),
        ("a: !!python/object:os.system {}", "bad.yaml, line 1: invalid YAML: could not determine a constructor"),
        ("a: \x00", "bad.yaml: invalid YAML: "),
        (GOOD + "train:\n", "train must be a section of settings, not nothing (null)"),
        (b"a: \xff\xfe", "bad.yaml is not text in UTF-8"),
    ],
)
def test_a_bad_file_says_where(tmp_path, text, sentence):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert sentence in refusal(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert refusal(tmp_path / "no.yaml") == f"there is no configuration {tmp_path / 'no.yaml'}"
    assert refusal(tmp_path) == f"{tmp_path} is a folder: name a file in it (it has no .yaml files)"
    for name in ("b.yaml", "a.yml", "c.txt"):
        (tmp_path / name).touch()
    assert refusal(tmp_path) == f"{tmp_path} is a folder: name a file in it (a.yml, b.yaml)"


def test_a_file_of_changes_alone_is_said_to_come_after_a_recipe(tmp_path):
    said = refusal(CONFIGS / "placement" / "gpu48.yaml").splitlines()[2]
    assert said.startswith("surrogate.method is missing: set it to one of refl, draft_lv, drtune, leapalign, sparse, ")
    assert said.endswith(
        "composed; placements and other files of changes come after a recipe, such as configs/shapes/sparse.yaml"
    )
    (tmp_path / "recipe.yaml").write_text("model: {path: shapes}")
    assert "recipe" not in refusal(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("file", [*CONFIGS.glob("serve/*.yaml"), *CONFIGS.glob("cluster/*.yaml")], ids=lambda p: p.stem)
def test_a_file_for_serve_or_kubernetes_is_told_from_a_configuration(file):
    what, command = ("Ray Serve", "serve run") if file.parent.name == "serve" else ("Kubernetes", "kubectl apply -f")
    message = refusal(file)
    assert message.startswith(f"{file} is for {what} (it has ")
    assert message.endswith(f"), and no configuration: start it by {command} {file}")


@pytest.mark.parametrize("setting", ["prompts.path", "evaluation.prompts"])
def test_a_table_is_no_file_of_prompts(good, tmp_path, setting):
    for name in ("p.csv", "p.TSV", "p.parquet", "p.yaml", "p.xlsx"):
        file = tmp_path / name
        file.write_text("prompt\na red ring\n")
        said = f"{setting}: prompts are not read from {file.suffix} files such as {file}: name a .txt, .jsonl or .json file"
        assert refusal(good, f"{setting}={file}") == said
    for name in ("p", "p.md", "p.txt", "p.v2", "p.jsonl", "p.json"):
        (tmp_path / name).touch()
        load(good, [f"{setting}={tmp_path / name}"])


def test_another_methods_settings_are_said_to_be_that_methods(good):
    has = "drtune has detach_negative, compensate_guidance, active_steps, stop_ratio: remove it"
    assert refusal(good, "surrogate={method: drtune, rescale: 0.5, support_scale: 1}").splitlines() == [
        f"surrogate.rescale belongs to sparse, bridge, lagrange, composed; {has}",
        f"surrogate.support_scale belongs to lagrange, composed; {has}",
    ]


def test_all_that_is_wrong_is_said_at_once(good):
    assert len(refusal(good, "train.steps=-1", "sampling.height=x", "zzz=1").splitlines()) == 3
    assert len(refusal(good, "train.batch=20", "sampling.steps=2", "model.revision=x").splitlines()) == 3


def test_two_train_workers_are_never_on_one_gpu(good):
    message = refusal(good, "train.workers=2", "train.batch=32", "cluster.trainer_gpus=0.5")
    assert message.startswith("cluster.trainer_gpus is 0.5 and train.workers 2: Ray fills one GPU before it takes the next")


def test_guidance_that_is_off_cannot_be_compensated(good):
    message = refusal(good, "surrogate.compensate_guidance=true", "sampling.guidance_scale=1")
    assert message.startswith("surrogate.compensate_guidance is true but at sampling.guidance_scale 1.0 there is no guidance")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("{method: lagrange, order: x}", "surrogate.order must be a whole number, not 'x'"),
        ("{method: sparse, order: 3}", "surrogate.order belongs to lagrange, composed; sparse has"),
        ("{method: lagrange, ordre: 3}", "surrogate.ordre is no setting: did you mean surrogate.order?"),
        ("{method: bridge, pair: {rul: uniform}}", "surrogate.pair.rul is no setting: did you mean surrogate.pair.rule?"),
        ("{method: bridge, pair: {cap: 0}}", "surrogate.pair: cap is 0: it must be a whole number of at least 1"),
        ("{method: truncated}", "surrogate.active_steps is missing"),
        (
            "{method: composed, reward_input: sampled, active: late_biased, weights: lagrange, bridge: drawn}",
            "surrogate: active (with weights lagrange) is 'late_biased': it must be one of start, midpoint, all",
        ),
    ],
)
def test_sentences_about_a_choice_of_methods_leave_pydantics_tags_out(good, settings, sentence):
    assert refusal(good, f"surrogate={settings}").startswith(sentence)


def test_a_clip_without_a_tokenizer_needs_one(good, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    message = refusal(good, f"reward.components.0.path={tmp_path}")
    assert message.startswith(f"reward.components.0.encoder: the folder {tmp_path} has no tokenizer_config.json")
    assert load(good, [f"{FIRST}path: {tmp_path}, encoder: owner/name}}"]).reward.components[0].encoder_source == "owner/name"
