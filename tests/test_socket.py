"""The WebSocket: the samples of the HTTP route however the text arrives; nothing left in use whatever clients do."""

import asyncio
import base64
import json
import os
import random
import re
import socket as sockets
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_serve import FastSteps, Running, generator, until  # noqa: F401 - a fixture
from test_serve_faults import counts, fails_at
from test_structure import ROOT
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import csm.runner
import csm.serve.socket
import csm.serve.speech
import csm.worker
from csm import Generator, Segment
from csm.guards import NO_GUARDS
from csm.serve.messages import Start
from csm.serve.service import Service
from csm.serve.settings import Settings
from csm.serve.turns import Turn
from noise import NOISE

FRAMES = 4  # of a clause: noise does not end by itself
FRAME_BYTES = 3840
TEXT = "Good morning, my old friend, how are you today? I am well."
CLAUSES = ["Good morning, my old friend,", "how are you today? I am well."]
PATH = "/v1/audio/stream"


pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts files in /proc")


@pytest.fixture(scope="module")
def running(generator):  # noqa: F811
    options = dict(max_streams=2, max_queue=64, max_seconds=FRAMES * 0.08, send_timeout=5.0, guards=NO_GUARDS)
    with Running(generator, **options) as running:
        running.speak("Hi.")
        yield running


def address(running):
    return running.url.replace("http", "ws") + PATH


@pytest.fixture
def healed(running):
    """After the test: slots, places, sockets, tasks, threads and files are as they were, and a request succeeds."""
    wanted = running.speak("Hi.").content
    until(lambda: counts(running)[:3] == (0, 0, 0))
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    until(lambda: not running.service.sockets and counts(running)[:3] == (0, 0, 0) and counts(running)[3] <= 1)
    until(lambda: len(running.server.server_state.tasks) <= 1)
    until(lambda: threading.active_count() <= threads + 1 and len(os.listdir("/proc/self/fd")) <= files + 1)
    assert running.speak("Hi.").content == wanted


class Client:
    """A client that sends messages as fields, and reads a turn."""

    def __init__(self, connection):
        self.connection = connection
        assert json.loads(connection.recv(30))["type"] == "ready"

    def send(self, kind, **fields):
        self.connection.send(json.dumps({"type": kind, **fields}))

    def event(self):
        """The next event, and the audio before it."""
        audio = b""
        while isinstance(message := self.connection.recv(30), bytes):
            audio += message
        return json.loads(message), audio

    def until(self, *kinds):
        """The event of this type, and all audio before it."""
        audio = b""
        while True:
            event, more = self.event()
            audio += more
            if event["type"] in kinds:
                return event, audio

    def turn(self, text, **fields):
        self.send("start", **{"voice": "alloy", "seed": 3, **fields})
        self.send("text", text=text)
        self.send("end")
        return self.until("done", "error")


def test_the_oldest_turns_leave_a_sockets_history():
    """The window of the embedded voice's shape; nothing leaves before the model is loaded."""
    turn = Turn(None, Start(type="start", voice="alloy", seed=1), "", [], None)
    spoken = [Segment(0, str(number), codes=torch.zeros(100, 8, dtype=torch.int64)) for number in range(30)]
    assert turn.followed_by(spoken) == spoken
    turn._max_positions = 2048
    kept = turn.followed_by(spoken)
    assert kept == spoken[-len(kept) :] and 5 < len(kept) < 20


