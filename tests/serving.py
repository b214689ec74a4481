"""An application as its committed configuration file deploys it: `serve run`, on a cluster of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import yaml

ROOT = Path(__file__).parents[1]
SECRET = "one-that-is-nowhere-else"
TOKEN = {"Authorization": f"Bearer {SECRET}"}


@contextlib.contextmanager
def served(file, folder, path, change=None):
    """The file at a free port, changed by a function where tests need other settings; gives the address, as soon as ``path``
    answers there to whom has the token. No log and no process title may have that in the end."""
    config = yaml.safe_load((ROOT / file).read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config["http_options"]["port"] = free.getsockname()[1]
    if change:
        change(config)
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", "--address", "local", str(folder / "serve.yaml")]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"FLOWBP_TOKEN": SECRET, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A test run in the background has Ctrl-C ignored, and would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    at = f"http://127.0.0.1:{config['http_options']['port']}"
    try:
        for _ in range(300):
            assert server.poll() is None, (folder / "log").read_text()
            try:
                if requests.get(f"{at}{path}", headers=TOKEN, timeout=60).status_code == 200:
                    break
            except requests.ConnectionError:
                pass
            time.sleep(1)
        else:
            pytest.fail((folder / "log").read_text())
        session = Path("/tmp/ray/session_latest").resolve()  # not later: tests may start other clusters
        yield at
        titles = [title for title in map(_content, Path("/proc").glob("[0-9]*/cmdline")) if SECRET.encode() in title]
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
    logs = [folder / "log", *(session / "logs").rglob("*")]
    assert len(logs) > 10
    assert not titles + [log for log in logs if SECRET.encode() in _content(log)]


def _content(path):
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError, IsADirectoryError):
        return b""  # it ended meanwhile, or is a folder
