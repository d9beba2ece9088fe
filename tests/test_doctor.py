"""csm doctor: every fault is simulated, and found with advice; the exit code says how bad it is."""

import json
import re
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from csm import read_audio
from csm.__main__ import main
from csm.bench.scale import memory_bytes
from csm.config import CSM_1B
from csm.doctor import command, gpu, hub, machine, sound
from csm.doctor.finding import ERROR, OK, WARNING, Finding, as_text
from csm.doctor.gpu import CudaProbe, Device
from csm.doctor.hub import HubProbe
from csm.doctor.machine import Cores, Memory
from csm.frame import FrameState
from csm.kernels import native
from csm.model import CSM

WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")  # of torch 2.9 for CUDA 12.8


def a_gpu(capability, archs=WHEEL, memory=80e9):
    return CudaProbe((12, 8), False, True, (12, 8), (Device("a GPU", capability, int(memory)),), archs)


# A check on what it is given, the status, and words of message and advice.
FAULTS = {
    "Python too old": (lambda: machine.check_python((3, 9), False), ERROR, "3.9 is not supported.*use Python 3.10"),
    "Python too new": (lambda: machine.check_python((3, 14), True), WARNING, "3.14 in a virtual.*to 3.13"),
    "torch too old": (lambda: machine.check_torch("2.8.0+cu128", "2.8.0"), ERROR, "too old.*torch>=2.9"),
    "torchaudio of another torch": (lambda: machine.check_torch("2.9.1", "2.11.0"), ERROR, "versions differ"),
    "torchaudio missing": (lambda: machine.check_torch("2.9.1", None), ERROR, "torchaudio missing"),
    "AMD": (lambda: gpu.check_gpu(CudaProbe(rocm=True)), WARNING, "AMD.*not tested.*--device cpu"),
    "torch for CPUs beside a driver": (lambda: gpu.check_gpu(CudaProbe(driver=True)), WARNING, "CPUs only.*for CUDA"),
    "driver too old": (
        lambda: gpu.check_gpu(CudaProbe((12, 8), False, True, (11, 4))),
        WARNING,
        r"supports CUDA 11\.4, PyTorch is built for 12\.8.*update the driver, or .* for CUDA 11",
    ),
    "CUDA fails": (
        lambda: gpu.check_gpu(CudaProbe((12, 8), False, True, (12, 8), failure="error 999")),
        WARNING,
        "finds no GPU.*error 999.*nvidia-smi.*--gpus all",
    ),
    "Blackwell, torch for CUDA 12.4": (
        lambda: gpu.check_gpu(a_gpu((12, 0), ("sm_80", "sm_90"))),
        ERROR,
        r"Blackwell \(12\.0\); .* no code for sm_120.*CUDA 12\.8 or later",
    ),
    "Hopper, torch for CUDA 11": (lambda: gpu.check_gpu(a_gpu((9, 0), ("sm_80",))), ERROR, "Hopper.*no code for sm_90"),
    "Turing": (lambda: gpu.check_gpu(a_gpu((7, 5))), WARNING, r"older than Ampere \(7\.5\).*need 8\.0.*float16"),
    "little GPU memory": (lambda: machine.check_gpu_memory(a_gpu((8, 6), memory=4e9)), WARNING, r"4\.00 GB.*5\.70 GB"),
    "more threads than cores": (
        lambda: machine.check_cores(Cores(16, 2.5, 16, 0.1))[0],
        WARNING,
        "2.5 of 16 cores usable, 16 threads.*OMP_NUM_THREADS=2$",
    ),
    "a busy machine": (lambda: machine.check_cores(Cores(4, 4, 4, 3.2))[1], WARNING, "3.2 processes.*4 cores.*top"),
    "no memory": (lambda: machine.check_memory(Memory(3_000_000_000)), ERROR, r"3\.00 GB available.*4\.20 GB in bf"),
    "memory for bfloat16": (lambda: machine.check_memory(Memory(6_000_000_000)), WARNING, "--dtype bfloat16"),
    "disk full": (lambda: machine.check_disk(5_000_000_000, False), ERROR, r"download of 6\.60 GB.*HF_HOME"),
    "offline by choice": (lambda: hub.check_hub(HubProbe(offline=True)), ERROR, "HF_HUB_OFFLINE forbids.*--model tiny"),
    "codec not cached, offline": (
        lambda: hub.check_hub(HubProbe(("sesame/csm-1b",), codec_missing=True, offline=True)),
        ERROR,
        "not the codec.*0.38 GB.*HF_HUB_OFFLINE forbids.*--codec",
    ),
    "codec not cached": (
        lambda: hub.check_hub(HubProbe(("sesame/csm-1b",), codec_missing=True)),
        WARNING,
        "not the codec.*once with a network.*--codec",
    ),
    "hub unreachable": (
        lambda: hub.check_hub(HubProbe(failure="ConnectTimeout: 4 s")),
        ERROR,
        "cannot be reached: ConnectTimeout.*proxy",
    ),
    "not logged in": (lambda: hub.check_hub(HubProbe()), WARNING, "not logged in.*hf auth login.*unsloth/csm-1b"),
    "token refused": (lambda: hub.check_hub(HubProbe(has_token=True)), WARNING, "refuses the saved token"),
    "licence": (
        lambda: hub.check_hub(HubProbe(has_token=True, user="ann", licence=False)),
        WARNING,
        "ann has not accepted.*accept it on .*/sesame/csm-1b",
    ),
}


