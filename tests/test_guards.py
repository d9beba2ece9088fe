"""Guards: where each fires, and where it must not. In the generator they leave ordinary speech alone."""

import math
import re
import time
from dataclasses import replace

import pytest
import torch

import csm.runner
from csm import Conversation, CSMError, Guards, Voice
from csm.__main__ import main, parse_arguments
from csm.engine import Engine, Frame, Request
from csm.guards import GUARDS, NO_GUARDS, GuardedTicket, Watch
from csm.prefix_cache import PrefixCache
from csm.prompt import Prompt
from csm.request import SpeechRequest
from csm.sampling import SamplingParams
from csm.script import Narration, text_items
from csm.serve.command import read_settings
from csm.voices import save_voice, voices_folder
from noise import NOISE

RATE = 12.5
TEXT = "Twenty characters ok"  # a budget of 10 + 0.3 * 20 s: 200 frames
LOUD, SOFT, SILENT = 0.1, 0.004, 0.0005  # RMS; soft is -28 dB of loud: still speech


def frame(level=LOUD, codes=None):
    audio_N = torch.full((1920,), level)
    return Frame(torch.randint(256, (8,)) if codes is None else codes, audio_N)


def stop_of(frames, guards=NO_GUARDS, text=TEXT):
    """The guard that ends this take and the number of frames up to there; None and all of them if none does."""
    watch = Watch(guards, text, RATE)
    for number, (codes_K, audio_N) in enumerate(frames, start=1):
        guard = watch.feed(codes_K, audio_N)
        if guard is not None:
            return guard, number
    return None, len(frames)


BUDGET, SILENCE, REPEATS = (replace(NO_GUARDS, **{name: True}) for name in ("budget", "silence", "repeats"))


def test_the_budget_comes_from_the_text():
    assert stop_of([frame()] * 199, BUDGET) == (None, 199)
    assert stop_of([frame()] * 999, BUDGET) == ("budget", 204)  # 0.32 s later: no frame is silent
    assert stop_of([frame()] * 201 + [frame(SILENT)] * 9, BUDGET) == ("budget", 202)
    assert stop_of([Frame(frame().codes_K, None)] * 999, BUDGET) == ("budget", 200)
    assert stop_of([frame()] * 999, BUDGET, TEXT * 20) == (None, 999)


def test_silence_after_speech_stops_and_a_pause_does_not():
    quiet = math.ceil(3.0 * RATE)
    assert stop_of([frame()] + [frame(SILENT)] * 99, SILENCE) == ("silence", 1 + quiet)
    pauses = ([frame()] + [frame(SILENT)] * (quiet - 1)) * 4
    assert stop_of(pauses, SILENCE) == (None, len(pauses))
    assert stop_of([frame()] + [frame(SOFT)] * 99, SILENCE) == (None, 100)  # quiet speech is no silence
    assert stop_of([frame(SILENT)] * 99, SILENCE) == (None, 99)  # there was no speech yet


def test_repeating_frames_stop_and_others_do_not():
    torch.manual_seed(0)
    varied = [frame() for _ in range(99)]
    assert stop_of(varied, REPEATS) == (None, 99)
    stuck = frame().codes_K
    assert stop_of(varied + [frame(codes=stuck)] * 99, REPEATS) == ("repeats", 99 + 1 + 25)
    cycle = [frame() for _ in range(3)] * 30
    assert stop_of(varied + cycle, REPEATS) == ("repeats", 99 + 3 + 25)
    vowel = [frame(codes=stuck)] * 20  # 1.6 s
    assert stop_of((vowel + varied) * 3, REPEATS) == (None, 3 * 119)
    half = [frame(codes=torch.cat((stuck[:4], frame().codes_K[4:]))) for _ in range(99)]
    assert stop_of(half, REPEATS)[0] == "repeats"
    third = [frame(codes=torch.cat((stuck[:3], 256 + 256 * i + frame().codes_K[3:]))) for i in range(99)]
    assert stop_of(third, REPEATS) == (None, 99)


