"""The server, by clients that do not know it: OpenAI's own, and ones that behave as LiveKit, pipecat, Open WebUI do."""

import asyncio
import base64
import io
import json
import re
import sys
import threading
import time
import wave
from dataclasses import replace

import av
import httpx
import numpy as np
import openai
import pytest
import torch
from test_structure import ROOT

import csm.runner
from csm import Generator, Guards, Segment
from csm.serve.app import create_app
from csm.serve.server import Server
from csm.serve.service import Service
from csm.serve.settings import Settings
from noise import NOISE

TEXT = "Hello there."
FRAMES = 8  # of a response
SECONDS = FRAMES * 0.08
LONG_SECONDS = 8.0  # so that an encoder's padding is below 1 %


class Running:
    """A server in a thread, on a free port of 127.0.0.1."""

    def __init__(self, generator, **settings):
        self.settings = Settings(port=1, **settings)
        self.service = Service(self.settings, lambda: generator)
        self.service.load_now()
        self.server = Server(create_app(self.service), self.settings)
        self.server.config.port = 0
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
        return self

    def __exit__(self, *_):
        self.http.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def client(self, key="none", **options):
        return openai.OpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0, timeout=60, **options)

    def speak(self, text=TEXT, **fields):
        body = {"model": "csm", "voice": "alloy", "input": text, "response_format": "pcm", "seed": 3, **fields}
        return self.http.post("/v1/audio/speech", json=body)

    @property
    def engine(self):
        return self.service._generator._worker.engine


@pytest.fixture(scope="module")
def generator():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = Generator.from_pretrained(NOISE, device="cpu", max_streams=2)
    generator.warmup([1])
    yield generator
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def running(generator, tmp_path_factory):
    """Each response has ``SECONDS``: noise does not end by itself."""
    folder = tmp_path_factory.mktemp("voices")
    with Running(generator, voices=folder, max_streams=2, max_seconds=SECONDS, max_queue=8) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    with running.client() as client:
        yield client


@pytest.fixture(scope="module")
def expected(generator):
    """The samples of TEXT with seed 3 and the voice alloy, that is speaker 0."""
    return generator.generate(TEXT, 0, max_audio_length_ms=SECONDS * 1000, seed=3).numpy()


TONE = torch.sin(torch.arange(1920) * 2 * torch.pi * 250 / 24_000) / 2  # 20 periods, in every frame


