"""The public surface: seeds, batches, streams, limits."""

import itertools
import threading

import numpy as np
import pytest
import torch

import csm.prefix_cache
import csm.runner
from csm import AudioError, CSMError, Generator, RoomWarning, SamplingError, Segment, SpeechRequest
from noise import NOISE


def speak(generator, text="Hello there.", milliseconds=1600, **options):
    return generator.generate(text, 0, max_audio_length_ms=milliseconds, **options)


def test_the_same_seed_repeats_and_another_does_not(noisy):
    first, again, other = (speak(noisy, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32
    assert first.shape == (20 * 1920,)
    assert torch.isfinite(first).all()
    assert first.std() > 0.01


def test_without_a_seed_torchs_generator_decides(noisy):
    torch.manual_seed(3)
    first, second = speak(noisy), speak(noisy)
    torch.manual_seed(3)
    assert torch.equal(speak(noisy), first)
    assert not torch.equal(first, second)


def test_generate_is_the_stream(noisy):
    chunks = list(noisy.stream("Hello there.", 0, max_audio_length_ms=1600, seed=5))
    assert [chunk.shape for chunk in chunks] == [(1920,)] * 20
    assert torch.equal(torch.cat(chunks), speak(noisy, seed=5))


def test_generate_is_decode_of_generate_codes(noisy):
    codes = noisy.generate_codes("Hello there.", 0, max_audio_length_ms=1600, seed=5)
    assert codes.shape == (20, 8)
    assert codes.dtype == torch.int64
    assert (noisy.decode(codes) - speak(noisy, seed=5)).abs().max() <= 1e-4


REQUESTS = [
    dict(text="Hello.", speaker=0, max_audio_length_ms=2000, seed=1),
    dict(text="A longer sentence, by somebody else.", speaker=3, max_audio_length_ms=2000, seed=2, temperature=0.6),
    dict(text="Three.", speaker=1, max_audio_length_ms=800, seed=3, topk=10),
]


def test_a_batch_of_three_gives_the_codes_of_each_alone(noisy):
    turn = Segment(3, "Before.", codes=torch.randint(256, (9, 8), generator=torch.Generator().manual_seed(0)))
    requests = [REQUESTS[0], {**REQUESTS[1], "context": [turn]}, REQUESTS[2]]
    together = noisy.generate_codes_batch(requests)
    for request, codes in zip(requests, together, strict=True):
        alone = noisy.generate_codes(**request)
        assert codes.shape == (request["max_audio_length_ms"] // 80, 8)
        assert torch.equal(codes, alone)


def test_a_batch_of_audio(noisy):
    for request, audio in zip(REQUESTS, noisy.generate_batch(REQUESTS), strict=True):
        assert (audio - noisy.generate(**request)).abs().max() <= 1e-4
    assert noisy.generate_batch([]) == []


def test_streams_may_be_read_in_turns(noisy):
    expected = [torch.cat(list(noisy.stream(**request))) for request in REQUESTS[:2]]
    streams = [noisy.stream(**request) for request in REQUESTS[:2]]
    chunks = list(zip(*streams, strict=True))
    for index, audio in enumerate(expected):
        assert torch.equal(torch.cat([pair[index] for pair in chunks]), audio)


def test_an_abandoned_stream_leaves_the_next_request_alone(noisy):
    expected = speak(noisy, seed=5)
    stream = noisy.stream("Something else.", 1, seed=9)
    list(itertools.islice(stream, 3))
    del stream
    assert torch.equal(speak(noisy, seed=5), expected)


def test_threads(noisy):
    expected = [noisy.generate(**request) for request in REQUESTS]
    results = [None] * len(REQUESTS)

    def work(index):
        results[index] = noisy.generate(**REQUESTS[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for audio, wanted in zip(results, expected, strict=True):
        assert torch.equal(audio, wanted)


def ends_at(monkeypatch, frame):
    """Let the model fall silent: from ``frame`` on every frame is zeros."""
    step = csm.runner.decode_frame

    def ending(model, state, context_bucket):
        step(model, state, context_bucket)
        state.codes_BK.masked_fill_((state.frame_B > frame).unsqueeze(1), 0)

    monkeypatch.setattr(csm.runner, "decode_frame", ending)


@pytest.mark.parametrize("frame", [0, 1, 7])
def test_a_frame_of_zeros_ends_the_speech(noisy, monkeypatch, frame):
    expected = noisy.generate_codes("Hello there.", 0, max_audio_length_ms=1600, seed=5)
    ends_at(monkeypatch, frame)
    codes = noisy.generate_codes("Hello there.", 0, max_audio_length_ms=1600, seed=5)
    assert torch.equal(codes, expected[:frame])
    assert speak(noisy, seed=5).shape == (frame * 1920,)
    assert [audio.shape[0] for audio in noisy.generate_batch(REQUESTS)] == [frame * 1920] * 3


@pytest.mark.parametrize(("milliseconds", "frames"), [(80, 1), (159, 1), (160, 2), (1000.5, 12)])
def test_the_limit_is_not_exceeded(noisy, milliseconds, frames):
    assert noisy.generate_codes("Hi.", 0, max_audio_length_ms=milliseconds, seed=0).shape[0] == frames


@pytest.mark.parametrize("frames", [201, 203, 402, 1125])
def test_whole_frames_are_not_lost_to_binary_fractions(noisy, frames):
    assert noisy._request(SpeechRequest("Hi.", 0, max_audio_length_ms=frames * 0.08 * 1000)).max_frames == frames


def test_speech_stops_where_the_positions_end(noisy):
    codes = torch.zeros(2020, 8, dtype=torch.int64)
    prompt = len("[0]a") + 2 + 2020 + 1 + len("[0]Hi") + 2
    with pytest.warns(RoomWarning):
        spoken = noisy.generate_codes("Hi", 0, [Segment(0, "a", codes=codes)], seed=0)
    assert spoken.shape[0] == 2048 - prompt + 1  # the last row of the prompt speaks, and so does every position left


def test_context_matters(noisy):
    codes = torch.randint(256, (9, 8), generator=torch.Generator().manual_seed(0))
    plain = noisy.generate_codes("Hi.", 0, max_audio_length_ms=800, temperature=0)
    continued = noisy.generate_codes("Hi.", 0, [Segment(0, "Yes.", codes=codes)], 800, temperature=0)
    assert not torch.equal(plain, continued)


def test_a_segments_sample_rate_is_honoured(noisy):
    audio = 0.3 * torch.randn(19_200, generator=torch.Generator().manual_seed(0))
    assert noisy.encode(audio, 48_000).shape == (5, 8)
    turn = noisy._turn(Segment(0, "Yes.", torch.stack((audio, audio)), sample_rate=48_000))
    assert torch.equal(turn[1], noisy.encode(audio, 48_000))


BAD = {
    "max_audio_length_ms": (0, 79.9, -1, float("nan"), "160"),
    "temperature": (-1, float("nan"), float("inf"), 1e39, "1"),
    "topk": (0, 257, 10_000, 50.7),
    "seed": (-1, 2**63, 1.5, "1"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_arguments_are_refused_at_the_call(noisy, name, value):
    error = CSMError if name == "max_audio_length_ms" else SamplingError
    with pytest.raises(error, match=r"limit|temperature|top-k|seed"):
        noisy.stream("Hi.", 0, **{name: value})  # not even a first chunk is asked for


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "cpu:7", "meta", "xpu"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(CSMError, match=device):
        Generator.from_pretrained(NOISE, device=device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    generator = Generator.from_pretrained(NOISE, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in generator.model.parameters()} == {dtype}
    audio = speak(generator, milliseconds=400, seed=1)
    assert audio.shape == (5 * 1920,)
    assert audio.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16"])
def test_a_dtype_that_weights_cannot_have(dtype):
    with pytest.raises(CSMError, match="dtype"):
        Generator.from_pretrained(NOISE, device="cpu", dtype=dtype)


def test_what_comes_back_may_be_changed(noisy):
    """Audio and codes are ordinary tensors, not views of buffers or inference tensors."""
    request = dict(text="Hello.", max_audio_length_ms=400, seed=1)
    stream = noisy.stream(**request)
    first = next(stream)
    kept = first.clone()
    first *= 0.5
    rest = list(stream)
    assert torch.equal(torch.cat([kept, *rest]), noisy.generate(**request))
    codes = noisy.generate_codes(**request)
    for tensor in (codes, noisy.decode(codes), noisy.encode(kept), noisy.generate_batch([request])[0]):
        tensor += 1


def test_a_first_call_in_inference_mode_leaves_nothing_behind():
    generator = Generator.from_pretrained(NOISE, device="cpu")
    with torch.inference_mode():
        first = speak(generator, milliseconds=240, seed=1)
    assert torch.equal(speak(generator, milliseconds=240, seed=1), first)


def test_numpy_is_welcome(noisy):
    audio = np.random.default_rng(0).normal(size=9600).astype(np.float32) / 5
    codes = noisy.encode(torch.from_numpy(audio))
    assert torch.equal(noisy.encode(audio), codes)
    assert torch.equal(noisy.encode(np.flip(audio).copy()[::-1]), codes)
    assert torch.equal(noisy.encode(audio.astype(">f4")), codes)
    assert (noisy.decode(codes.numpy().astype(np.uint16)) == noisy.decode(codes)).all()
    request = dict(max_audio_length_ms=np.float64(160), topk=np.int64(9), seed=np.int64(3), temperature=np.float32(0.5))
    assert noisy.generate_codes("Hi.", np.int64(1), [Segment(np.int64(0), "a", audio)], **request).shape == (2, 8)


@pytest.mark.parametrize("audio", ["a.wav", [[0.0, 1.0], [2.0]], (torch.zeros(5), 24_000), None], ids=str)
def test_what_is_no_audio(noisy, audio):
    with pytest.raises(AudioError, match="audio must be"):
        noisy.encode(audio)


@pytest.mark.parametrize("rate", [0, -1, 44_100.5, "44100", float("nan")])
def test_what_is_no_sample_rate(noisy, rate):
    with pytest.raises(AudioError, match="sample rate"):
        noisy.encode(torch.zeros(100), rate)


def test_warmup():
    generator = Generator.from_pretrained(NOISE, device="cpu")
    generator.warmup(batches=(1, 3))
    assert generator._codec is not None
    with pytest.raises(CSMError, match="batch"):
        generator.warmup(batches=(0,))


def test_a_context_that_was_heard_before_is_not_computed_again(noisy, monkeypatch):
    """The second time its keys and values are copied, and the codes are the same to the last bit."""
    known = []
    load = csm.prefix_cache.PrefixCache.load

    def counted(*args):
        known.append(load(*args))
        return known[-1]

    monkeypatch.setattr(csm.prefix_cache.PrefixCache, "load", counted)
    noise = torch.Generator().manual_seed(7)
    turns = [Segment(i, "Said before.", codes=torch.randint(256, (300, 8), generator=noise)) for i in range(2)]
    request = dict(max_audio_length_ms=800, seed=1)
    first = noisy.generate_codes("Hi.", 0, turns, **request)
    again = noisy.generate_codes("Hi.", 0, turns, **request)
    noisy.generate_codes("Hi.", 0, turns[:1], **request)
    noisy.generate_codes("Hi.", 0, [turns[0], turns[0]], **request)
    assert torch.equal(first, again)
    one, two = (n * (300 + 1 + len("[0]Said before.") + 2) for n in (1, 2))
    assert known == [0, two, one, one]
