"""Hub names, against a fake hub on the loopback interface, through huggingface_hub's own HTTP client.

Each case runs in its own process, because the client reads its settings at import (tests/hub_worker.py). The hub counts
the bytes that it sends.
"""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import write_sesame
from csm import UnavailableError
from csm.weights import hub
from csm.weights.checkpoint import TINY

COMMIT = {"main": "a" * 40, "v2": "b" * 40}
INDEX = "transformers.safetensors.index.json"
SHARD = "transformers-00001-of-00001.safetensors"


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's API that downloads use.

    ``/api/models/{owner}/{repo}[/revision/{revision}]`` lists a repository's files, and
    ``/{owner}/{repo}/resolve/{revision}/{file}`` is a file, or the rest of it where a range is requested.
    """

    repos: dict = {}
    requests: list = []  # (method, path)
    bytes_sent: dict = {}  # file: bytes
    cuts: dict = {}  # file: bytes after which each answer breaks off
    faults: dict = {}  # file: "404" or "down"

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
        self.requests.append((self.command, self.path))
        parts = self.path.partition("?")[0].strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if listing else parts
        repo = f"{owner}/{name}"
        revision = rest[1] if len(rest) > 1 else "main"
        if repo not in self.repos:
            return self.refuse(401, "RepoNotFound")
        if revision not in [*COMMIT, *COMMIT.values()]:
            return self.refuse(404, "RevisionNotFound")
        if listing:
            return self.list_files(repo, COMMIT[revision])
        if repo == "owner/gated":
            return self.refuse(403, "GatedRepo")
        file = rest[2]
        if self.faults.get(file) == "down":
            return self.connection.close()
        if file not in self.repos[repo] or self.faults.get(file) == "404":
            return self.refuse(404, "EntryNotFound")
        return self.send_file(file, self.repos[repo][file].read_bytes(), COMMIT.get(revision, revision), body)

    def list_files(self, repo, commit):
        def sibling(name, content):
            lfs = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 1}
            return {"rfilename": name, "size": len(content), "lfs": lfs}

        files = [sibling(name, path.read_bytes()) for name, path in self.repos[repo].items()]
        answer = json.dumps({"id": repo, "sha": commit, "siblings": files}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def send_file(self, name, content, commit, body):
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            sent = content[begin : begin + self.cuts[name]] if name in self.cuts else content[begin:]
            self.wfile.write(sent)
            self.bytes_sent[name] = self.bytes_sent.get(name, 0) + len(sent)
            self.close_connection = True

    def log_message(self, *_):
        pass


def write_both_layouts(folder, sesame_state):
    """Files of a repository with both layouts, as in sesame/csm-1b: HF's (with a codec) is the larger one."""
    write_sesame(folder, sesame_state)
    shutil.copy(TINY / "model.safetensors", folder / SHARD)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": SHARD}}))
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def server(sesame_state, tmp_path):
    files = {name: TINY / name for name in ("config.json", "tokenizer.json", "model.safetensors")}
    both = write_both_layouts(tmp_path / "both", sesame_state)
    hf = {"config.json": files["config.json"], "tokenizer.json": files["tokenizer.json"], SHARD: both[SHARD]}
    Hub.repos = {
        "owner/tiny": files,
        "owner/both": both,
        "owner/hf": hf | {INDEX: both[INDEX]},
        "owner/gated": files,
        "owner/no-weights": {name: files[name] for name in ("config.json", "tokenizer.json")},
        "owner/no-config": {name: files[name] for name in ("tokenizer.json", "model.safetensors")},
        "owner/no-tokenizer": {name: files[name] for name in ("config.json", "model.safetensors")},
    }
    Hub.requests, Hub.bytes_sent, Hub.cuts, Hub.faults = [], {}, {}, {}
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