class FastSteps:
    """Steps that cost nothing: constant codes, and a tone from the codec. ``gate`` holds them up after 12 frames."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.count = 0

    def decode_frame(self, model, state, context_bucket):
        self.count += 1
        if self.count > 12:
            self.gate.wait(20)
        state.codes_BK.copy_(torch.randint(1, 256, state.codes_BK.shape))

    def decode(self, decoder, slot, codes_TK):
        return TONE.expand(codes_TK.shape[0], -1)


@pytest.fixture
def fast(running, monkeypatch):
    """Long speech without a model."""
    steps = FastSteps()
    monkeypatch.setattr(csm.runner, "decode_frame", steps.decode_frame)
    monkeypatch.setattr(csm.runner.SlotDecoders, "decode", lambda decoder, *args: steps.decode(decoder, *args))
    monkeypatch.setattr(running.service, "settings", replace(running.settings, max_seconds=LONG_SECONDS))
    return steps


def decoded(data):
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(audio=0))
    rate = frames[0].sample_rate
    resampler = av.AudioResampler("flt", "mono", rate)
    parts = [part.to_ndarray()[0] for frame in frames for part in resampler.resample(frame)]
    return np.concatenate(parts), rate


def samples(pcm):
    return np.frombuffer(pcm, "<i2") / 32767


FIELDS = {"model": "tts-1", "voice": "alloy", "input": TEXT, "extra_body": {"seed": 3}}


@pytest.mark.parametrize("format_name", ["mp3", "opus", "aac", "flac", "wav"])
def test_every_format_is_saved_and_decoded(client, fast, tmp_path, format_name):
    path = tmp_path / f"out.{format_name}"
    client.audio.speech.create(response_format=format_name, **FIELDS).write_to_file(path)
    audio, rate = decoded(path.read_bytes())
    assert len(audio) / rate == pytest.approx(LONG_SECONDS, rel=0.01)
    assert np.sqrt((audio**2).mean()) == pytest.approx(0.5 / 2**0.5, rel=0.08)  # LAME takes 5 % off
    assert pitch(audio, rate) == pytest.approx(250, abs=1)


def pitch(audio, rate):
    middle = audio[rate // 2 : -rate // 2]
    return np.abs(np.fft.rfft(middle * np.hanning(len(middle)))).argmax() * rate / len(middle)


def test_mp3_is_the_default_and_wav_and_pcm_are_exact(client, expected):
    default = client.audio.speech.create(**FIELDS)
    assert default.response.headers["content-type"] == "audio/mpeg"
    assert default.response.headers["x-csm-seed"] == "3"
    pcm = client.audio.speech.create(response_format="pcm", **FIELDS).read()
    assert np.abs(samples(pcm) - expected.clip(-1, 1)).max() < 1e-4
    wav = client.audio.speech.create(response_format="wav", **FIELDS).read()
    with wave.open(io.BytesIO(wav)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
    assert wav[44:] == pcm


@pytest.mark.parametrize("format_name", ["mp3", "opus", "aac", "flac", "wav", "pcm"])
def test_bytes_leave_while_the_rest_is_being_generated(running, client, fast, format_name):
    fast.gate.clear()
    with client.audio.speech.with_streaming_response.create(response_format=format_name, **FIELDS) as response:
        stream = response.iter_bytes()
        assert len(next(stream)) > 0
        assert running.engine.num_active == 1
        fast.gate.set()
        assert sum(map(len, stream)) > 10_000


def test_events(client, expected):
    fields = {**FIELDS, "model": "gpt-4o-mini-tts", "response_format": "pcm", "stream_format": "sse"}
    with client.audio.speech.with_streaming_response.create(**fields) as response:
        assert response.headers["content-type"] == "text/event-stream"
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    pcm = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert np.abs(samples(pcm) - expected.clip(-1, 1)).max() < 1e-4
    assert events[-1]["type"] == "speech.audio.done"
    tokens = len(f"[0]{TEXT}".encode()) + 2  # a token for each byte, one at the beginning and one at the end
    assert events[-1]["usage"] == {"input_tokens": tokens, "output_tokens": FRAMES, "total_tokens": FRAMES + tokens}


@pytest.mark.parametrize(
    ("fields", "accept", "sse"),
    [
        ({"model": "csm"}, "text/event-stream", True),
        ({"model": "csm"}, "*/*", False),
        ({"model": "csm", "stream_format": "audio"}, "text/event-stream", False),
        ({"model": "csm"}, "audio/mpeg, text/event-stream;q=0.5", True),
        ({"model": "csm", "stream_format": "sse"}, "application/octet-stream", True),
        ({"model": "tts-1", "stream_format": "sse"}, "*/*", False),
        ({"model": "tts-1-hd", "stream_format": "sse"}, "text/event-stream", False),
        ({"model": "tts-1"}, "text/event-stream", True),
        ({"model": "tts-1"}, "*/*", False),
    ],
)
def test_events_by_header_as_by_field(running, fields, accept, sse):
    """The table of docs/serve.md."""
    body = {"voice": "alloy", "input": "Hi.", "response_format": "pcm", **fields}
    response = running.http.post("/v1/audio/speech", json=body, headers={"Accept": accept})
    assert response.headers["content-type"].startswith("text/event-stream" if sse else "audio/pcm")


@pytest.mark.parametrize("speed", [0.25, 0.9, 1.5, 4.0])
def test_speed_keeps_the_pitch(running, fast, speed):
    audio = samples(running.speak(speed=speed).content)
    assert len(audio) == pytest.approx(LONG_SECONDS * 24_000 / speed, rel=0.01)
    assert pitch(audio, 24_000) == pytest.approx(250, abs=1)


@pytest.mark.parametrize("fields", [{"response_format": "aac"}, {"speed": 2.0}])
def test_without_pyav_the_error_says_so(running, monkeypatch, fields):
    monkeypatch.setitem(sys.modules, "av", None)
    response = running.speak("Hi.", **fields)
    assert response.status_code == 400
    assert "pip install av" in response.json()["error"]["message"]


ERRORS = [
    ({"voice": "nobody"}, openai.BadRequestError, "voice"),
    ({"input": ""}, openai.BadRequestError, "input"),
    ({"input": " \n "}, openai.BadRequestError, "input"),
    ({"input": "a" * 4097}, openai.BadRequestError, "input"),
    ({"speed": 5.0}, openai.BadRequestError, "speed"),
    ({"response_format": "ogg"}, openai.BadRequestError, "response_format"),
    ({"extra_body": {"sed": 1}}, openai.BadRequestError, "sed"),
    ({"extra_body": {"seed": -1}}, openai.BadRequestError, "seed"),
    ({"extra_body": {"temperature": "hot"}}, openai.BadRequestError, "temperature"),
    ({"extra_body": {"session": "../x"}}, openai.BadRequestError, "session"),
    ({"extra_body": {"context": [{"text": "a"}]}}, openai.BadRequestError, "context.0"),
    ({"extra_body": {"context": [{"text": "a", "audio": "AAAA"}]}}, openai.BadRequestError, "context.0"),
    ({"extra_body": {"context": [{"text": "a", "codes": [[1, 2]]}]}}, openai.BadRequestError, "context.0"),
    ({"extra_body": {"top_k": 10_000}}, openai.BadRequestError, None),
    ({"model": "whisper-1"}, openai.NotFoundError, "model"),
]


@pytest.mark.parametrize(("fields", "error", "param"), ERRORS)
def test_each_error_is_its_class(client, fields, error, param):
    with pytest.raises(error) as caught:
        client.audio.speech.create(**{**FIELDS, **fields})
    assert caught.value.param == param
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.body["message"]


def test_voices_and_speakers(running, client, generator):
    options = {"max_audio_length_ms": 400, "seed": 3}
    for fields, speaker in [
        ({"voice": {"id": "speaker_2"}}, 2),
        ({"voice": "echo"}, 5 % 4),
        ({"speaker": 7}, 7),
    ]:
        wanted = generator.generate(TEXT, speaker, **options).numpy().clip(-1, 1)
        assert np.abs(samples(running.speak(**fields).content)[: len(wanted)] - wanted).max() < 1e-4


def clip(seconds=1.0, rate=24_000, format_name="wav", channels=1):
    import soundfile

    noise = np.random.default_rng(0).normal(size=(int(seconds * rate), channels)) * 0.1
    file = io.BytesIO()
    soundfile.write(file, noise, rate, format=format_name)
    return file.getvalue()


def test_a_voice_is_uploaded_used_listed_and_deleted(running, client, generator):
    """By OpenAI's own client; the transcript goes into ``extra_body``."""
    recording = clip(1.0)
    extra = {"text": "What is said there.", "speaker": "1"}
    voice = client.audio.voices.create(
        name="anna", consent="by Anna, on paper", audio_sample=("a.wav", recording, "audio/wav"), extra_body=extra
    )
    assert (voice.id, voice.object) == ("anna", "audio.voice")
    listed = running.http.get("/v1/audio/voices").json()["voices"]
    assert listed[0] == {"id": "anna", "name": "anna", "custom": True}
    from csm.voices import load_voice

    kept = load_voice(running.settings.voices / "anna.safetensors")
    assert (kept.consent, kept.speaker, kept.texts) == ("by Anna, on paper", 1, ("What is said there.",))
    wanted = generator.generate(TEXT, 1, kept.segments(), 400, seed=3).numpy().clip(-1, 1)
    for name in ("anna", "alloy"):  # the only voice with a file takes OpenAI's names
        assert np.abs(samples(running.speak(voice=name).content)[: len(wanted)] - wanted).max() < 1e-4
    with pytest.raises(openai.BadRequestError, match="there is a voice"):
        client.audio.voices.create(name="anna", consent="x", audio_sample=recording, extra_body=extra)
    assert client.audio.voices.delete("anna").deleted
    with pytest.raises(openai.NotFoundError):
        client.audio.voices.delete("anna")


