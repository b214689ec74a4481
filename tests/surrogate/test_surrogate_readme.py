"""The README's code runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import flowbp_ray.surrogate

README = Path(flowbp_ray.surrogate.__file__).parent / "README.md"


def test_the_code_block_runs_and_imports_torch_and_numpy_only():
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    check = "\nimport sys\nassert not {'ray', 'mlflow', 'diffusers', 'transformers', 'pydantic'} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", block + check], capture_output=True, text=True, cwd=Path.cwd())
    assert run.returncode == 0, run.stderr
    assert "sparse, 12 steps" in run.stdout
