"""Which run a command goes on with; tests/e2e has runs go on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flowbp_ray.config import ConfigError, load
from pipelines import runs
from pipelines.align import arguments, checked, chosen

BASE = Path(__file__).parents[2] / "flowbp_ray" / "shapes" / "models" / "base"
SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


def configured(folder, *overrides):
    return load(SPARSE, [f"output={folder}", *overrides])


def folder_of(output, *overrides):
    """Which folder the command would work in."""
    return checked(arguments([str(SPARSE), f"output={output}", *overrides]))[2]


def begun(config, name):
    folder = config.output / name
    runs.begin(config, folder, None)
    return folder


def listing(version):
    return json.dumps({"latest_checkpoint_result": {"checkpoint_dir_name": f"c{version}", "metrics": {"version": version}}})


def test_the_newest_unfinished_run_of_the_configuration_goes_on(tmp_path):
    config = configured(tmp_path)
    assert chosen(config, None, False) is None
    assert folder_of(tmp_path).parent == tmp_path
    assert not list(tmp_path.iterdir())
    older, newer = begun(config, "1"), begun(config, "2")
    begun(configured(tmp_path, "train.steps=7"), "3")
    (tmp_path / "4").mkdir()
    assert chosen(config, None, False) == newer
    runs.finished(newer)
    assert chosen(config, None, False) == older
    assert chosen(config, None, True) is None
    assert chosen(config, newer, False) == newer


@pytest.mark.parametrize(
    "setting",
    [
        "cluster.samplers=3",
        "cluster.threads=2",
        "train.workers=2",
        "train.micro_batch=3",
        "train.checkpoint_every=7",
        "watch.stop=true",
        "reward.components.1.deployment={replicas: 2}",
        "reward.application=rewards",
    ],
)
def test_what_does_not_change_what_is_learned_may_be_other(tmp_path, setting):
    folder = begun(configured(tmp_path), "1")
    assert chosen(configured(tmp_path, setting), None, False) == folder


def test_a_judges_server_may_be_elsewhere(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")

    def served(url):
        judge = f"evaluation.unified_reward={{url: {url}/v1}}"
        return configured(tmp_path / "runs", f"evaluation.prompts={tmp_path}/prompts.txt", judge)

    folder = begun(served("http://one"), "1")
    assert chosen(served("http://other"), None, False) == folder


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.learning_rate=1e-3", "train.learning_rate is 0.001, there 0.0005"),
        ("surrogate.active_steps=5", "surrogate.active_steps is 5, there 4"),
        ("reward.components.1.weight=2", "reward.components.1.weight is 2.0, there 0.0"),
        ("train.policy_lag=0", "train.policy_lag is 0, there 1"),
        ("tracking.run_name=mine", "tracking.run_name is 'mine', there None"),
    ],
)
def test_a_run_of_another_configuration_is_not_gone_on_with_and_the_settings_are_named(tmp_path, setting, said):
    folder = begun(configured(tmp_path), "1")
    assert folder_of(tmp_path, setting) != folder
    with pytest.raises(ConfigError, match=said):
        folder_of(tmp_path, setting, "--resume", str(folder))


def test_a_named_run_gets_more_steps_but_not_fewer_than_it_has(tmp_path):
    folder = begun(configured(tmp_path), "1")
    (folder / runs.LIST).write_text(listing(40))
    runs.finished(folder)
    assert folder_of(tmp_path, "train.steps=90", "--resume", str(folder)) == folder
    runs.begin(configured(tmp_path, "train.steps=90"), folder, None)
    assert load(folder / runs.CONFIG, []).train.steps == 90
    assert chosen(configured(tmp_path, "train.steps=90"), None, False) == folder  # if that is interrupted
    with pytest.raises(ConfigError, match=r"has 40 steps, more than train\.steps, which is 30"):
        folder_of(tmp_path, "train.steps=30", "--resume", str(folder))


def test_a_command_that_is_refused_leaves_a_run_that_is_going_on_as_it_is(tmp_path):
    config = configured(tmp_path)
    folder = begun(config, "1")
    with runs.alone(folder), pytest.raises(ConfigError, match="is going on in another process"):
        runs.begin(configured(tmp_path, "train.steps=90"), folder, None)
    assert chosen(config, None, False) == folder


def test_a_run_goes_on_by_its_own_configuration_where_none_is_named(tmp_path):
    config = configured(tmp_path, "train.learning_rate=1e-3")
    folder = begun(config, "1")
    found = checked(arguments(["--resume", str(folder), "train.steps=90"]))
    assert (found[0].train.learning_rate, found[0].train.steps, found[2]) == (1e-3, 90, folder)


def test_other_prompts_are_found_out(tmp_path):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a cat\n")
    config = configured(tmp_path / "runs", f"prompts.path={prompts}")
    folder = begun(config, "1")
    runs.begin(config, folder, None)
    prompts.write_text("a dog\n")
    assert chosen(config, None, False) is None
    with pytest.raises(ConfigError, match=r"the prompts of .*mine\.txt are others than when the run in .* began"):
        runs.begin(config, folder, None)


def test_another_model_in_the_same_folder_is_found_out(tmp_path):
    model = shutil.copytree(BASE, tmp_path / "model")
    config = configured(tmp_path / "runs", f"model.path={model}")
    folder = begun(config, "1")
    assert chosen(config, None, False) == folder
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[2**15] ^= 1
    weights.write_bytes(content)
    assert chosen(config, None, False) is None
    with pytest.raises(ConfigError, match=r"the weights in .*model are others than when the run in .* began"):
        runs.begin(config, folder, None)


def test_the_same_prompts_may_lie_elsewhere(tmp_path):
    """As in the temporary copies that jobs work in."""
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("a cat\n")
        config = configured(tmp_path / "runs", f"prompts.path={tmp_path / name / 'mine.txt'}")
        found.append(chosen(config, None, False) or begun(config, "1"))
    assert found[0] == found[1]


def test_a_run_goes_on_with_the_commit_that_it_began_with(tmp_path):
    asked = configured(tmp_path, "model.path=owner/model", "model.revision=main")
    commit = asked.model_copy(update={"model": asked.model.model_copy(update={"revision": "0123abcd"})})
    folder = tmp_path / "1"
    runs.begin(commit, folder, "main")
    assert chosen(asked, None, False) == folder
    assert runs.as_begun(asked, folder).model.revision == "0123abcd"
    other = configured(tmp_path, "model.path=owner/model", "model.revision=v2")
    assert chosen(other, None, False) is None
    with pytest.raises(ConfigError, match=r"model\.revision is 'v2', and 'main' of the run in"):
        runs.as_begun(other, folder)


def test_no_password_is_kept_or_said_and_a_new_one_is_the_same_run(tmp_path):
    def uri(password):
        return configured(tmp_path, f"tracking.uri=postgresql://me:{password}@host/db")

    folder = begun(uri("secret"), "1")
    assert "secret" not in (folder / runs.CONFIG).read_text()
    assert chosen(uri("other"), None, False) == folder
    assert runs.differing(uri("other"), folder) == {}


def test_a_new_run_takes_no_other_ones_checkpoints(tmp_path):
    config = configured(tmp_path / "runs", f"train.storage=file://{tmp_path}/bucket")
    (tmp_path / "bucket" / "1").mkdir(parents=True)
    (tmp_path / "bucket" / "1" / runs.LIST).write_text(listing(5))
    with pytest.raises(ConfigError, match=r"bucket/1/c5 is another run's: give this one another train\.storage, or its folder"):
        begun(config, "1")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no run that could go on: it has no run\.json"):
        chosen(configured(tmp_path), tmp_path, False)


def test_one_process_works_in_a_folder_and_frees_it_however_it_ends(tmp_path):
    with runs.alone(tmp_path), pytest.raises(ConfigError, match="is going on in another process"), runs.alone(tmp_path):
        pass
    program = "import sys, time; from pathlib import Path; from pipelines.runs import alone\n"
    program += "with alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="is going on"), runs.alone(tmp_path):
            pass
        other.kill()
        other.wait()
        with runs.alone(tmp_path):
            pass


def test_the_newest_checkpoint_is_the_listed_one_and_a_torn_list_is_mended(tmp_path):
    config = configured(tmp_path)
    kept = runs.Kept(config, begun(config, "1"))
    assert kept.newest is None
    kept.mend()
    listed = tmp_path / "1" / runs.LIST
    listed.write_text(listing(10)[:30])
    assert kept.steps == 0
    kept.mend()
    assert not listed.exists()
    listed.write_text(listing(10))
    kept.copy()
    assert kept.newest == (f"{tmp_path}/1/c10", 10)
    listed.write_text(listing(20)[:30])
    kept.copy()
    assert kept.newest == (f"{tmp_path}/1/c10", 10)
    kept.mend()
    assert json.loads(listed.read_text())["latest_checkpoint_result"]["metrics"]["version"] == 10
    listed.write_text(listing(20))
    assert kept.steps == 20


def test_checkpoints_elsewhere_are_found_by_their_uri(tmp_path):
    config = configured(tmp_path / "runs", f"train.storage=file://{tmp_path}/bucket")
    kept = runs.Kept(config, begun(config, "1"))
    assert kept.newest is None
    (tmp_path / "bucket" / "1").mkdir(parents=True)
    (tmp_path / "bucket" / "1" / runs.LIST).write_text(listing(5))
    assert kept.newest == (f"file://{tmp_path}/bucket/1/c5", 5)


@pytest.mark.parametrize(
    ("storage", "error", "said"),
    [
        (
            "nothing://me:secret@host",
            ConfigError,
            r"^train\.storage, nothing://me:\*\*\*@host, cannot be used: Unrecognized f",
        ),
        (
            "s3://me:secret@host/runs?endpoint_override=127.0.0.1:1&scheme=http",
            OSError,
            r"^the checkpoints in s3://me:\*\*\*@host/runs/1 cannot be read: .*Could not connect to server",
        ),
    ],
)
def test_storage_that_cannot_be_had_is_named_without_its_password(tmp_path, storage, error, said):
    with pytest.raises(error, match=said) as caught:
        _ = runs.Kept(configured(tmp_path, f"train.storage={storage}"), tmp_path / "1").steps
    assert "secret" not in str(caught.value)
