"""Which MLflow store a run goes to: a place that is the same whatever directory the process works in."""

import os
import re
from pathlib import Path

#: MLflow's databases, and its servers.
DATABASES, SERVERS = ("sqlite", "postgresql", "mysql", "mssql"), ("http", "https")


def tracking_uri(configured: str | None) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else a SQLite file in ~/.flowbp_ray.

    ValueError for one that depends on the working directory or that MLflow cannot keep these runs in.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_home() / 'mlflow.db'}"
    scheme = _scheme(uri)
    if scheme not in DATABASES + SERVERS:
        raise ValueError(
            f"{masked(uri)!r} is no tracking URI for MLflow 3, which no longer keeps runs in folders: "
            "write sqlite:////absolute/path.db, another database's URI, or a server's http(s) address"
        )
    if scheme == "sqlite" and not _database(uri).is_absolute():
        raise ValueError(f"{uri!r} depends on the working directory: write sqlite://// and an absolute path")
    return uri


def check_server(configured: str | None) -> None:
    """OSError if the tracking URI is a server's, and that does not answer, or refuses."""
    uri = tracking_uri(configured)
    if _scheme(uri) not in SERVERS:
        return
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    asked = {"json": {"max_results": 1}, "max_retries": 0, "timeout": 10, "raise_on_status": False}
    try:  # as MLflow itself asks, with passwords, certificates and tokens; /health answers those too who are refused
        answer = http_request(get_default_host_creds(uri), "/api/2.0/mlflow/experiments/search", "POST", **asked)
    except (MlflowException, OSError) as error:
        why = masked(str(error).splitlines()[0])
        raise OSError(f"the MLflow server {masked(uri)} does not answer ({why}): start it, or set tracking.uri") from None
    if answer.status_code >= 400:
        why = (answer.text.splitlines() or [""])[0][:200]
        raise OSError(
            f"the MLflow server {masked(uri)} refuses ({answer.status_code} {why}): start it with this name among its "
            "--allowed-hosts, give the password that it asks for, or set tracking.uri"
        )


def wait_less() -> None:
    """Have MLflow give up on a server that does not answer, unless the environment says otherwise: by itself it goes on for
    minutes, in which nothing else is done."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def masked(text: str) -> str:
    """The text with ``***`` for the password of every URI in it, such as ``postgresql://me:***@host/db``."""
    return re.sub(r"(://[^/@:\s]*):[^@\s]*@", r"\1:***@", text)


def is_there(uri: str) -> bool:
    """False where a SQLite file is not there yet."""
    return _scheme(uri) != "sqlite" or _database(uri).exists()


def make_room(uri: str) -> None:
    """Make the folder of a SQLite file, which SQLite does not; OSError if it cannot be made."""
    if _scheme(uri) == "sqlite":
        _database(uri).parent.mkdir(parents=True, exist_ok=True)


def artifact_root(uri: str) -> str | None:
    """The ``file://`` URI of the folder for a new experiment's artifacts; None where a server has its own.

    It is ``artifacts`` beside a SQLite file, ~/.flowbp_ray/artifacts for another database: left to itself, MLflow takes
    ``mlruns`` in the working directory.
    """
    scheme = _scheme(uri)
    if scheme in SERVERS:
        return None
    return ((_database(uri).parent if scheme == "sqlite" else _home()) / "artifacts").as_uri()


def _home() -> Path:
    return Path.home() / ".flowbp_ray"


def _scheme(uri: str) -> str:
    """``sqlite`` of ``sqlite+pysqlite:////…``; empty if there is none."""
    before, found, _ = uri.partition("://")
    return before.partition("+")[0] if found else ""


def _database(uri: str) -> Path:
    """A SQLite URI's file; relative for ``sqlite:///name`` and for a database in memory."""
    return Path(uri.partition(":///")[2].partition("?")[0])