def test_context_and_sessions(running, generator):
    recording = clip(0.8)
    codes = generator.encode(torch.from_numpy(np.frombuffer(recording[44:], "<i2") / 32768).float())
    turns = [{"speaker": 1, "text": "Before.", "audio": base64.b64encode(recording).decode()}]
    by_audio = running.speak("Hi.", context=turns).content
    by_codes = running.speak("Hi.", context=[{"speaker": 1, "text": "Before.", "codes": codes.tolist()}]).content
    assert by_audio == by_codes != running.speak("Hi.").content
    first = running.speak("Hi.", session="talk")
    assert first.content == running.speak("Hi.", session="other").content
    second = running.speak("And you?", session="talk").content
    heard = Segment(0, "Hi.", codes=generator.generate_codes("Hi.", 0, max_audio_length_ms=SECONDS * 1000, seed=3))
    wanted = generator.generate("And you?", 0, [heard], 400, seed=3).numpy().clip(-1, 1)
    assert np.abs(samples(second)[: len(wanted)] - wanted).max() < 1e-4


def test_lists_as_open_webui_asks_for_them(running, client):
    assert client.models.list().data[0].id == "csm"
    assert client.models.retrieve("tts-1").owned_by == "csm"
    assert running.http.get("/v1/audio/models").json()["models"][0] == {"id": "csm", "name": "csm"}
    voices = [voice["id"] for voice in running.http.get("/v1/audio/voices").json()["voices"]]
    assert {"alloy", "nova", "speaker_0", "speaker_3"} <= set(voices)