def only_fault(found):
    """The one finding of a check that is not ok."""
    found = [found] if isinstance(found, Finding) else found
    (fault,) = [finding for finding in found if finding.status != OK]
    return fault


def assert_fault(found, status, words):
    fault = only_fault(found)
    assert fault.status == status
    assert re.search(words, f"{fault.message} -> {fault.advice}"), fault


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    check, status, words = FAULTS[name]
    assert_fault(check(), status, words)


HEALTHY = {
    "Python": lambda: [machine.check_python((3, 10), True), machine.check_python((3, 13), True)],
    "torch": lambda: [machine.check_torch("2.9.1+cu128", "2.9.1"), machine.check_torch("2.11.0", "2.11.0+cpu")],
    "no driver": lambda: [*gpu.check_gpu(CudaProbe((12, 8))), gpu.check_triton(CudaProbe((12, 8)))],
    "GPUs": lambda: [gpu.check_gpu(a_gpu(item))[0] for item in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 0))],
    "PTX": lambda: gpu.check_gpu(a_gpu((12, 0), ("sm_90", "compute_90"))),
    "GPU memory": lambda: machine.check_gpu_memory(a_gpu((8, 9), memory=8e9)),
    "cores": lambda: machine.check_cores(Cores(8, 8, 4, 0.3)),
    "memory": lambda: [machine.check_memory(Memory(8_000_000_000)), machine.check_memory(Memory(None))],
    "disk": lambda: [machine.check_disk(10**10, False), machine.check_disk(0, True)],
    "cached": lambda: hub.check_hub(HubProbe(("sesame/csm-1b",), offline=True)),
    "licence": lambda: hub.check_hub(HubProbe(has_token=True, user="ann", licence=True)),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_machine_is_ok(name):
    found = HEALTHY[name]()
    assert found
    assert {finding.status for finding in found} == {OK}


def test_hidden_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_fault(gpu.check_gpu(CudaProbe((12, 8), False, True, (12, 8))), WARNING, "CUDA_VISIBLE_DEVICES hides")


def test_faults_of_triton(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "find_spec", lambda name: None)
        assert_fault(gpu.check_triton(a_gpu((9, 0))), WARNING, "not installed.*pip install triton")
    with monkeypatch.context() as patch:
        patch.delenv("CC", raising=False)
        patch.setenv("PATH", "")
        assert_fault(gpu.check_triton(a_gpu((9, 0))), WARNING, "C compiler.* -> install gcc or clang")
    with monkeypatch.context() as patch:
        patch.setattr("csm.selfcheck.sysconfig.get_paths", lambda: {"include": "/nowhere"})
        patch.setenv("CC", "cc")
        assert_fault(gpu.check_triton(a_gpu((9, 0))), WARNING, "Python.h.* -> install Python's development headers")
    monkeypatch.setattr(gpu, "missing_build_tools", lambda: "")
    monkeypatch.setattr(gpu, "default_dtype", lambda device: torch.float32)
    monkeypatch.setattr(gpu, "launch_failure", lambda *_: "a Triton kernel cannot be launched: ptxas")
    assert_fault(gpu.check_triton(a_gpu((9, 0))), WARNING, "cannot be launched: ptxas")
    monkeypatch.setattr(gpu, "launch_failure", lambda *_: None)
    assert gpu.check_triton(a_gpu((9, 0))).status == OK