class Scripted:
    """A worker whose requests generate given frames; ``takes`` maps a seed to levels."""

    def __init__(self, takes):
        self.takes, self.seeds, self.cancelled = takes, [], 0

    def submit(self, request, max_unread, notify):
        self.seeds.append(request.params.seed)
        ticket = csm.engine.Ticket(request, max_unread, notify)
        for level in self.takes[request.params.seed]:
            ticket._put(frame(level))
        ticket._finish("end")
        return ticket

    def cancel(self, ticket):
        self.cancelled += 1

    def wake(self):
        pass


def read(takes, guards=Guards(), hold=True, text=TEXT, temperature=0.9):  # noqa: B008 - frozen
    worker = Scripted(takes)
    prompt = Prompt(torch.zeros(1, 9, dtype=torch.int64), torch.ones(1, 9, dtype=torch.bool))
    request = Request(prompt, SamplingParams(temperature, 50, 0), 999)
    ticket = GuardedTicket(worker, request, text, guards, RATE, hold)
    frames = []
    while not ticket.finished:
        frames += [] if (taken := ticket.take()) is None else [taken]
    return len(frames), worker.seeds, ticket


def test_what_is_far_too_short_is_generated_again_with_the_next_seed():
    events = []
    length, seeds, ticket = read({0: [LOUD] * 2, 1: [], 2: [LOUD] * 20}, Guards(report=events.append))
    assert (length, seeds, ticket.finish_reason) == (20, [0, 1, 2], "end")
    assert [(event.guard, event.num_frames, event.seed) for event in events] == [("retry", 2, 0), ("retry", 0, 1)]


def test_retries_end_and_the_longest_take_remains():
    assert read({0: [LOUD], 1: [LOUD] * 2, 2: [LOUD]})[:2] == (2, [0, 1, 2])
    assert read({0: [LOUD]}, Guards(retries=0))[:2] == (1, [0])
    assert read({0: []}, temperature=0)[:2] == (0, [0])  # greedy: the same again


def test_ordinary_speech_is_not_generated_again():
    assert read({0: [LOUD] * 4})[:2] == (4, [0])  # 0.32 s for 18 letters is fast, but not too short
    assert read({0: [LOUD] * 2}, text="No.")[:2] == (2, [0])


def test_a_stream_is_generated_again_only_while_it_is_empty():
    assert read({0: [], 1: [LOUD] * 9}, hold=False)[:2] == (9, [0, 1])
    assert read({0: [LOUD], 1: [LOUD] * 9}, hold=False)[:2] == (1, [0])


def test_trailing_silence_is_cut_down_to_a_tail_where_nothing_was_streamed():
    take = {0: [LOUD] * 20 + [SILENT] * 99}
    assert read(take)[0] == 20 + 4
    assert read(take, hold=False)[0] == 20 + math.ceil(3.0 * RATE)
    assert read(take, Guards.off())[0] == 119
    assert read({0: [LOUD] * 20 + [SILENT] * 9})[0] == 29  # no guard fired: nothing is cut


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"silence_seconds": 0}, {"spare_seconds": float("nan")}])
def test_limits_out_of_range(wrong):
    with pytest.raises(CSMError, match=next(iter(wrong))):
        Guards(**wrong)


STUCK = torch.arange(8)
FIRING = {
    "budget": lambda: [frame() for _ in range(250)],
    "silence": lambda: [frame(), *(frame(SILENT) for _ in range(50))],
    "repeats": lambda: [frame(codes=STUCK) for _ in range(50)],
}


@pytest.mark.parametrize("off", GUARDS)
def test_each_guard_can_be_turned_off_by_its_name(off):
    """It does not fire then, and every other one does."""
    guards = Guards.without(off)
    for name, frames in FIRING.items():
        assert stop_of(frames(), guards)[0] == (None if name == off else name)
    assert len(read({0: [LOUD], 1: [LOUD] * 9}, guards)[1]) == (1 if off == "retry" else 2)