def test_an_open_turn_lets_an_idle_model_go(monkeypatch):
    """While a turn waits for text, the model is unloaded and its memory is free; more text loads it again."""
    monkeypatch.setattr(csm.worker, "LINGER_SECONDS", 0.05)  # the engine's thread holds the model so long
    models, sent = [], []

    def load():
        loaded = Generator.from_pretrained(NOISE, device="cpu")
        _ = loaded.codec
        models.append(weakref.ref(loaded.model))
        return loaded

    async def send(message):
        sent.append(message)

    async def speak():
        service = Service(Settings(max_seconds=0.16, unload_after=0.2), load)
        turn = Turn(service, Start(type="start", voice="alloy", seed=1), "", [], send)
        tasks = [asyncio.ensure_future(work) for work in (turn.run(), service.unload_when_idle())]
        turn.push("Hi.")
        turn.flush()
        await asyncio.to_thread(until, lambda: turn.clauses and turn.clauses[0].complete)
        await asyncio.to_thread(until, lambda: all(model() is None for model in models))
        assert not tasks[0].done()
        models.clear()
        turn.push("Again.")
        turn.end()
        await tasks[0]
        tasks[1].cancel()
        service.close()
        return turn

    turn = asyncio.run(speak())
    assert len(models) == 1 and all(clause.complete for clause in turn.clauses)
    assert sum(len(message) for message in sent if isinstance(message, bytes)) == 2 * 2 * FRAME_BYTES


@pytest.fixture
def client(running):
    with connect(address(running)) as connection:
        yield Client(connection)


def by_http(running, clauses, session):
    """The samples of the HTTP route for these clauses, as turns of a session."""
    return b"".join(running.speak(each["text"], seed=each["seed"], session=session).content for each in clauses)


def pieces_of(text, rng):
    while text:
        size = rng.randint(1, 12)
        yield text[:size]
        text = text[size:]


WORDS = "the a small red house stands near old river and we go there often because it rains today".split()


def random_text(rng):
    words = rng.choices(WORDS, k=14)
    return " ".join(word + rng.choice(["", "", "", ",", ".", "!", ";"]) for word in words)


# Samples


def test_a_turn_has_the_samples_of_the_http_route(running, client, generator):  # noqa: F811
    event, audio = client.turn("Good morning.")
    assert audio == running.speak("Good morning.").content
    wanted = generator.generate("Good morning.", 0, max_audio_length_ms=FRAMES * 80, seed=3).numpy()
    assert np.abs(np.frombuffer(audio, "<i2") / 32767 - wanted.clip(-1, 1)).max() < 1e-4
    assert event["seconds"] == pytest.approx(FRAMES * 0.08)


def test_several_turns_are_one_conversation(running, client):
    audio, clauses = b"", []
    for text in (TEXT, "And you, my friend?"):
        event, more = client.turn(text)
        audio, clauses = audio + more, clauses + event["clauses"]
    assert [each["text"] for each in clauses] == [*CLAUSES, "And you, my friend?"]
    assert [each["seed"] for each in clauses] == [3, 4, 3]
    assert [each["end"] for each in clauses] == pytest.approx([0.32, 0.64, 0.32])
    assert audio == by_http(running, clauses, "conversation")


def test_keys_and_values_of_earlier_turns_stay(running, client, generator, monkeypatch):  # noqa: F811
    found = []
    load = generator._prefix_cache.load
    monkeypatch.setattr(generator._prefix_cache, "load", lambda *args: found.append(load(*args)) or found[-1])
    client.turn("Some text that no other test has.")
    client.turn("The answer to it.")
    first_turn = generator.num_positions(Segment(0, "Some text that no other test has.")) + FRAMES
    assert found[-1] >= first_turn - 1


@pytest.mark.parametrize("fields", [{"speed": 2.0}, {"voice": "echo"}, {"temperature": 0.0}, {"speaker": 7}])
def test_fields_of_a_turn(running, client, fields):
    _, audio = client.turn("Hello there.", **fields)
    assert audio == running.speak("Hello there.", **fields).content


def test_speech_starts_before_the_text_has_ended(client):
    client.send("start", voice="alloy", seed=3)
    client.send("text", text="Good morning, my old friend, how a")
    assert client.until("clause")[0]["text"] == CLAUSES[0]
    client.send("text", text="re you")
    client.send("flush")
    assert client.until("clause")[0]["text"] == "how are you"
    client.send("end")
    assert client.until("done")[0]["seconds"] == pytest.approx(2 * FRAMES * 0.08)


