"""The server and what goes wrong: after each fault a normal request succeeds, and nothing is left in use."""

import asyncio
import contextlib
import errno
import functools
import io
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from urllib.parse import quote

import httpx
import numpy as np
import openai
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_serve import FastSteps, Running, clip, generator, samples, until  # noqa: F401 - a fixture
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import csm.runner
from csm import CSMError, Generator
from csm.__main__ import parse_arguments
from csm.guards import NO_GUARDS
from csm.serve.command import read_settings
from csm.serve.messages import ProtocolError, parse
from csm.serve.schema import SpeechBody
from csm.serve.settings import MAX_VALUES, Settings, read_keys
from csm.serve.voices import read_recording
from csm.voices import Voice, save_voice
from noise import NOISE

KEY = "correct-horse"
LOAD_SECONDS, CLIENTS, CLIP_SECONDS = 120, 64, 0.8


@pytest.fixture(scope="module")
def running(generator, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("voices")
    options = dict(max_streams=2, max_queue=1, max_seconds=0.4, body_timeout=1.0, idle_timeout=1.0)
    with Running(generator, voices=folder, **options) as running:
        running.speak("Hi.")
        with nothing_left(running):
            yield running


def counts(running):
    server_sockets = len(running.server.server_state.connections)
    return running.engine.num_active, running.engine.num_waiting, running.service._in_use, server_sockets


@contextmanager
def nothing_left(running):
    """Afterwards the next request is right, and slots, places, sockets, files and threads are as they were."""
    wanted = running.speak("Hi.").content
    running.http.get("/v1/audio/voices")  # has a thread of its own
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    assert running.speak("Hi.").content == wanted
    until(lambda: counts(running)[:3] == (0, 0, 0) and counts(running)[3] <= 1)
    until(lambda: threading.active_count() <= threads + 1 and len(os.listdir("/proc/self/fd")) <= files + 1)


@pytest.fixture
def healed(running):
    """``nothing_left`` by this test alone; the fixture ``running`` looks for it after all of them."""
    with nothing_left(running):
        yield


def use_fast_steps(monkeypatch):
    """Frames without a model."""
    steps = FastSteps()
    monkeypatch.setattr(csm.runner, "decode_frame", steps.decode_frame)
    monkeypatch.setattr(csm.runner.SlotDecoders, "decode", lambda decoder, *args: steps.decode(decoder, *args))
    return steps


def raw(running, data, read=True):
    """Send bytes on a socket of its own; the response's first line."""
    host, port = running.url[7:].split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        return connection.recv(65_536).split(b"\r\n")[0] if read else b""


def request_bytes(body, **headers):
    head = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": len(body), **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"POST /v1/audio/speech HTTP/1.1\r\n{lines}\r\n".encode() + body


SPEECH = json.dumps({"model": "csm", "voice": "alloy", "input": "Hi.", "response_format": "pcm"}).encode()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts files in /proc")
def test_two_hundred_clients_that_vanish(running, healed, monkeypatch):
    """At random points: in the headers, in the body, while waiting, between two pieces of audio; half by a reset."""
    use_fast_steps(monkeypatch)
    monkeypatch.setattr(running.service, "settings", replace(running.settings, max_seconds=20.0, max_queue=200))
    rng, data = np.random.default_rng(0), request_bytes(SPEECH)
    host, port = running.url[7:].split(":")
    for point in rng.permutation(200):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            if rng.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(data if point >= 80 else data[: rng.integers(1, len(data))])
            for _ in range(rng.integers(1, 8) if point >= 120 else 0):
                connection.recv(int(rng.integers(1, 8192)))
    monkeypatch.undo()


def test_a_vanished_client_frees_its_slot(running, healed, monkeypatch):
    """Its request would run for minutes."""
    step = csm.runner.decode_frame
    monkeypatch.setattr(csm.runner, "decode_frame", lambda *args: (time.sleep(0.02), step(*args)))
    monkeypatch.setattr(running.service, "settings", replace(running.settings, max_seconds=80.0))
    with running.http.stream("POST", "/v1/audio/speech", content=SPEECH, headers={"content-type": "application/json"}):
        until(lambda: running.engine.num_active == 1)
    until(lambda: running.engine.num_active == 0, 10)


def test_a_reader_that_stops_pauses_its_own_request_only(running, healed, monkeypatch):
    """Two and a half minutes of speech for a reader of a few bytes: the model does not run ahead."""
    steps = use_fast_steps(monkeypatch)
    monkeypatch.setattr(running.service, "settings", replace(running.settings, max_seconds=150.0))
    monkeypatch.setattr(running.service, "guards", NO_GUARDS)
    host, port = running.url[7:].split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(request_bytes(SPEECH))
        assert connection.recv(1) == b"H"

        def stalled():
            before = steps.count
            time.sleep(0.5)
            return steps.count == before

        until(stalled)
        assert 25 <= steps.count < 150 / 0.08
        assert running.engine.num_active == 1
        monkeypatch.setattr(running.service, "settings", running.settings)
        assert len(running.speak("Hi.").content) == 5 * 3840
    until(lambda: running.engine.num_active == 0)


def test_readers_of_one_byte_a_second(monkeypatch):
    """In three of four slots: each request pauses although its client reads on, and the fourth slot serves others."""
    steps = use_fast_steps(monkeypatch)
    model = Generator.from_pretrained(NOISE, device="cpu", max_streams=4)
    model.warmup([1])
    options = dict(max_streams=4, max_queue=4, max_seconds=150.0, guards=NO_GUARDS)
    with Running(model, **options) as running, ExitStack() as readers:
        connections = [readers.enter_context(socket.socket()) for _ in range(3)]
        for connection in connections:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", int(running.url.rsplit(":", 1)[1])))
            connection.sendall(request_bytes(SPEECH))
        until(lambda: running.engine.num_active == 3)
        monkeypatch.setattr(running.service, "settings", replace(running.settings, max_seconds=0.4))

        def paused():
            before = steps.count
            for connection in connections:
                assert len(connection.recv(1)) == 1
            time.sleep(1)
            return steps.count == before

        until(paused, 60)
        assert running.engine.num_active == 3
        for _ in range(3):
            assert len(running.speak("Hi.").content) == 5 * 3840
            assert running.engine.num_active == 3
        readers.close()
        until(lambda: counts(running)[:3] == (0, 0, 0) and counts(running)[3] <= 1)
        assert len(running.speak("Hi.").content) == 5 * 3840


def test_a_body_without_a_length_has_the_limit_too(running, healed):
    def chunks():
        for _ in range(80):
            yield b"[" * 65_536

    response = running.http.post("/v1/audio/speech", content=chunks(), headers={"content-type": "application/json"})
    assert response.status_code == 413


def test_a_full_queue_is_429(running, healed, monkeypatch):
    gate, step = threading.Event(), csm.runner.decode_frame
    monkeypatch.setattr(csm.runner, "decode_frame", lambda *args: (gate.wait(20), step(*args)))
    threads = [threading.Thread(target=running.speak, args=("Hi.",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: running.service._in_use == 3)
    with running.client() as client, pytest.raises(openai.RateLimitError) as caught:
        client.audio.speech.create(model="csm", voice="alloy", input="Hi.")
    assert caught.value.response.headers["retry-after"] == "1"
    gate.set()
    for thread in threads:
        thread.join()


def test_an_exception_in_the_step_is_500(running, healed, monkeypatch):
    monkeypatch.setattr(csm.runner, "decode_frame", lambda *_: 1 / 0)
    with running.client() as client, pytest.raises(openai.InternalServerError) as caught:
        client.audio.speech.create(model="csm", voice="alloy", input="Hi.")
    assert "division" not in str(caught.value)


def test_an_unexpected_exception_has_the_shape_of_the_others(running, healed, monkeypatch):
    monkeypatch.setattr(running.service.voices, "add", lambda *_: 1 / 0)
    response = upload(running, clip(1))
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "division" not in response.text


def fails_at(frame, monkeypatch):
    step, count = csm.runner.decode_frame, []

    def failing(*args):
        count.append(1)
        if len(count) == frame:
            time.sleep(0.3)  # the first frames have been sent
            raise ZeroDivisionError
        step(*args)

    monkeypatch.setattr(csm.runner, "decode_frame", failing)


def test_an_exception_after_the_first_audio_breaks_the_response_off(running, healed, monkeypatch):
    fails_at(3, monkeypatch)
    with pytest.raises(httpx.RemoteProtocolError):
        running.speak("Hi.")


def test_an_exception_after_the_first_audio_is_an_event(running, healed, monkeypatch):
    fails_at(3, monkeypatch)
    lines = running.speak("Hi.", stream_format="sse").text.strip().split("\n\n")
    assert json.loads(lines[-1][6:])["error"]["code"] == "generation_failed"


def test_a_request_that_takes_too_long_is_504(running, healed, monkeypatch):
    step = csm.runner.decode_frame
    monkeypatch.setattr(csm.runner, "decode_frame", lambda *args: (time.sleep(0.6), step(*args)))
    monkeypatch.setattr(running.service, "settings", replace(running.settings, request_timeout=0.3))
    assert running.speak("Hi.").status_code == 504


BODIES = [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"input": "\\ud800"}', b"{}" * 9]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_malformed_bodies(running, body):
    response = running.http.post("/v1/audio/speech", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
NAMES = ["model", "input", "voice", "speed", "seed", "temperature", "top_k", "speaker", "context", "session", "other"]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_any_json_is_answered(running, fields):
    fields = {"model": "csm", "voice": "alloy", "input": "Hi.", "response_format": "pcm", **fields}
    body = json.dumps(fields).encode()
    response = running.http.post("/v1/audio/speech", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404)


def upload(running, recording, **fields):
    data = {"name": "bob", "text": "Hello.", "consent": "Bob, by letter", **fields}
    return running.http.post("/v1/audio/voices", data=data, files={"audio_sample": ("a.wav", recording)})


def crc(data, polynomial, bits):
    value = 0
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = (value << 1) ^ (polynomial if value >> (bits - 1) else 0)
            value &= (1 << bits) - 1
    return value.to_bytes(bits // 8, "big")


@functools.cache
def bomb(frames=8192, block=65_535, channels=2, rate=24_000):
    """A FLAC file of 150 KB that unpacks to 2.1 GB of zeros, at 16 bits: each frame holds one constant a channel."""
    length = frames * block
    sizes = 2 * block.to_bytes(2, "big") + bytes(6)  # of blocks and of frames, least and most
    rates = (rate << 44 | channels - 1 << 41 | 15 << 36 | length).to_bytes(8, "big")
    info = sizes + rates + bytes(16)
    parts = [b"fLaC\x80" + len(info).to_bytes(3, "big") + info]
    for number in range(frames):
        coded = chr(number).encode()  # FLAC numbers frames in UTF-8
        head = b"\xff\xf8" + bytes([7 << 4 | 7, channels - 1 << 4 | 4 << 1]) + coded + (block - 1).to_bytes(2, "big")
        frame = head + crc(head, 0x07, 8) + bytes(3 * channels)
        parts.append(frame + crc(frame, 0x8005, 16))
    return b"".join(parts)


def test_the_bomb_is_one():
    with soundfile.SoundFile(io.BytesIO(bomb())) as file:
        assert 2 * len(file) * file.channels > 2e9
        assert not file.read(2 * file.samplerate, dtype="int16").any()


BAD_UPLOADS = {
    "not audio": (lambda: b"not audio at all", {}, 400, "cannot be decoded"),
    "empty": (lambda: b"", {}, 400, "cannot be decoded"),
    "cut off": (lambda: clip(1)[:50], {}, 400, "cannot be decoded|less than"),
    "too short": (lambda: clip(0.2), {}, 400, "less than 0.5 s"),
    "a bomb": (bomb, {}, 400, "longer than 60 s"),
    "too many channels": (lambda: clip(1, channels=3), {}, 400, "3 channels: send 1 or 2"),
    "too low a rate": (lambda: clip(1, rate=4000), {}, 400, "4000 Hz: send 8000 to 96000 Hz"),
    "too high a rate": (lambda: clip(1, rate=192_000), {}, 400, "192000 Hz: send 8000 to 96000 Hz"),
    "oversized": (lambda: bytes(11 << 20), {}, 413, "limit is"),
    "no consent": (lambda: clip(1), {"consent": " "}, 400, "consent"),
    "no transcript": (lambda: clip(1), {"text": ""}, 400, "text is missing"),
    "unknown field": (lambda: clip(1), {"cosnent": "x"}, 400, "unknown field"),
    "path": (lambda: clip(1), {"name": "../evil"}, 400, "name"),
    "nul": (lambda: clip(1), {"name": "a\0b"}, 400, "name"),
    "long": (lambda: clip(1), {"name": "a" * 10_000}, 400, "name"),
    "speaker": (lambda: clip(1), {"speaker": "-1"}, 400, "speaker"),
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_bad_uploads(running, name):
    recording, fields, status, message = BAD_UPLOADS[name]
    response = upload(running, recording(), **fields)
    assert response.status_code == status
    error = response.json()["error"]
    assert re.search(message, error["message"])
    if status == 400 and not fields:
        assert (error["param"], error["code"]) == ("audio_sample", "invalid_recording")
    assert list(running.settings.voices.iterdir()) == []


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (24_000, 2), (96_000, 2)])
def test_channels_are_averaged(rate, channels):
    audio_N, read_rate = read_recording(clip(0.5, rate, channels=channels))
    samples_NC, _ = soundfile.read(io.BytesIO(clip(0.5, rate, channels=channels)), dtype="float32", always_2d=True)
    assert read_rate == rate and np.allclose(audio_N, samples_NC.mean(axis=1), atol=1e-7)


@pytest.fixture
def folder(running):
    """The folder of voices, with one voice and three files that are none. Empty again afterwards."""
    path = running.settings.voices
    codes_TK = torch.ones(4, running.engine._state.codes_BK.shape[1], dtype=torch.int64)
    save_voice(Voice("good", ("Hello.",), (codes_TK,), 3), path / "good.safetensors")
    save_voice(Voice("foreign", ("Hello.",), (codes_TK[:, :2],), 3), path / "foreign.safetensors")
    (path / "bad.safetensors").write_bytes(b"not a voice")
    (path / "empty.safetensors").touch()
    yield path
    for file in path.iterdir():
        file.unlink()


def test_files_that_are_no_voices_are_the_servers_fault(running, healed, folder, caplog):
    """They are not listed, OpenAI's names do not lead to them, and an error says nothing of the server's folders."""
    for _ in range(2):
        listed = running.http.get("/v1/audio/voices").json()["voices"]
        assert [voice["id"] for voice in listed if voice["custom"]] == ["foreign", "good"]
    warnings = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert [re.search(r"(\w+)\.safetensors", message)[1] for message in warnings] == ["bad", "empty"]
    assert running.speak("Hi.", voice="ash").content == running.speak("Hi.", voice="good").content  # the second name
    for name in ("bad", "empty", "foreign"):
        with running.client() as client, pytest.raises(openai.InternalServerError) as caught:
            client.audio.speech.create(model="csm", voice=name, input="Hi.")
        assert caught.value.code == "voice_file_failed" and caught.value.type == "server_error"
        assert str(folder) not in caught.value.response.text
        assert str(folder / name) in caplog.text or name == "foreign"
    for name in ("nobody", "a" * 200, "\N{GOTHIC LETTER AHSA}" * 64):
        response = running.speak("Hi.", voice=name)
        assert response.status_code == 400 and response.json()["error"]["code"] == "voice_not_found"
    with connect(running.url.replace("http", "ws") + "/v1/audio/stream") as connection:  # an error before any text
        connection.send(json.dumps({"type": "start", "voice": "foreign"}))
        events = [json.loads(connection.recv(10)) for _ in range(3)]
    assert [event["type"] for event in events] == ["ready", "started", "error"]
    assert events[2]["error"]["code"] == "voice_file_failed"
    assert upload(running, clip(1), name="bad").status_code == 400
    assert running.http.delete("/v1/audio/voices/bad").json()["deleted"]
    assert not (folder / "bad.safetensors").exists()


def test_a_voice_that_cannot_be_written_is_the_servers_fault(running, healed, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("csm.voices.save_file", full)
    response = upload(running, clip(1))
    assert response.status_code == 500 and response.json()["error"]["code"] == "voice_file_failed"
    assert str(running.settings.voices) not in response.text and "No space left on device" in caplog.text
    monkeypatch.undo()
    assert list(running.settings.voices.iterdir()) == []


def test_a_slow_folder_holds_up_no_other_request(running, healed, monkeypatch):
    """Three lists, two of OpenAI's names and an upload wait for the disk: others are answered meanwhile."""
    store, disk, waiting, given_up = running.service.voices, threading.Event(), [], []

    def slowly(method):
        def slow(*args):
            waiting.append(method)
            if not disk.wait(5):
                given_up.append(method)
            return method(*args)

        return slow

    for name in ("files", "check_new"):
        monkeypatch.setattr(store, name, slowly(getattr(store, name)))
    with ThreadPoolExecutor(6) as pool:
        lists = [pool.submit(running.http.get, "/v1/audio/voices") for _ in range(3)]
        lists += [pool.submit(running.speak, "Hi.", voice="alloy") for _ in range(2)]
        until(lambda: running.service._in_use == 2)
        added = pool.submit(upload, running, clip(1), name="slow")
        until(lambda: len(waiting) == 2)  # lists have one thread
        assert running.http.get("/health").status_code == 200
        assert running.speak("Hi.", voice="speaker_1").status_code == 200
        assert not any(each.done() for each in (*lists, added))
        disk.set()
        assert [each.result().status_code for each in (*lists, added)] == [200] * 6
    assert not given_up
    monkeypatch.undo()
    assert running.http.delete("/v1/audio/voices/slow").status_code == 200


def test_a_body_of_too_many_values_is_not_parsed(running, healed):
    """Parsing one of 4 MiB would hold up all streams for 0.2 s, and a million errors for 10 s."""
    codes = json.dumps([[1] * 32] * 2048)  # all that the model's window takes
    assert codes.count(",") < 0.7 * MAX_VALUES
    body = SPEECH.replace(b"}", b', "context": [{"text": "Hi.", "codes": [[%s]]}]}' % (b"1," * MAX_VALUES + b"1"))
    response = running.http.post("/v1/audio/speech", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 413 and "too many values" in response.json()["error"]["message"]
    with pytest.raises(ProtocolError) as caught:
        parse(body.decode())
    assert caught.value.code == 1009
    fields = {"model": "csm", "voice": "alloy", "input": "Hi."}
    for wrong in (
        {"context": [{"text": "Hi.", "codes": [["a"] * 9] * 9}]},
        {str(number): 1 for number in range(99)},
        {"voice": {str(number): 1 for number in range(99)}},
    ):
        with pytest.raises(ValidationError) as errors:
            SpeechBody.model_validate({**fields, **wrong})
        assert errors.value.error_count() <= 2


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_multipart_is_answered(running, data):
    """An upload with a piece replaced by other bytes, or without its end."""
    whole = httpx.Request("POST", running.url, data={"name": "bob", "text": "Hello."}, files={"audio_sample": b"?" * 9})
    body, kind = whole.read(), whole.headers["content-type"]
    start, size = data.draw(st.integers(0, len(body))), data.draw(st.integers(0, len(body)))
    body = body[:start] + data.draw(st.binary(max_size=9)) + body[start + size :]
    response = running.http.post("/v1/audio/voices", content=body, headers={"content-type": kind})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("name", ["../x", "a\0b", "a" * 10_000, "/etc/passwd", "..%2fx", "anna.safetensors"])
def test_bad_voice_names(running, name, tmp_path):
    assert running.speak("Hi.", voice=name).status_code == 400
    assert running.http.delete(f"/v1/audio/voices/{quote(name, safe='')}").status_code == 404


def test_a_body_that_trickles_in_has_a_limit_too(running, healed):
    """A byte is never long in coming, and the body is never complete."""
    host, port = running.url[7:].split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request_bytes(SPEECH)[:-60])
        started = time.monotonic()
        for _ in range(50):
            with contextlib.suppress(ConnectionError):  # answered and closed meanwhile
                connection.sendall(b" ")
            if select.select([connection], [], [], 0.2)[0]:
                break
        assert connection.recv(65_536).split(b"\r\n")[0] == b"HTTP/1.1 408 Request Timeout"
        assert 0.9 < time.monotonic() - started < 5


def test_recordings_longer_than_the_window_are_refused_before_any_is_encoded(running, healed, monkeypatch):
    encoded = []
    monkeypatch.setattr("csm.serve.speech.encode_turns", lambda *arguments: encoded.append(arguments) or [])
    codes = torch.zeros(1500, running.engine._state.codes_BK.shape[1], dtype=torch.int64).tolist()
    turns = [{"speaker": 0, "text": "Hi.", "codes": codes}] * 2
    response = running.speak("Hi.", context=turns)
    assert response.status_code == 400 and "longer than the model's window" in response.json()["error"]["message"]
    assert len(encoded) == 1


def test_slow_bodies_and_idle_sockets_are_closed(running, healed):
    assert raw(running, request_bytes(SPEECH)[:-5]) == b"HTTP/1.1 408 Request Timeout"
    assert raw(running, b"POST /v1/aud") == b""
    assert raw(running, b"") == b""


def test_keys_hosts_and_origins(generator):  # noqa: F811
    with Running(generator, max_streams=2, max_seconds=0.1, api_keys=("first", KEY)) as running:
        for value in ("Bearer wrong", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", "Bearer", f"Basic {KEY}", KEY):
            assert running.http.get("/v1/models", headers={"Authorization": value}).status_code == 401
        assert running.http.get("/v1/models").status_code == 401
        with running.client("wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with running.client(KEY) as client:
            assert client.models.list().data
            assert len(client.audio.speech.create(model="csm", voice="alloy", input="Hi.").read()) > 0
        assert [running.http.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200, 200, 401]
        allowed = {"Authorization": f"Bearer {KEY}"}
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
            assert running.http.get("/v1/models", headers={**allowed, **headers}).status_code == 403


# What nginx sends to http://127.0.0.1:8000 by default, and with proxy_set_header Host $http_host (docs/serve.md).
BY_DEFAULT, FORWARDED = {"Host": "127.0.0.1:8000"}, {"Host": "tts.example.com:8443"}
PAGE = {"Origin": "https://tts.example.com:8443"}


def test_behind_a_proxy(generator):  # noqa: F811
    def statuses(running, headers):
        """Of a request, and of a WebSocket's handshake."""
        response = running.http.get("/v1/models", headers=headers)
        connection = socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1])))
        url = f"ws://{headers['Host']}/v1/audio/stream"
        try:
            with connect(url, sock=connection, origin=headers.get("Origin")):
                return response.status_code, 101
        except InvalidStatus as error:
            return response.status_code, error.response.status_code

    with Running(generator, max_streams=2) as running:
        assert statuses(running, BY_DEFAULT) == (200, 101)
        assert statuses(running, BY_DEFAULT | PAGE) == (403, 403)  # the page is of another site than the host
        assert statuses(running, FORWARDED) == (403, 403)
    with Running(generator, max_streams=2, allowed_hosts=("TTS.example.com",)) as running:
        assert statuses(running, BY_DEFAULT) == statuses(running, FORWARDED) == (200, 101)
        assert statuses(running, FORWARDED | PAGE) == (200, 101)
        assert statuses(running, {"Host": "evil.example"}) == (403, 403)
        assert statuses(running, FORWARDED | {"Origin": "https://evil.example"}) == (403, 403)
    with Running(generator, host="0.0.0.0", max_streams=2, allowed_hosts=("tts.example.com",)) as running:
        assert statuses(running, FORWARDED | PAGE) == (200, 101)
        assert statuses(running, {"Host": "evil.example"}) == (403, 403)
        for path, status in (("/health", 200), ("/ready", 200), ("/metrics", 403)):  # a probe names an address
            assert running.http.get(path, headers={"Host": "10.0.0.7:8000"}).status_code == status
        elsewhere = {"Host": "10.0.0.7:8000", "Origin": "https://evil.example"}
        assert running.http.get("/health", headers=elsewhere).status_code == 403
    options = parse_arguments(["serve", "--allowed-host", "tts.example.com", "--allowed-host", "localhost2"])
    assert read_settings(options).allowed_hosts == ("tts.example.com", "localhost2")
    for name in ("https://tts.example.com", "tts.example.com:8443"):
        with pytest.raises(CSMError, match="without scheme and port"):
            Settings(allowed_hosts=(name,))


def test_where_keys_come_from(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nb\n\n c \n")
    assert read_keys(["a"], file, "d, e,,") == ("a", "b", "c", "d", "e")
    assert read_keys([], None, None) == ()
    with pytest.raises(CSMError, match="cannot be read"):
        read_keys([], tmp_path / "none", None)
    with pytest.raises(CSMError, match="API key"):
        Settings(api_keys=("a b\n",))


@contextmanager
def server_process(*options):
    """A server in a process of its own: the process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "csm", "serve", "--model", NOISE, "--device", "cpu", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *options], env=environment, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: ready(url), 120)
        yield process, url
    finally:
        process.kill()
        process.wait()


def num_streams(url):
    """Requests that are being generated, as ``/metrics`` has it."""
    return int(re.search(r"^csm_streams (\d+)", httpx.get(f"{url}/metrics").text, flags=re.MULTILINE)[1])


def test_sigterm_finishes_what_runs_and_a_second_one_ends_the_rest():
    """Three responses are those that the same requests get alone. A fourth client does not read."""
    bodies = [{**json.loads(SPEECH), "model": "tts-1", "seed": seed} for seed in range(3)]
    slow = json.dumps({**bodies[0], "speed": 0.25}).encode()  # 24 s of audio: more than all buffers hold
    options = ("--max-streams", "4", "--max-seconds", "6")
    with server_process(*options) as (process, url), socket.socket() as stalled:

        def speak(body):
            return samples(httpx.post(f"{url}/v1/audio/speech", json=body, timeout=60).content)

        alone = [speak(body) for body in bodies]
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        stalled.sendall(request_bytes(slow))
        with ThreadPoolExecutor(3) as pool:
            together = pool.map(speak, bodies)
            until(lambda: num_streams(url) == 4)
            process.send_signal(signal.SIGTERM)
            until(lambda: not ready(url))
            for audio, wanted in zip(together, alone, strict=True):
                assert len(audio) == len(wanted) == 75 * 1920
                assert np.abs(audio - wanted).max() < 1e-3
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def ready(url):
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.HTTPError:
        return False


def test_the_load_tool(running, capsys):
    from csm.bench.command import main

    assert main(["--serve", running.url, "--clients", "2", "--seconds", "0.5"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["load"][0]
    assert row["clients"] == 2 and row["requests"] >= 2 and row["errors"] == "none"
    assert row["first audio p95 ms"] > 0 and row["x real time"] > 0
    assert main(["--serve", running.url, "--clients", "0"]) == 2


def test_a_player_that_runs_dry():
    from csm.metrics import Listener

    player = Listener()
    for now in (0.0, 0.1, 0.2, 0.5):  # 0.08 s each: 0.1 s in hand hold until 0.34
        player.arrive(now, 0.08)
    assert player.num_underruns == 1
    assert player.remaining(0.5) == pytest.approx(0.08)


@pytest.mark.slow
def test_sixty_four_clients_for_two_minutes(tiny):
    """Nothing lost, crossed or truncated: each response has the samples that its text and its own seed give alone.

    The memory stays flat, and slots, places and sockets are free afterwards.
    """
    from csm.bench.load import TURNS, body_of, run_clients
    from csm.metrics import resident_bytes

    bodies = [body_of(client, number) for client in range(CLIENTS) for number in range(TURNS)]
    given = dict(temperature=1.0, max_audio_length_ms=CLIP_SECONDS * 1000)  # 0.4 gives many seeds the same beginning
    alone = {}
    for body in bodies:
        chunks = list(tiny.stream(body["input"], 0, seed=body["seed"], **given))
        alone[body["input"], body["seed"]] = torch.cat(chunks).numpy().clip(-1, 1)
    assert len({audio.round(2).tobytes() for audio in alone.values()}) == len(bodies) == 256

    def as_alone(body, pcm):
        wanted = alone[body["input"], body["seed"]]
        return len(pcm) == 2 * len(wanted) and np.abs(samples(pcm) - wanted).max() < 1e-3

    options = dict(max_streams=8, max_seconds=CLIP_SECONDS, max_queue=CLIENTS, request_timeout=600)
    with Running(tiny, **options) as running:
        memory = []
        stop = threading.Event()

        def watch():
            while not stop.wait(LOAD_SECONDS / 24):
                memory.append(resident_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        fields = {"voice": "speaker_0", "temperature": 1.0}
        row = asyncio.run(run_clients(running.url, CLIENTS, LOAD_SECONDS, False, fields=fields, verify=as_alone))
        stop.set()
        watcher.join()
        print(row, [round(size / 1e6) for size in memory])
        assert row["errors"] == "none"
        assert max(memory[6:]) < 1.05 * memory[6]  # after a quarter of the time
        until(lambda: counts(running) == (0, 0, 0, 0))