def test_no_cpp_compiler(monkeypatch):
    """The real search for a compiler, with an empty PATH."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CSM_OPS", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(machine, "is_available", lambda: native.library.__wrapped__() is not None)
    assert_fault(machine.check_native(), WARNING, "no C.. compiler.*apt install g..")
    monkeypatch.setenv("CSM_OPS", "reference")
    assert machine.check_native().status == OK


def test_results_of_the_self_check(monkeypatch, tmp_path):
    monkeypatch.setenv("CSM_HOME", str(tmp_path))
    assert "no result yet" in machine.check_selfcheck().message
    results = {"a GPU": {"rung": {}, "failures": []}}
    (tmp_path / "selfcheck.json").write_text(json.dumps(results))
    assert machine.check_selfcheck().status == OK
    results["another"] = {"rung": {}, "failures": ["the kernel of sample differs"]}
    (tmp_path / "selfcheck.json").write_text(json.dumps(results))
    assert_fault(machine.check_selfcheck(), WARNING, "2 results.*kernel of sample differs")


def broken(error):
    def import_module(name):
        raise error

    return import_module


def test_faults_of_the_sound_packages(monkeypatch):
    monkeypatch.setattr(sound, "import_module", broken(ModuleNotFoundError("No module", name="moshi")))
    assert_fault(sound.check_codec(), ERROR, "moshi cannot be imported: missing.*moshi==0.2.13")
    monkeypatch.setattr(sound, "import_module", broken(OSError("libav.so: undefined symbol")))
    assert_fault(sound.check_codec(), ERROR, "undefined symbol")
    assert_fault(sound.check_formats(), WARNING, "libav.so.*pip install -U")
    assert_fault(sound.check_sound(), WARNING, "sounddevice cannot.*libportaudio2")
    monkeypatch.setattr(sound, "import_module", broken(ModuleNotFoundError("No module", name="sounddevice")))
    assert sound.check_sound().status == OK


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_the_formats_are_read(suffix, tmp_path):
    """What the doctor says that sphn reads, written by libsndfile."""
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.sin(np.arange(24_000) / 20) / 2, 24_000)
    audio, rate = read_audio(path)
    assert rate == 24_000
    assert audio.std() == pytest.approx(0.5 / 2**0.5, rel=0.05)


def test_no_sound_device(monkeypatch):
    class PortAudioError(Exception):
        pass

    def query_devices(kind):
        raise PortAudioError("Error querying device -1")

    fake = types.SimpleNamespace(PortAudioError=PortAudioError, query_devices=query_devices)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    assert_fault(sound.check_sound(), WARNING, "no sound device")
    fake.query_devices = lambda kind: {"name": "Speakers"}
    assert sound.check_sound() == Finding("sound", OK, "Speakers")


@pytest.fixture
def online(monkeypatch):
    """HF_HUB_OFFLINE unset, nothing cached, no token."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "is_cached", lambda repo: False)
    monkeypatch.setattr(hub, "get_token", lambda: None)


