"""Hub names, against a fake hub on the loopback interface, through huggingface_hub's own HTTP client.

Each case runs in its own process, because the client reads its settings at import.
"""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from csm import UnavailableError
from csm.weights import hub
from csm.weights.checkpoint import TINY

COMMIT = {"main": "a" * 40, "v2": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that downloads use: ``/{owner}/{repo}/resolve/{revision}/{file}``."""

    repos: dict = {}
    requested: list = []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body):
        if self.path == "/":  # the probe of hub_answers
            return self.refuse(404, "")
        self.requested.append(self.path)
        parts = self.path.strip("/").split("/")
        repo = "/".join(parts[:2])
        if repo == "owner/gated":
            return self.refuse(403, "GatedRepo")
        if repo not in self.repos or parts[2] != "resolve":
            return self.refuse(401, "RepoNotFound")
        if parts[3] not in [*COMMIT, *COMMIT.values()]:
            return self.refuse(404, "RevisionNotFound")
        path = self.repos[repo].get(parts[4])
        if path is None:
            return self.refuse(404, "EntryNotFound")
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT.get(parts[3], parts[3]))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    files = {name: TINY / name for name in ("config.json", "tokenizer.json", "model.safetensors")}
    Hub.repos = {
        "owner/tiny": files,
        "owner/no-weights": {name: files[name] for name in ("config.json", "tokenizer.json")},
        "owner/no-tokenizer": {name: files[name] for name in ("config.json", "model.safetensors")},
    }
    Hub.requested = []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


SCRIPT = """
import sys
from csm.weights import open_checkpoint
try:
    print(open_checkpoint(sys.argv[1]).folder)
except Exception as error:
    print(type(error).__name__, error)
"""


def open_in_process(name, cache, endpoint="http://127.0.0.1:9", **environment):
    """Open a checkpoint in a new process. Returns (its folder, or the error's class and message; stderr)."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", **environment}
    run = subprocess.run([sys.executable, "-c", SCRIPT, name], env=env, capture_output=True, text=True, check=True)
    return run.stdout.strip(), run.stderr


def test_download_then_cache_then_offline(server, tmp_path):
    folder, progress = open_in_process("owner/tiny", tmp_path, server, TQDM_POSITION="-1")  # as on a terminal
    assert folder.endswith(f"snapshots/{COMMIT['main']}")
    assert "model.safetensors" in progress  # a progress bar
    assert "100%" in progress
    fetched = [path for path in Hub.requested if path.endswith("/model.safetensors")]
    assert open_in_process("owner/tiny", tmp_path, server)[0] == folder
    again = [path for path in Hub.requested if path.endswith("/model.safetensors")]
    assert len(again) == len(fetched) + 1  # one HEAD request, no download
    assert open_in_process("owner/tiny", tmp_path, HF_HUB_OFFLINE="1")[0] == folder
    started = time.monotonic()
    assert open_in_process("owner/tiny", tmp_path)[0] == folder  # no hub, and HF_HUB_OFFLINE is not set
    assert time.monotonic() - started < 15


def test_a_revision_is_pinned(server, tmp_path):
    folder, _ = open_in_process("owner/tiny@v2", tmp_path, server)
    assert folder.endswith(f"snapshots/{COMMIT['v2']}")
    assert all("/v2/" in path or COMMIT["v2"] in path for path in Hub.requested)


CASES = {
    "owner/gated": ("accept its licence", "hf auth login", "unsloth/csm-1b", "--model tiny"),
    "owner/absent": ("owner/absent", "hf auth login"),
    "owner/tiny@v9": ("no revision 'v9'",),
    "owner/no-weights": ("no weights", "model.safetensors"),
    "owner/no-tokenizer": ("no tokenizer.json",),
    "owner/bad--name..": ("owner/bad--name..",),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_say_what_to_do(server, tmp_path, name):
    answer, _ = open_in_process(name, tmp_path, server)
    assert answer.startswith("UnavailableError")
    for words in CASES[name]:
        assert words in answer


@pytest.mark.parametrize("offline", ["0", "1"])
def test_no_network(tmp_path, offline):
    answer, _ = open_in_process("owner/tiny", tmp_path, HF_HUB_OFFLINE=offline)
    assert answer.startswith("UnavailableError")
    assert "cannot be reached" in answer
    assert "--model tiny" in answer


# As raised by Python and by hf_xet.
FULL_DISK = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("Data processing error: IO Error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL_DISK, ids=lambda error: type(error).__name__)
def test_no_space(monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", full)
    with pytest.raises(UnavailableError, match=r"no space left.*HF_HOME"):
        hub.fetch("owner/tiny", "model.safetensors", None)


def test_a_broken_download(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Data processing error: CAS service error: connection reset")

    monkeypatch.setattr(hub, "hf_hub_download", broken)
    with pytest.raises(UnavailableError, match=r"cannot be reached.*--model tiny"):
        hub.fetch("owner/tiny", "model.safetensors", None)


def test_the_shards_of_an_index_are_downloaded(server, tmp_path):
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    Hub.repos["owner/tiny"] = {
        "config.json": TINY / "config.json",
        "tokenizer.json": TINY / "tokenizer.json",
        "transformers.safetensors.index.json": index,
        "model-00001-of-00001.safetensors": TINY / "model.safetensors",
    }
    folder, _ = open_in_process("owner/tiny", tmp_path / "cache", server)
    assert folder.endswith(COMMIT["main"])