def test_sentences_instead_of_clauses(client):
    event, _ = client.turn(TEXT, split="sentence")
    assert [each["text"] for each in event["clauses"]] == [
        "Good morning, my old friend, how are you today?", "I am well.",
    ]  # fmt: skip


def test_context_that_was_not_generated_here(running, client, generator):  # noqa: F811
    codes = generator.generate_codes("Before.", 1, max_audio_length_ms=400, seed=1).tolist()
    context = [{"text": "Before.", "speaker": 1, "codes": codes}]
    assert client.turn("Hi.", context=context)[1] == running.speak("Hi.", context=context).content


# Barge-in


@pytest.fixture
def slow(running, monkeypatch):
    """Long speech of 30 ms a frame. Its ``closed`` has the count of steps when a request was closed."""
    steps = FastSteps()

    def decode_frame(*args):
        steps.decode_frame(*args)
        time.sleep(0.03)

    close = csm.serve.speech.Job.close
    steps.closed = []
    monkeypatch.setattr(csm.serve.speech.Job, "close", lambda job: (steps.closed.append(steps.count), close(job)))
    monkeypatch.setattr(csm.runner, "decode_frame", decode_frame)
    monkeypatch.setattr(csm.runner.SlotDecoders, "decode", lambda decoder, *args: steps.decode(decoder, *args))
    monkeypatch.setattr(running.service, "settings", replace(running.settings, max_seconds=60.0))
    return steps


def test_cancel_frees_the_slot_within_a_frame(running, healed, slow, client):
    client.send("start", voice="alloy")
    client.send("text", text=TEXT)
    assert client.until("clause")[0]["text"] == CLAUSES[0]
    first = client.connection.recv(30)
    client.send("cancel")
    event, audio = client.until("cancelled")
    assert running.engine.num_active == 0
    assert slow.count <= slow.closed[-1] + 1
    assert event["seconds"] == pytest.approx(len(first + audio) / 48_000, abs=0.001)
    assert CLAUSES[0].startswith(event["text"]) and event["text"] != CLAUSES[0]


def test_cancel_while_the_text_is_incomplete(running, healed, client):
    client.send("start", voice="alloy")
    client.send("text", text="Good")
    client.send("cancel")
    event, audio = client.until("cancelled")
    assert (event["seconds"], event["text"], audio) == (0, "", b"")
    assert client.turn("Good morning.")[1] == running.speak("Good morning.").content


def test_what_was_heard_is_kept_and_nothing_else(running, client, generator):  # noqa: F811
    """A cancellation while the player still plays what is complete: the second clause was heard to its half."""
    client.turn(TEXT)
    client.send("cancel", played=0.32 + 0.17)
    cancelled, _ = client.until("cancelled")
    assert cancelled["seconds"] == pytest.approx(0.49)
    assert cancelled["text"] == f"{CLAUSES[0]} how are you"
    _, audio = client.turn("And now?")
    options = {"max_audio_length_ms": FRAMES * 80, "seed": 3}
    first = Segment(0, CLAUSES[0], codes=generator.generate_codes(CLAUSES[0], 0, **options))
    second = generator.generate_codes(CLAUSES[1], 0, [first], FRAMES * 80, seed=4)
    context = [
        {"text": CLAUSES[0], "codes": first.codes.tolist()},
        {"text": "how are you", "codes": second[:2].tolist()},
    ]
    assert audio == running.speak("And now?", context=context).content
    client.send("cancel", played=0)
    assert client.until("cancelled")[0]["text"] == ""


# Errors

