"""The manifests for Kubernetes, as far as they can be checked without one."""

import re
import tomllib
from pathlib import Path

import yaml
from ray.serve.schema import ServeDeploySchema

from flowbp_ray.config import load
from pipelines import files_and_overrides
from pipelines.session import MEMORY
from serve.scoring import ServedRewards

CLUSTER = Path(__file__).parents[2] / "configs" / "cluster"
ROOT = CLUSTER.parents[1]


def read(name):
    return yaml.safe_load((CLUSTER / name).read_text("utf-8"))


def pods(cluster):
    """The pod of each group."""
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_jobs_command_is_one_that_align_takes(tmp_path):
    job = read("rayjob.yaml")
    python, m, module, *given = job["spec"]["entrypoint"].split()
    assert (python, m, module) == ("python", "-m", "pipelines.align")
    files, overrides = files_and_overrides(given)
    for name in ("prompts.txt", "evaluation.txt"):
        (tmp_path / name).write_text("a cat\n")
    (tmp_path / "embeds").mkdir()
    config = load(ROOT / files[0], [o.replace("/shared", str(tmp_path)) for o in overrides], [ROOT / f for f in files[1:]])
    assert config.output == tmp_path / "runs"
    needed = config.reserved()
    there = [pod["containers"][0]["resources"]["limits"] for pod in pods(job["spec"]["rayClusterSpec"])]
    assert needed["GPU"] <= sum(int(limits.get("nvidia.com/gpu", 0)) for limits in there)
    assert needed["CPU"] <= 1 + int(there[1]["cpu"])
    assert job["spec"]["backoffLimit"] > 0


def test_every_pod_of_the_job_sees_the_shared_folder():
    for pod in pods(read("rayjob.yaml")["spec"]["rayClusterSpec"]):
        (container,) = pod["containers"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}


def test_rays_own_schema_takes_the_service_and_so_does_the_application():
    service = read("rayservice.yaml")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = schema.applications
    assert application.import_path == "serve.scoring:build"
    ServedRewards.model_validate(application.args)
    for pod in pods(service["spec"]["rayClusterConfig"]):
        assert {e["name"] for e in pod["containers"][0]["env"]} == {"FLOWBP_TOKEN"}


def test_versions_are_the_pinned_ones():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert read("rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == pinned["ray"]
    assert read("rayservice.yaml")["spec"]["rayClusterConfig"]["rayVersion"] == pinned["ray"]


def test_the_container_file_has_all_that_is_installed_and_the_settings_of_rays_memory():
    text = (CLUSTER / "Containerfile").read_text("utf-8")
    copied = {name for names in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in names.split()}
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert copied >= {*packages, "configs", "pyproject.toml", "constraints.txt", project["project"]["readme"]}
    assert copied >= set(project["project"]["license-files"])
    (settings,) = re.findall(r"^ENV (.+)$", text, re.M)
    assert dict(setting.split("=") for setting in settings.split()) == MEMORY
    minor = ".".join(re.search(r"FROM python:(\S+)-slim", text)[1].split(".")[:2])
    assert f"Programming Language :: Python :: {minor}" in project["project"]["classifiers"]
    # Not as root, and with no token or address of a package registry in it.
    assert text.rstrip().endswith("USER ray")
    assert not re.search(r"index-url|FLOWBP_TOKEN|TOKEN=", text)