@pytest.fixture(scope="module")
def worker():
    """A process that opens each checkpoint in a new process of its own."""
    path = Path(__file__).parent / "hub_worker.py"
    with subprocess.Popen([sys.executable, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def opened(worker, tmp_path):
    """Open a checkpoint in a new process. Returns (its folder and weight files, or the error; stderr)."""

    def opened(name, endpoint="http://127.0.0.1:9", cache=tmp_path, before="", progress=True, **environment):
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", **environment}
        case = {"name": name, "before": before, "progress": progress, "environment": environment}
        worker.stdin.write(json.dumps(case) + "\n")
        worker.stdin.flush()
        out, err = json.loads(worker.stdout.readline())
        return out.strip(), err

    return opened


def size(repo, name):
    return Hub.repos[repo][name].stat().st_size


def test_a_download_is_announced_with_its_size(opened, server, tmp_path):
    answer, shown = opened("owner/tiny", server, TQDM_POSITION="-1")  # as on a terminal
    assert answer.splitlines() == [
        str(tmp_path / f"hub/models--owner--tiny/snapshots/{COMMIT['main']}"),
        "model.safetensors",
    ]
    assert f"Downloading owner/tiny: {size('owner/tiny', 'model.safetensors') / 1e6:.1f} MB to {tmp_path}" in shown
    assert "model.safetensors: 100%" in shown
    assert Hub.bytes_sent == {name: size("owner/tiny", name) for name in Hub.repos["owner/tiny"]}


def test_without_progress_nothing_is_shown(opened, server):
    answer, shown = opened("owner/tiny", server, progress=False, TQDM_POSITION="-1")
    assert answer.endswith("model.safetensors")
    assert shown == ""


def test_the_cache_is_used_without_a_request(opened, server):
    answer, _ = opened("owner/tiny", server)
    Hub.requests.clear()
    assert opened("owner/tiny", server)[0] == answer
    assert Hub.requests == []
    started = time.monotonic()
    assert opened("owner/tiny")[0] == answer  # no hub, and HF_HUB_OFFLINE is not set
    assert time.monotonic() - started < 15
    assert opened("owner/tiny", HF_HUB_OFFLINE="1")[0] == answer


def test_the_smaller_layout_is_downloaded(opened, server, tmp_path):
    """Sesame's, unless its codec, which comes from another repository, makes it the larger one."""
    small = "from csm.weights import hub; hub.MIMI_BYTES = 1000"
    answer, shown = opened("owner/both", server, tmp_path / "a", before=small)
    assert answer.endswith("\nmodel.safetensors")
    assert SHARD not in Hub.bytes_sent
    assert "; the codec, 0.0 MB, follows when audio is first needed" in shown
    answer, shown = opened("owner/both", server, tmp_path / "b")
    assert "CheckpointError" in answer  # its config.json is of the other layout's model
    assert Hub.bytes_sent[SHARD] == size("owner/both", SHARD)
    assert "codec" not in shown


@pytest.mark.parametrize("name", ["model.safetensors", SHARD])
def test_a_cached_layout_is_kept(opened, server, tmp_path, name):
    """Whichever layout is in the cache, the other one is not downloaded, even where tokenizer.json is still missing."""
    both = Hub.repos["owner/both"]
    kept = {"model.safetensors": ["model.safetensors"], SHARD: [SHARD, INDEX]}[name]
    hidden = {"model.safetensors", SHARD, INDEX} - set(kept)
    Hub.repos["owner/both"] = {file: path for file, path in both.items() if file not in hidden}
    opened("owner/both", server)
    Hub.repos["owner/both"] = both
    Hub.requests.clear()
    opened("owner/both", server)
    assert Hub.requests == []
    (tmp_path / f"hub/models--owner--both/snapshots/{COMMIT['main']}/tokenizer.json").unlink()
    opened("owner/both", server)
    assert not hidden & Hub.bytes_sent.keys()
    assert all(Hub.bytes_sent[file] == both[file].stat().st_size for file in kept)


def test_a_revision_is_pinned(opened, server):
    answer, _ = opened("owner/tiny@v2", server)
    assert answer.splitlines()[0].endswith(f"snapshots/{COMMIT['v2']}")
    assert all("/v2" in path or COMMIT["v2"] in path for _, path in Hub.requests)


CASES = {
    "owner/gated": ("accept its licence", "hf auth login", "unsloth/csm-1b", "--model tiny"),
    "owner/absent": ("owner/absent", "hf auth login"),
    "owner/tiny@v9": ("no revision 'v9'", "leave it out"),
    "owner/no-weights": ("no weights", "model.safetensors"),
    "owner/no-config": ("no config.json",),
    "owner/no-tokenizer": ("no tokenizer.json", "early revisions", "unsloth/csm-1b"),
    "owner/bad--name..": ("owner/bad--name..",),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_say_what_to_do(opened, server, name):
    answer, _ = opened(name, server)
    assert answer.startswith("UnavailableError")
    for words in CASES[name]:
        assert words in answer
    assert "model.safetensors" not in Hub.bytes_sent


@pytest.mark.parametrize(("offline", "why"), [("0", "the hub cannot be reached"), ("1", "HF_HUB_OFFLINE is set")])
def test_no_network(opened, offline, why):
    answer, _ = opened("owner/tiny", HF_HUB_OFFLINE=offline)
    assert answer.startswith(f"UnavailableError owner/tiny: the checkpoint is not in the cache, and {why}")
    assert "--model tiny" in answer
    assert "MaxRetryError" not in answer  # the cause in words, not urllib3's report of it


CHUNK = 2**16  # bytes that the client receives before it writes them; 10 MB if not set
SMALL_CHUNKS = f"from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}"


def test_a_broken_connection_is_resumed(opened, server):
    """Every answer breaks off after about 40 % of the file: three requests bring every byte once."""
    whole = size("owner/tiny", "model.safetensors")
    Hub.cuts = {"model.safetensors": whole * 2 // 5 // CHUNK * CHUNK}
    answer, _ = opened("owner/tiny", server, before=SMALL_CHUNKS)
    assert answer.endswith("model.safetensors")
    assert Hub.bytes_sent["model.safetensors"] == whole
    downloads = [path for method, path in Hub.requests if method == "GET" and path.endswith("/model.safetensors")]
    assert len(downloads) == 3


def test_a_download_that_failed_is_resumed_by_the_next_run(opened, server):
    whole = size("owner/tiny", "model.safetensors")
    Hub.cuts = {"model.safetensors": whole // 10 // CHUNK * CHUNK}
    answer, _ = opened("owner/tiny", server, before=SMALL_CHUNKS)
    assert answer.startswith("UnavailableError owner/tiny: the download of model.safetensors broke off 5 times; run it")
    received = Hub.bytes_sent["model.safetensors"]
    assert received == hub.ATTEMPTS * Hub.cuts["model.safetensors"]
    Hub.cuts = {}
    answer, shown = opened("owner/tiny", server)
    assert answer.endswith("model.safetensors")
    assert Hub.bytes_sent["model.safetensors"] == whole
    assert f"Downloading owner/tiny: {(whole - received) / 1e6:.1f} MB" in shown  # what is left of it


def test_a_network_fault_does_not_switch_the_layout(opened, server):
    """The index cannot be read, but it is there: the other layout is not downloaded in its place."""
    Hub.faults = {INDEX: "down"}
    answer, _ = opened("owner/both", server, before="import time; time.sleep = lambda _: None")  # between 5 retries
    assert answer.startswith(f"UnavailableError owner/both: {INDEX} is not in the cache, and the hub cannot be reached")
    assert "model.safetensors" not in Hub.bytes_sent


def test_an_index_that_is_not_found(opened, server):
    """With another layout in the repository that one is used, otherwise the message names the index."""
    Hub.faults = {INDEX: "404"}
    answer, _ = opened("owner/both", server)
    assert answer.endswith("\nmodel.safetensors")
    answer, _ = opened("owner/hf", server)
    assert answer.startswith("UnavailableError owner/hf: no weights")
    assert f"it lists {INDEX}, but does not have it" in answer


def test_a_shard_that_is_not_listed(opened, server):
    del Hub.repos["owner/hf"][SHARD]
    answer, _ = opened("owner/hf", server)
    assert f"{INDEX} lists {SHARD}, which the repository does not have" in answer


def test_the_disk_is_checked_before_a_download(opened, server, tmp_path):
    full = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)"
    answer, _ = opened("owner/tiny", server, before=full)
    needed = f"{size('owner/tiny', 'model.safetensors') / 1e6:.1f} MB"
    assert answer.startswith(f"UnavailableError owner/tiny: {needed} must be downloaded, but the disk of {tmp_path}")
    assert "has 0.0 MB free" in answer
    assert "HF_HOME" in answer
    assert "model.safetensors" not in Hub.bytes_sent


def test_the_disk_needs_room_for_the_codec_too(opened, server):
    free = size("owner/both", "model.safetensors") + 500
    before = f"""
import shutil
from csm.weights import hub
hub.MIMI_BYTES = 1000
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9 - {free}, {free})"""
    answer, _ = opened("owner/both", server, before=before)
    assert answer.startswith("UnavailableError owner/both: ")
    assert "must be downloaded, but the disk of" in answer


# As raised by Python and by hf_xet.
FULL_DISK = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("Data processing error: IO Error: No space left on device (os error 28)"),
]


@pytest.fixture
def listed(monkeypatch, tmp_path):
    """A repository that lists model.safetensors, and an empty cache."""
    monkeypatch.setattr(hub, "cached", lambda *_: None)
    monkeypatch.setattr(hub, "_list_files", lambda *_: {"model.safetensors": hub.RemoteFile(10)})
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def downloads_raise(error):
        def download(*_, **__):
            raise error

        monkeypatch.setattr(hub, "hf_hub_download", download)

    return downloads_raise


@pytest.mark.parametrize("error", FULL_DISK, ids=lambda error: type(error).__name__)
def test_the_disk_fills_up_during_a_download(listed, error):
    listed(error)
    with pytest.raises(UnavailableError, match=r"no space left.*HF_HOME"):
        hub.fetch("owner/tiny", "model.safetensors")


def test_a_broken_xet_download(listed):
    listed(RuntimeError("Data processing error: CAS service error: connection reset"))
    with pytest.raises(UnavailableError, match=r"connection reset.*--model tiny"):
        hub.fetch("owner/tiny", "model.safetensors")


def test_a_cache_that_cannot_be_written(listed):
    listed(PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(UnavailableError, match=r"could not be saved; check the cache folder"):
        hub.fetch("owner/tiny", "model.safetensors")


def test_the_shards_of_an_index_are_downloaded(opened, server):
    answer, _ = opened("owner/hf", server)
    assert Path(answer.splitlines()[0]).name == COMMIT["main"]
    assert answer.endswith(SHARD)


@pytest.mark.parametrize(
    ("num_bytes", "words"), [(6_211_186_784, "6.21 GB"), (384_644_900, "0.38 GB"), (17_209_980, "17.2 MB")]
)
def test_sizes_in_words(num_bytes, words):
    assert hub.size_in_words(num_bytes) == words