TURN_ERRORS = [
    ({"voice": "nobody"}, "voice", "voice_not_found"),
    ({"context": [{"text": "a"}]}, "context.0", None),
    ({"top_k": 10_000}, None, None),
]
MESSAGE_ERRORS = [
    ({"type": "start"}, "voice", None),
    ({"type": "start", "voice": "alloy", "sed": 1}, "sed", "unknown_parameter"),
    ({"type": "start", "voice": "alloy", "speed": 9}, "speed", None),
    ({"type": "start", "voice": "alloy", "model": "whisper-1"}, "model", "model_not_found"),
    ({"type": "text", "text": "\ud800"}, "text", None),
    ({"type": "text", "text": "a" * 5000}, "text", None),
    ({"type": "text", "text": "a" * 2**20}, "text", None),
    ({"type": "text", "text": "There is no turn."}, None, "no_turn"),
    ({"type": "end"}, None, "no_turn"),
    ({"type": "cancel"}, None, "no_turn"),
    ({"type": "cancel", "played": -1}, "played", None),
]


@pytest.mark.parametrize(("fields", "param", "code"), TURN_ERRORS)
def test_a_turn_that_fails_leaves_the_socket(running, healed, client, fields, param, code):
    event, _ = client.turn("Hello there.", **fields)
    assert (event["type"], event["turn"], event["error"]["param"], event["error"]["code"]) == ("error", 1, param, code)
    assert client.turn("Good morning.")[1] == running.speak("Good morning.").content


@pytest.mark.parametrize(("message", "param", "code"), MESSAGE_ERRORS)
def test_a_message_that_is_wrong_leaves_the_socket(running, healed, client, message, param, code):
    client.connection.send(json.dumps(message))
    event, _ = client.event()
    assert (event["type"], event["error"]["param"], event["error"]["code"]) == ("error", param, code)
    assert client.turn("Good morning.")[1] == running.speak("Good morning.").content


def test_a_second_start_is_refused(client):
    client.send("start", voice="alloy")
    client.send("start", voice="alloy")
    assert client.until("error")[0]["error"]["code"] == "turn_in_progress"


def test_too_much_text_is_refused_and_none_of_it_taken(running, healed, client):
    client.send("start", voice="alloy")
    for _ in range(5):
        client.send("text", text="a" * 4096)
    assert client.until("error")[0]["error"]["code"] == "text_queue_full"
    client.send("cancel")
    client.until("cancelled")
    assert client.turn("Good morning.")[1] == running.speak("Good morning.").content


FRAMES_OUT_OF_PROTOCOL = {
    "binary": (b"abc", 1003),
    "no JSON": ("{", 1008),
    "deep": ("[" * 100_000, 1008),
    "no object": ("[]", 1008),
    "no type": ("{}", 1008),
    "unknown type": ('{"type": "speak"}', 1008),
    "list as type": ('{"type": []}', 1008),
    "long": (json.dumps({"type": "text", "text": "a" * (5 << 20)}), 1009),
}


@pytest.mark.parametrize("name", FRAMES_OUT_OF_PROTOCOL)
def test_frames_out_of_protocol_close_the_socket(running, healed, client, name):
    frame, code = FRAMES_OUT_OF_PROTOCOL[name]
    with pytest.raises(ConnectionClosed) as caught:
        client.connection.send(frame)
        while True:
            client.event()
    if name == "long" and caught.value.rcvd is None:
        return  # the server closes while the client still sends, which can reset the connection before it reads
    assert caught.value.rcvd.code == code


def test_an_exception_in_the_step_ends_the_turn(running, healed, client, monkeypatch):
    with monkeypatch.context() as patch:
        fails_at(2, patch)
        event, _ = client.turn("Hello there.")
    assert event["error"]["code"] == "generation_failed" and "division" not in json.dumps(event)
    assert client.turn("Good morning.")[0]["type"] == "done"


# Limits


def refused(running, **options):
    with pytest.raises(InvalidStatus) as caught:
        connect(address(running), **options)
    return caught.value.response.status_code