def test_guards_by_name():
    assert Guards.without() == Guards()
    assert Guards.without("all") == Guards.without(*GUARDS) == Guards.off() == NO_GUARDS
    assert Guards.without("silence", "retry") == Guards(silence=False, retries=0)
    with pytest.raises(
        CSMError, match="no guard is called 'silent'; there are budget, silence, repeats, retry, and all"
    ):
        Guards.without("silent")


def options_of(command):
    """A short run of each command that generates."""
    options = ["--model", NOISE, "--device", "cpu", "--max-seconds", "0.16"]
    return {
        "generate": ["--text", "Hi.", *options],
        "batch": ["lines.jsonl", "folder", *options],
        "read": ["book.txt", "--out", "book.wav", *options],
        "voice": ["say", "anna", "--text", "Hi.", *options],
    }[command]


@pytest.fixture
def folder(noisy, tmp_path, monkeypatch):
    """A file for each command."""
    noisy.generate("Hi.", max_audio_length_ms=80)  # compiles the CPU's ops into the usual CSM_HOME, not into this one
    monkeypatch.setenv("CSM_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_voice(
        Voice("anna", ("Hello.",), (torch.ones(3, 8, dtype=torch.int64),), 0, ""), voices_folder() / "anna.safetensors"
    )
    (tmp_path / "lines.jsonl").write_text('{"id": "a", "text": "Hi."}')
    (tmp_path / "book.txt").write_text("Hi.")
    return tmp_path


@pytest.mark.parametrize("command", ["generate", "batch", "read", "voice"])
def test_every_command_that_generates_has_the_switches(folder, monkeypatch, capsys, command):
    """What a request is generated under. csm read has retries of its own, which are the guard's to turn off."""
    used, argv = [], [command, *options_of(command)]
    init = GuardedTicket.__init__

    def noted(self, worker, request, text, guards, *args):
        used.append(replace(guards, report=None))
        init(self, worker, request, text, guards, *args)

    monkeypatch.setattr(GuardedTicket, "__init__", noted)
    assert main([*argv, "--no-guard", "silence"]) == 0
    assert used == [Guards(silence=False, retries=0 if command == "read" else 2)] * len(used) and used
    del used[:]
    assert main([*argv, "--no-guards"]) == 0  # batch and read generate anew, since guards are part of their keys
    assert used == [NO_GUARDS] * len(used) and used
    assert main([*argv, "--no-guard", "silent"]) == 2
    assert "no guard is called 'silent'; there are budget, silence, repeats, retry" in capsys.readouterr().err


