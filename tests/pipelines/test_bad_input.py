"""Bad input in hundreds of ways: a clear sentence, exit code 2, nothing started, no traceback. tests/bad_input.py makes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REAL = 20


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """All commands and what was said of each, in one process of its own."""
    folder = tmp_path_factory.mktemp("bad")
    command = [sys.executable, "-P", str(ROOT / "tests" / "bad_input.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return json.loads(done.stdout)


def test_every_one_is_refused_with_sentences_before_anything_heavy_is_imported(validated):
    assert validated["imported"] == []
    assert len(validated["answers"]) >= 500
    for command, said in validated["answers"]:
        assert said, f"{command} was taken"
        assert "Traceback" not in said, command
        assert all(10 < len(line) < 600 for line in said.splitlines()), (command, said)


def test_as_real_commands_they_end_with_exit_code_2(validated):
    answers = validated["answers"]
    for command, said in answers[:: len(answers) // REAL][:REAL]:
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.align", *command],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        assert (done.returncode, done.stderr, done.stdout) == (2, f"{said}\n", ""), command