class Silent(BaseHTTPRequestHandler):
    """Answers HEAD requests, late if told so."""

    delay = 0.0

    def do_HEAD(self):
        time.sleep(self.delay)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_network_is_asked_and_never_waited_for(online, monkeypatch):
    """A server on the loopback interface: one that answers, one that is slow to, and a port where there is none."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert hub.probe_hub().failure == ""
    monkeypatch.setattr(Silent, "delay", 30.0)
    monkeypatch.setattr(hub, "REQUEST_SECONDS", 0.2)
    assert "Timeout" in hub.probe_hub().failure
    monkeypatch.setattr(hub, "REQUEST_SECONDS", 20)  # as a name that is never resolved, which no timeout covers
    monkeypatch.setattr(hub, "ALL_SECONDS", 0.2)
    assert hub.probe_hub().failure == "no answer in 0.2 s"
    monkeypatch.setattr(hub, "ALL_SECONDS", 10)
    server.server_close()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "ConnectionError" in hub.probe_hub().failure
    server.shutdown()


def test_the_hub_is_not_asked_offline_or_for_what_is_cached(online, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "ask", lambda token: asked.append(token) or ("", None, None))
    hub.probe_hub()
    assert asked == [None]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.probe_hub().offline
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "is_cached", lambda repo: repo == "unsloth/csm-1b")
    monkeypatch.setattr(hub, "cached_weights", lambda repo: [Path("model.safetensors")])
    assert hub.probe_hub() == HubProbe(("unsloth/csm-1b",))
    (finding,) = hub.check_hub(hub.probe_hub())
    assert (finding.status, finding.advice) == (OK, "pass --model unsloth/csm-1b")
    monkeypatch.setattr(hub, "is_cached", lambda repo: True)
    monkeypatch.setattr(hub, "cached", lambda *_: None)
    assert hub.probe_hub().codec_missing  # a single file is Sesame's layout here
    assert asked == [None]


def test_token_and_licence(online, monkeypatch):
    """The hub's answers, as huggingface_hub raises them."""
    response = types.SimpleNamespace(headers={}, request=None, status_code=403)

    class Api:
        def __init__(self, whoami, auth_check):
            self.whoami, self.auth_check = whoami, auth_check

    def refuse(error):
        def call(*_, **__):
            raise error

        return call

    monkeypatch.setattr(hub.requests, "head", lambda *_, **__: None)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_x")
    accepted = Api(lambda token: {"name": "ann"}, lambda *_, **__: None)
    gated = Api(lambda token: {"name": "ann"}, refuse(GatedRepoError("gated", response=response)))
    expired = Api(refuse(HfHubHTTPError("401", response=response)), None)
    for api, expected in ((accepted, ("ann", True)), (gated, ("ann", False)), (expired, (None, None))):
        monkeypatch.setattr(hub, "HfApi", lambda api=api: api)
        probe = hub.probe_hub()
        assert (probe.failure, probe.has_token, probe.user, probe.licence) == ("", True, *expected)


def test_what_is_needed_is_more_than_weights_and_cache():
    """The measured memory lies above the bytes of CSM-1B's tensors, and less than half above."""
    for dtype in ("float32", "bfloat16"):
        size = getattr(torch, dtype).itemsize
        model = CSM(CSM_1B, torch.device("meta"))
        state = FrameState.allocate(CSM_1B, 1, torch.device("meta"), getattr(torch, dtype))
        caches = (state.backbone_cache.k_LBGSd, state.backbone_cache.v_LBGSd)
        needed = sum(p.numel() for p in model.parameters()) * size + sum(item.numel() for item in caches) * size
        assert needed < machine.NEEDED_BYTES[dtype] < 1.5 * needed


def test_gpu_memory_is_that_of_the_plan_and_the_table_of_q_k_and_v():
    depth = CSM_1B.depth_decoder
    table = 2 * (CSM_1B.num_codebooks - 2) * CSM_1B.codebook_size * depth.qkv_dim
    assert table == pytest.approx(189e6, rel=0.01)
    assert memory_bytes("bfloat16", 1) + table == pytest.approx(machine.GPU_BYTES, rel=0.02)


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (WARNING, 1), (ERROR, 2)])
def test_exit_code_text_and_json(status, code, monkeypatch, capsys):
    found = [Finding("python", OK, "fine"), Finding("gpu", status, "a message", "do this")]
    monkeypatch.setattr(command, "examine", lambda: found)
    assert main(["doctor"]) == code
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "gpu          a message" in shown and "-> do this" in shown
    assert main(["doctor", "--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["status"] == status
    assert printed["findings"][1] == {"check": "gpu", "status": status, "message": "a message", "advice": "do this"}


def test_color_on_a_terminal_only(monkeypatch, capsys):
    monkeypatch.setattr(command, "examine", lambda: [Finding("gpu", ERROR, "a message", "do this")])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["doctor"])
    assert "\x1b[31merror" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    main(["doctor"])
    assert "\x1b" not in capsys.readouterr().out


def test_this_machine(capsys):
    """All real probes. CSM-1B is not here, and the tests are offline."""
    assert main(["doctor", "--json"]) in (0, 1, 2)
    findings = json.loads(capsys.readouterr().out)["findings"]
    checks = {finding["check"] for finding in findings}
    assert {"python", "torch", "gpu", "triton", "cpu ops", "threads", "load", "memory", "disk"} < checks
    assert {"checkpoint", "codec", "formats", "sound", "self-check"} < checks
    python = next(finding for finding in findings if finding["check"] == "python")
    assert "{}.{}".format(*sys.version_info) in python["message"]
    text = as_text([Finding(**finding) for finding in findings], colored=False)
    assert max(map(len, text.splitlines())) < 400
    assert str(Path.home()) not in text
