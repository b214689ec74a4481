"""The files for `serve run` and `serve deploy`: Ray's own schema takes them, and so does each application."""

import importlib
import inspect
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve.guard import Guarded

FILES = sorted((Path(__file__).parents[2] / "configs" / "serve").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_file_is_what_ray_and_its_applications_take(file):
    schema = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text("utf-8")))
    for application in schema.applications:
        module, _, name = application.import_path.partition(":")
        (settings,) = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
        assert isinstance(settings.annotation.model_validate(application.args), Guarded)
