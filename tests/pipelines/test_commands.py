"""The commands as a person runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(*arguments, cwd=None, **variables):
    env = os.environ | variables
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False, cwd=cwd, env=env)


@pytest.mark.parametrize("command", ["encode_prompts", "evaluate", "compare"])
def test_in_a_submitted_job_nothing_is_written_to_its_temporary_copy(command, tmp_path):
    job = json.dumps({"runtime_env": {"working_dir": "gcs://package.zip"}})
    given = [f"pipelines.{command}", str(ROOT / "configs" / "shapes" / "sparse.yaml"), "--output", "results"]
    result = run(*given, cwd=tmp_path, RAY_JOB_CONFIG_JSON_ENV_VAR=job, PYTHONPATH=str(ROOT))
    assert result.returncode == 2
    assert f"--output is {tmp_path}/results, in the temporary copy of the working directory" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["build_shapes", "show_shapes"])
def test_help_is_there(name):
    result = run(f"pipelines.{name}", "--help")
    assert result.returncode == 0
    assert "usage: python -m pipelines." in result.stdout


def test_an_unknown_stage_is_named_before_anything_starts():
    result = run("pipelines.build_shapes", "bse")
    assert result.returncode == 2
    assert "unknown stage 'bse': the stages are autoencoder, base, reward, judge, measure" in result.stderr


def test_a_stage_says_which_stage_it_needs(tmp_path):
    result = run("pipelines.build_shapes", "base", "--work", str(tmp_path))
    assert result.returncode == 1
    assert "base needs what an earlier stage makes" in result.stderr


def test_nothing_to_go_on_from_is_refused(tmp_path):
    result = run("pipelines.build_shapes", "base", "--further", "--target", str(tmp_path), "--work", str(tmp_path))
    assert result.returncode == 1
    assert "base needs what an earlier stage makes" in result.stderr
    result = run("pipelines.build_shapes", "measure", "--further")
    assert result.returncode == 2
    assert "--further is for the stages base, reward and judge" in result.stderr


def test_the_contact_sheet_of_a_missing_model_is_refused(tmp_path):
    result = run("pipelines.show_shapes", "--models", str(tmp_path))
    assert result.returncode == 1
    assert "no pipeline in" in result.stderr


def test_a_contact_sheet_by_no_known_guidance_is_refused(tmp_path):
    (tmp_path / "base").symlink_to(ROOT / "flowbp_ray" / "shapes" / "models" / "base")
    result = run("pipelines.show_shapes", "--models", str(tmp_path))
    assert result.returncode == 1
    assert "measured.json does not say the base's best guidance: give one with --guidance-scale" in result.stderr


def test_an_update_without_an_adapter_is_refused():
    full = ("adapter=null", "train.sharded=true", "train.velocity_penalty=0")
    result = run("pipelines.update_cost", str(ROOT / "configs" / "shapes" / "sparse.yaml"), *full)
    assert result.returncode == 2
    assert result.stderr.strip().endswith("trains all weights, and an adapter's update is counted: set adapter={}")
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_contact_sheet_is_written(tmp_path):
    result = run("pipelines.show_shapes", "--output", str(tmp_path / "sheet.png"))
    assert result.returncode == 0, result.stderr
    assert "attribute_binding" in result.stdout
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.width > 1000
        assert page.height > 2000