def test_keys_origins_and_the_number_of_sockets(generator, monkeypatch):  # noqa: F811
    key = "correct horse~/?>"
    with Running(generator, max_streams=2, api_keys=("first", key)) as running:

        def as_subprotocol(value):
            return ["csm.v1", "csm.key." + base64.urlsafe_b64encode(value.encode()).decode().rstrip("=")]

        bearer = {"additional_headers": {"Authorization": f"Bearer {key}"}}
        assert refused(running) == 401
        assert refused(running, additional_headers={"Authorization": "Bearer wrong"}) == 401
        for wrong in (as_subprotocol("wrong"), as_subprotocol(key[:-1]), ["csm.v1"], ["csm.key.a"], ["csm.key."]):
            assert refused(running, subprotocols=wrong) == 401
        assert refused(running, origin="https://evil.example", **bearer) == 403
        with connect(address(running), origin=running.url, **bearer) as connection:
            Client(connection)
            monkeypatch.setattr(csm.serve.socket, "MAX_SOCKETS", 1)
            until(lambda: running.service.sockets)
            assert refused(running, **bearer) == 429
        until(lambda: not running.service.sockets)
        with connect(address(running), subprotocols=as_subprotocol(key)) as connection:
            assert connection.subprotocol == "csm.v1"
            Client(connection)


def test_the_rate_of_messages_is_limited(running, healed, client, monkeypatch):
    with pytest.raises(ConnectionClosed) as caught:
        for _ in range(2000):
            client.send("text", text="")
        while True:
            client.event()
    assert caught.value.rcvd.code == 1008 and "200 a second" in caught.value.rcvd.reason


def test_silent_peers_are_closed(running, healed, monkeypatch):
    monkeypatch.setattr(running.service, "settings", replace(running.settings, socket_idle_timeout=0.5))
    for started in (False, True):
        with connect(address(running)) as connection:
            client = Client(connection)
            if started:
                client.send("start", voice="alloy")
                client.send("text", text="And then")
            with pytest.raises(ConnectionClosed) as caught:
                client.until("never")
        assert caught.value.rcvd.code == 1001


def handshake(running):
    """A socket without a WebSocket library, for what no library does."""
    host, port = running.url[7:].split(":")
    connection = sockets.socket()
    connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    lines = [f"GET {PATH} HTTP/1.1", f"Host: {host}:{port}", "Upgrade: websocket", "Connection: Upgrade"]
    lines += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: " + base64.b64encode(bytes(16)).decode(), "", ""]
    connection.sendall("\r\n".join(lines).encode())
    assert connection.recv(12) == b"HTTP/1.1 101"
    return connection


def text_frame(**message):
    """RFC 6455, section 5.2: a short text frame, masked with zeros."""
    data = json.dumps(message).encode()
    assert len(data) < 126
    return bytes([0x81, 0x80 | len(data)]) + bytes(4) + data


def test_a_client_that_does_not_read_is_cut(running, healed, monkeypatch):
    """Its request pauses, and the connection does not outlive the limits, although its buffers are full."""
    steps = FastSteps()
    monkeypatch.setattr(csm.runner, "decode_frame", steps.decode_frame)
    monkeypatch.setattr(csm.runner.SlotDecoders, "decode", lambda decoder, *args: steps.decode(decoder, *args))
    monkeypatch.setattr(running.service, "settings", replace(running.settings, max_seconds=150.0, send_timeout=0.5))
    with handshake(running) as connection:
        connection.sendall(text_frame(type="start", voice="alloy") + text_frame(type="text", text=TEXT[:60]))
        until(lambda: running.engine.num_active == 1)
        until(lambda: running.engine.num_active == 0)
        assert 25 <= steps.count < 150 / 0.08
        until(lambda: not running.service.sockets and counts(running)[3] == 0)


def test_clients_that_vanish(running, healed):
    """Without a closing frame: before a turn, within its text, and while it is generated."""
    for _ in range(3):
        for frames in ([], [text_frame(type="start", voice="alloy")], [*STARTED, text_frame(type="end")]):
            with handshake(running) as connection:
                connection.sendall(b"".join(frames)[: random.Random(0).randint(1, 500)])


