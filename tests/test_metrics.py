"""Metrics: each figure, for arrivals that are worked out by hand, and for real generations."""

import sys

import pytest
import torch

from csm import Conversation, Guards, Meter
from csm.book.recording import Attempt, measured
from csm.metrics import GenerationMetrics, Listener, combined, gpu_bytes, resident_bytes
from csm.runner import group_size
from noise import NOISE


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_arrivals_worked_out_by_hand():
    """Four frames at 0.2, 0.3, 0.6 and 0.65 s: played from 0.3 s on, the third is due at 0.46 s."""
    clock = Clock()
    meter = Meter(clock)
    for seconds in (0.2, 0.3, 0.6, 0.65):
        clock.now = 100 + seconds
        meter.audio(0.08)
    clock.now = 900.0  # a reader that comes late
    meter.finish()
    metrics = meter.metrics(evictions=2)
    assert metrics.audio_seconds == pytest.approx(0.32)
    assert metrics.elapsed_seconds == pytest.approx(0.65)
    assert metrics.first_audio_seconds == pytest.approx(0.2)
    assert metrics.rtf == pytest.approx(0.65 / 0.32)
    assert (metrics.underruns, metrics.retries, metrics.evictions) == (1, 0, 2)


def test_a_retry_starts_the_audio_anew_and_not_the_time():
    clock = Clock()
    meter = Meter(clock)
    clock.now = 101.0
    meter.audio(0.08)
    meter.begin_take()
    meter.retries += 1
    for now in (103.0, 103.05):
        clock.now = now
        meter.audio(0.08)
    metrics = meter.metrics()
    assert (metrics.audio_seconds, metrics.first_audio_seconds, metrics.elapsed_seconds) == (
        pytest.approx(0.16),
        pytest.approx(3.0),
        pytest.approx(3.05),
    )
    assert (metrics.underruns, metrics.retries) == (0, 1)


def test_no_audio():
    clock = Clock()
    meter = Meter(clock)
    clock.now = 102.0
    meter.finish()
    metrics = meter.metrics()
    assert (metrics.audio_seconds, metrics.elapsed_seconds, metrics.first_audio_seconds, metrics.rtf) == (
        0,
        2,
        None,
        None,
    )
    assert str(metrics).startswith("RTF none, first audio none, 0 underruns, 0 retries, 0 evictions, memory ")


def test_a_listener_waits_where_audio_is_missing():
    listener = Listener()
    assert [round(listener.arrive(now, 0.08), 6) for now in (0.0, 0.5, 0.55)] == [0.0, 0.32, 0.0]
    assert listener.num_underruns == 1
    assert listener.remaining(0.6) == pytest.approx(0.06)
    assert listener.remaining(9.0) == 0.0


@pytest.mark.parametrize(("pace", "underruns"), [(0.2, False), (0.88, False), (0.97, True)])
def test_a_listener_never_waits_for_a_group_of_the_codec(pace, underruns):
    """``pace`` is the time to generate a frame, by the time that it plays. A group arrives with its last frame."""
    listener, num_frames = Listener(), 0
    while num_frames < 120:
        size = group_size(num_frames, None)
        num_frames += size
        for _ in range(size):
            listener.arrive(0.08 * pace * num_frames, 0.08)
    assert (listener.num_underruns > 0) == underruns


def test_text_and_json():
    metrics = GenerationMetrics(2.0, 0.5, 0.0123, 1, 1, 3, 412_000_000, 0)
    assert str(metrics) == "RTF 0.25, first audio 12 ms, 1 underrun, 1 retry, 3 evictions, memory 412 MB"
    assert metrics.as_dict()["rtf"] == 0.25
    assert "memory 412 MB, GPU 9 MB" in str(GenerationMetrics(2.0, 0.5, 0.0123, 0, 0, 0, 412_000_000, 9_000_000))


def test_combined():
    parts = [GenerationMetrics(2.0, 9.0, first, 1, 2, 3) for first in (0.1, 0.2, 0.9)]
    total = combined(parts, 4.0)
    assert (total.audio_seconds, total.elapsed_seconds, total.first_audio_seconds) == (6.0, 4.0, 0.2)
    assert (total.underruns, total.retries, total.evictions) == (3, 6, 9)
    assert combined([], 1.0).rtf is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_process():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # noqa: SIM115
    assert resident_bytes() == pytest.approx(int(status["VmRSS"].split()[0]) * 1024, rel=0.05)
    assert gpu_bytes() >= 0


