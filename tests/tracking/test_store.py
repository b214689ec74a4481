"""Where runs go."""

import subprocess
import sys

import pytest

from flowbp_ray.tracking.store import artifact_root, make_room, masked, tracking_uri


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "a home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "a home"


def test_the_default_is_under_home(home, monkeypatch):
    uri = tracking_uri(None)
    assert uri == f"sqlite:///{home}/.flowbp_ray/mlflow.db"
    assert not home.exists()  # until it is made room for
    make_room(uri)
    assert (home / ".flowbp_ray").is_dir()
    monkeypatch.chdir("/")
    assert tracking_uri(None) == uri
    assert artifact_root(uri) == (home / ".flowbp_ray" / "artifacts").as_uri()


def test_the_configuration_wins_over_the_environment(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(None) == "http://tracking:5000"
    assert tracking_uri("postgresql+psycopg2://user@host/db") == "postgresql+psycopg2://user@host/db"
    assert not home.exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # as unset, which is how MLflow reads it
    assert tracking_uri(None).startswith(f"sqlite:///{home}")


def test_a_configured_file_gets_its_folder_and_artifacts_beside_it(home, tmp_path):
    uri = tracking_uri(f"sqlite:///{tmp_path}/new/runs.db?timeout=30")
    make_room(uri)
    assert (tmp_path / "new").is_dir()
    assert artifact_root(uri) == (tmp_path / "new" / "artifacts").as_uri()


def test_artifacts_of_other_stores(home):
    assert artifact_root("https://tracking") is None
    assert artifact_root("mysql+pymysql://host/db") == (home / ".flowbp_ray" / "artifacts").as_uri()


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "sqlite:///./mlflow.db", "sqlite:///~/mlflow.db", "sqlite://"])
@pytest.mark.parametrize("by_environment", [False, True])
def test_a_relative_database_is_refused(home, monkeypatch, uri, by_environment):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match="depends on the working directory: write sqlite:////"):
        tracking_uri(None if by_environment else uri)


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "/tmp/mlruns", "file:mlruns", "file:///tmp/mlruns", "mlflow.db", "s3://b"])
def test_folders_are_refused(home, uri):
    with pytest.raises(ValueError, match="write sqlite:////"):
        tracking_uri(uri)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("uri: mysql://me:a/b@host/db\nother: me@host", "uri: mysql://me:***@host/db\nother: me@host"),
        ("http://host:5000/?a=b", "http://host:5000/?a=b"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("sqlite:////tmp/a:b.db", "sqlite:////tmp/a:b.db"),
    ],
)
def test_a_password_is_masked_and_nothing_else(text, shown):
    assert masked(text) == shown


def test_mlflow_is_not_loaded_to_know_the_place():
    code = "import flowbp_ray.tracking.store, sys; sys.exit(bool({'mlflow', 'torch', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