STARTED = [text_frame(type="start", voice="alloy"), text_frame(type="text", text=TEXT)]


def test_a_server_that_shuts_down_completes_the_turn(generator):  # noqa: F811
    with Running(generator, max_streams=2, max_seconds=FRAMES * 0.08, guards=NO_GUARDS) as running:
        with connect(address(running)) as connection, connect(address(running)) as idle:
            client = Client(connection)
            client.send("start", voice="alloy")
            client.send("text", text=TEXT)
            client.until("clause")
            running.server.handle_exit(15, None)
            with pytest.raises(ConnectionClosed) as caught:
                Client(idle).until("never")
            assert caught.value.rcvd.code == 1012
            client.send("end")
            assert client.until("done")[0]["seconds"] == pytest.approx(2 * FRAMES * 0.08)
            with pytest.raises(ConnectionClosed) as caught:
                client.until("never")
            assert caught.value.rcvd.code == 1012
        until(lambda: not running.thread.is_alive())


# Everything at once


async def read_turn(connection):
    audio = b""
    async for message in connection:
        if isinstance(message, bytes):
            audio += message
            continue
        event = json.loads(message)
        if event["type"] in ("done", "cancelled", "error"):
            return event, audio
    raise AssertionError("closed")


async def send(connection, kind, **fields):
    await connection.send(json.dumps({"type": kind, **fields}))


async def speak_in_pieces(connection, text, rng, seed):
    await send(connection, "start", voice="alloy", seed=seed)
    for piece in pieces_of(text, rng):
        await send(connection, "text", text=piece)
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.05)
    await send(connection, "end")


async def one_of_many(running, index):
    """Roles: read all, interrupt and go on, fall silent and vanish, break the protocol, and send 1 MB at once."""
    rng, role, heard = random.Random(index), index % 4, []
    async with connect_async(address(running), max_queue=None) as connection:
        await connection.recv()
        if role == 1:
            await send(connection, "start", voice="alloy", seed=index)
            await send(connection, "text", text=random_text(rng))
            await asyncio.sleep(rng.random())
            await send(connection, "cancel", played=0)
            assert (await read_turn(connection))[0]["type"] == "cancelled"
        if role == 2:
            await send(connection, "start", voice="alloy")
            await send(connection, "text", text=random_text(rng))
            await asyncio.sleep(rng.random())
            connection.transport.abort()
            return heard
        if role == 3:
            await send(connection, "text", text="a" * 2**20)
            assert (await read_turn(connection))[0]["error"]["param"] == "text"
        for turn in range(2):
            await speak_in_pieces(connection, random_text(rng), rng, index + turn)
            heard.append(await read_turn(connection))
        if role == 3:
            await connection.send(rng.choice([b"\0", "{", "[]"]))
            with pytest.raises(ConnectionClosed):
                while True:
                    await read_turn(connection)
    return heard


def test_thirty_two_sockets(running, healed):
    """Each turn that was read to its end has the samples of the HTTP route, whatever the other sockets do."""

    async def all_at_once():
        return await asyncio.gather(*(one_of_many(running, index) for index in range(32)))

    for index, heard in enumerate(asyncio.run(all_at_once())):
        for event, _ in heard:
            assert event["type"] == "done", event
        clauses = [clause for event, _ in heard for clause in event["clauses"]]
        assert b"".join(audio for _, audio in heard) == by_http(running, clauses, f"many-{index}")


def test_the_example_of_the_docs(running, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "websocket.md").read_text(), flags=re.DOTALL)
    assert len(code.splitlines()) <= 20
    exec(code.replace("ws://127.0.0.1:8000", running.url.replace("http", "ws")), {})
    assert (tmp_path / "out.wav").stat().st_size == 44 + 2 * FRAMES * FRAME_BYTES
    assert torch.get_num_threads() == 1