def test_streams_and_requests_have_them(noisy):
    stream = noisy.stream("Hello.", max_audio_length_ms=800, seed=1)
    assert stream.metrics is None
    chunks = list(stream)
    metrics = stream.metrics
    assert metrics.audio_seconds == pytest.approx(0.8) == sum(map(len, chunks)) / 24_000
    assert 0 < metrics.first_audio_seconds < metrics.elapsed_seconds < 60
    assert metrics.resident_bytes > 0 and metrics.retries == metrics.evictions == 0
    (speech,) = noisy.generate_speech([{"text": "Hello.", "max_audio_length_ms": 800, "seed": 1}])
    assert torch.equal(speech.audio, torch.cat(chunks))
    assert (speech.seed, speech.finish_reason) == (1, "length")
    assert speech.metrics.audio_seconds == pytest.approx(0.8)


def test_a_closed_stream_keeps_what_it_measured(noisy):
    stream = noisy.stream("Hello.", max_audio_length_ms=8000, seed=1)
    for _ in range(3):
        next(stream)
    stream.close()
    assert stream.metrics.audio_seconds == pytest.approx(0.24)


def test_retries_are_counted(noisy, monkeypatch):
    """Takes of one frame are too short for this text; the guard draws two more."""
    monkeypatch.setattr("csm.engine.Engine._hand_out", ends_after(1))
    guards = Guards(budget=False, silence=False, repeats=False, retries=2)
    text = "Sixteen letters and many more, so that one frame is too short for it. " * 3
    (speech,) = noisy.generate_speech([{"text": text, "max_audio_length_ms": 800, "seed": 5}], guards)
    assert (speech.metrics.retries, speech.seed, speech.finish_reason) == (2, 7, "end")
    assert speech.metrics.audio_seconds == pytest.approx(0.08)


def ends_after(num_frames):
    """``Engine._hand_out`` as if the model ended every speech after so many frames."""
    from csm.engine import Engine

    hand_out = Engine._hand_out

    def handed_out(self, active, output, slot):
        if active.ticket.num_frames == num_frames:
            output.codes_BK[slot] = 0
        hand_out(self, active, output, slot)

    return handed_out


def test_a_conversation_counts_evictions_by_turn(noisy):
    talk = Conversation(noisy, max_turn_ms=400, max_turns=1, seed=1)
    evictions = []
    for _ in range(4):
        assert list(talk.say(0, "Hi."))
        evictions.append(talk.metrics.evictions)
    assert evictions == [0, 0, 1, 1]
    assert talk.stats.num_evicted == 2 and talk.stats.num_retries == 0


def test_a_book_has_those_of_what_was_generated(tmp_path, monkeypatch, capsys):
    """Its second sentence, 0.4 s for many letters, is rejected twice; a run that finds both has none."""
    from csm.__main__ import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.txt").write_text("Hi. A sentence of quite a number of letters, too many for so short a time.")
    options = ["--model", NOISE, "--device", "cpu", "--quiet", "--max-seconds", "0.4", "--retries", "1"]
    read = ["read", "b.txt", "--out", "b.wav", *options, "--metrics", "--keep-parts"]
    assert main(read) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("metrics: RTF ") and " 1 retry, 0 evictions, memory " in line
    assert main(read) == 0
    assert "metrics: RTF none, first audio none, 0 underruns, 0 retries, 0" in capsys.readouterr().out


def test_the_time_of_a_sentence_is_that_of_all_its_takes():
    """Takes of 2, 3 and 4 s; the second one is kept, 1.6 s long."""
    takes = [
        Attempt(rejection, torch.zeros(frames, 8), GenerationMetrics(frames * 0.08, elapsed, 0.5, underruns=frames))
        for rejection, frames, elapsed in (("short", 3, 2.0), ("silence", 20, 3.0), ("budget", 90, 4.0))
    ]
    metrics = measured(takes, 1.6, evictions=2)
    assert (metrics.audio_seconds, metrics.elapsed_seconds, metrics.first_audio_seconds) == (1.6, 9.0, 5.5)
    assert (metrics.retries, metrics.evictions, metrics.underruns) == (2, 2, 90)


def test_the_command_line_prints_them(tmp_path, capsys):
    from csm.__main__ import main

    options = ["--model", NOISE, "--device", "cpu", "--quiet", "--max-seconds", "0.4", "--seed", "1"]
    assert (
        main(["generate", "--text", "One. Two. Three. Four.", *options, "--metrics", "--out", str(tmp_path / "a.wav")])
        == 0
    )
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("metrics: RTF ") and " 0 retries, 2 evictions, memory " in line