# What the plugins send and read was looked up in their sources: livekit/agents, livekit-plugins-openai's tts.py at
# da6af86; pipecat-ai/pipecat, services/openai/tts.py at acead05 (both of August 2026). OpenAI's client adds the header
# Accept: application/octet-stream.


async def livekit(client, model):
    """The audio and the usage. ``stream_format`` depends on the model; the content type says how to read the body."""
    audio, usage = b"", None
    fields = {"input": TEXT, "model": model, "voice": "ash", "response_format": "mp3", "speed": 1.0}
    stream_format = "audio" if model in ("tts-1", "tts-1-hd") else "sse"
    timeout = httpx.Timeout(30, connect=10)
    speech = client.audio.speech.with_streaming_response
    async with speech.create(**fields, stream_format=stream_format, timeout=timeout) as response:
        if response.headers["content-type"].split(";")[0] != "text/event-stream":
            return b"".join([chunk async for chunk in response.iter_bytes()]), None
        async for line in response.iter_lines():
            if line.startswith("data: ") and line[6:] != "[DONE]":
                event = json.loads(line[6:])
                audio += base64.b64decode(event.get("delta", "") or event.get("audio", ""))
                usage = event.get("usage", usage)
    return audio, usage


@pytest.mark.parametrize("model", ["gpt-4o-mini-tts", "tts-1", "csm"])
def test_a_client_like_livekits(running, fast, model):
    async def talk():
        transport = httpx.AsyncClient(timeout=httpx.Timeout(5.0, connect=15.0), follow_redirects=True)
        options = {"api_key": "none", "base_url": f"{running.url}/v1", "max_retries": 0, "http_client": transport}
        async with openai.AsyncClient(**options) as client:
            with pytest.raises(openai.NotFoundError):  # it opens a connection in advance, and ignores the answer
                await client.get("/", cast_to=str)
            return await livekit(client, model)

    audio, usage = asyncio.run(talk())
    assert len(decoded(audio)[0]) / 24_000 == pytest.approx(LONG_SECONDS, rel=0.01)
    num_frames = round(LONG_SECONDS / 0.08)
    tokens = len(f"[1]{TEXT}".encode()) + 2  # ash is speaker 1
    usage_of_events = {"input_tokens": tokens, "output_tokens": num_frames, "total_tokens": tokens + num_frames}
    assert usage == (None if model == "tts-1" else usage_of_events)