def test_the_server_has_the_switches_and_all_commands_the_same_help(capsys):
    for options, guards in (
        (["--no-guard", "budget"], Guards(budget=False)),
        (["--no-guards"], NO_GUARDS),
        ([], Guards()),
    ):
        assert read_settings(parse_arguments(["serve", *options])).guards == guards
    texts = set()
    for command in (["generate"], ["batch"], ["read"], ["voice", "say"], ["serve"]):
        with pytest.raises(SystemExit):
            parse_arguments([*command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        texts.add(re.search(r"--no-guards .*?may be repeated", shown[shown.rindex("--no-guards") :]).group())
    (text,) = texts
    assert all(name in text for name in GUARDS)


def test_conversations_and_narrations_hand_their_guards_on(noisy, tmp_path, monkeypatch):
    used, guards = [], Guards.without("repeats")
    stream_frames = noisy.stream_frames
    monkeypatch.setattr(noisy, "stream_frames", lambda *args: used.append(args[1:]) or stream_frames(*args))
    conversation = Conversation(noisy, max_turn_ms=160, seed=1, guards=guards)
    list(conversation.say(0, "Hi."))
    conversation.save(tmp_path / "saved")
    list(Conversation.load(noisy, tmp_path / "saved", guards).say(0, "Hi."))
    narration = Narration(noisy, text_items("Hi."), max_turn_ms=160, seed=1, guards=guards)
    del used[-1]  # a check of the text, which generates nothing
    list(narration.stream())
    assert used == [(guards,)] * 3


def test_in_the_generator_they_leave_ordinary_speech_alone(tiny):
    text = "The weather was warm in the morning."
    audio = tiny.generate(text, seed=4, max_audio_length_ms=6000)
    assert torch.equal(audio, tiny.generate(text, seed=4, max_audio_length_ms=6000, guards=Guards.off()))
    codes = tiny.generate_codes(text, seed=4, max_audio_length_ms=6000)
    assert audio.shape[0] == codes.shape[0] * 1920


def test_in_the_generator_a_runaway_ends_and_frees_its_slot(noisy):
    """The noise checkpoint never ends by itself."""
    guards = Guards(spare_seconds=0.3, seconds_per_character=0.1, tail_seconds=0.1)
    batch = [dict(text="Hi.", seed=1), dict(text="Hi, all.", seed=2, max_audio_length_ms=400)]
    first, second = noisy.generate_batch(batch, guards)
    assert first.shape[0] in (8 * 1920, 9 * 1920)  # 0.6 s are 8 frames
    assert second.shape[0] == 5 * 1920
    unguarded = noisy.generate("Hi.", seed=1, guards=Guards.off(), max_audio_length_ms=720)
    torch.testing.assert_close(first, unguarded[: len(first)], atol=1e-5, rtol=0)  # grouped otherwise for the codec
    chunks = list(noisy.stream("Hi.", seed=1, guards=guards))
    assert torch.equal(torch.cat(chunks), first)
    while noisy._worker.engine.num_active:
        time.sleep(0.01)


def test_in_the_generator_empty_speech_is_generated_again(noisy, monkeypatch):
    """Seeds 5 and 6 end at once."""
    step, events = csm.runner.decode_frame, []

    def ending(model, state, context_bucket):
        step(model, state, context_bucket)
        state.codes_BK.masked_fill_((state.seed_B < 7).unsqueeze(1), 0)

    monkeypatch.setattr(csm.runner, "decode_frame", ending)
    again = noisy.generate("Hello.", seed=5, max_audio_length_ms=400, guards=Guards(report=events.append))
    assert [event.seed for event in events] == [5, 6]
    assert torch.equal(again, noisy.generate("Hello.", seed=7, max_audio_length_ms=400))
    assert noisy.generate("Hello.", seed=4, max_audio_length_ms=400).shape == (0,)  # three takes, all empty


class Stepped:
    """A worker whose engine is stepped by hand."""

    def __init__(self, generator):
        self.engine = Engine(generator.model, lambda: generator.codec, 1920, 1, PrefixCache(0))
        self.woken = True

    def submit(self, *args):
        return self.engine.submit(*args)

    def wake(self):
        self.woken = True

    def run(self):
        """Step while there is work."""
        self.woken = False
        while self.engine.step():
            pass


@pytest.mark.parametrize("max_unread", [1, 2, 4, 5, 25, 26])
def test_a_reader_that_reads_on_wakes_a_paused_request(noisy, monkeypatch, max_unread):
    """At the first frame that lets the engine go on, also while frames wait for the codec to decode them in a group."""
    steps = []
    monkeypatch.setattr(csm.runner, "decode_frame", lambda _, state, __: steps.append(state.codes_BK.fill_(1)))
    monkeypatch.setattr(csm.runner.SlotDecoders, "decode", lambda *args: torch.zeros(len(args[2]), 1920))
    worker, num_frames = Stepped(noisy), 60
    request = noisy._request(SpeechRequest("Hi.", max_audio_length_ms=80 * num_frames), True)
    ticket = GuardedTicket(worker, request, "Hi.", NO_GUARDS, RATE, max_unread=max_unread)
    worker.run()
    assert len(steps) == max_unread and not ticket.finished  # paused
    for _ in range(num_frames):
        assert ticket.take() is not None
        if worker.woken:
            worker.run()
        assert not worker.engine.step()  # all that could be done was done
    assert ticket.take() is None and ticket.finish_reason == "length"