async def pipecat(url, **settings):
    """It reads raw PCM by half seconds. ``instructions`` and ``speed`` are left out unless they are set."""
    fields = {"input": TEXT, "model": "gpt-4o-mini-tts", "voice": "alloy", "response_format": "pcm", **settings}
    client = openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1")
    async with client, client.audio.speech.with_streaming_response.create(**fields) as response:
        assert response.status_code == 200
        return [chunk async for chunk in response.iter_bytes(24_000)]


def test_a_client_like_pipecats(running, expected):
    seed = {"extra_body": {"seed": 3}}  # the one field that it does not send
    chunks = asyncio.run(pipecat(running.url, instructions="Cheerful.", speed=1.0, **seed))
    assert [len(chunk) for chunk in chunks] == [24_000, 2 * len(expected) - 24_000]
    assert np.abs(samples(b"".join(chunks)) - expected.clip(-1, 1)).max() < 1e-4
    with pytest.raises(openai.BadRequestError):  # the one class of errors that it handles
        asyncio.run(pipecat(running.url, speed=5.0))


def test_requests_at_once_are_not_mixed_up(running):
    """Each gets the samples that it gets alone."""
    alone = [running.speak("Hi.", seed=seed).content for seed in range(3)]
    results = [b""] * 3

    def ask(seed):
        results[seed] = running.speak("Hi.", seed=seed).content

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == alone
    assert len(set(alone)) == 3


def test_the_example_of_the_docs(running, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serve.md").read_text(), flags=re.DOTALL)
    exec(code.replace("http://127.0.0.1:8000", running.url), {})
    assert (tmp_path / "hello.wav").stat().st_size == 44 + FRAMES * 3840


def test_health_and_metrics(running):
    assert running.http.get("/health").json() == {"status": "ok"}
    assert running.http.get("/ready").json() == {"status": "ready"}
    running.speak("Hi.")
    response = running.http.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    text = response.text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['csm_requests_total{outcome="length"}']) >= 1
    assert float(values["csm_audio_seconds_total"]) >= SECONDS
    assert float(values["csm_first_audio_seconds_count"]) >= 1
    assert float(values["csm_streams"]) == float(values["csm_queue"]) == 0
    assert float(values["csm_memory_bytes"]) > 1e8
    assert {"csm_underruns_total", "csm_frame_lateness_seconds_count", "csm_rtf_count"} <= set(values)


def test_the_guards_are_on_and_counted(generator):
    guards = Guards(spare_seconds=0.3, seconds_per_character=0.1)
    with Running(generator, max_streams=2, guards=guards) as running:
        assert len(running.speak("Hi.").content) // 3840 in range(8, 13)
        assert 'csm_guard_events_total{guard="budget"} 1.0' in running.http.get("/metrics").text


def test_an_idle_model_is_unloaded_and_loaded_again(generator):
    with Running(generator, max_seconds=0.4, unload_after=0.3) as running:
        before = running.speak("Hi.").content
        until(lambda: running.http.get("/ready").status_code == 503)
        assert running.service._generator is None
        assert running.speak("Hi.").content == before


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
