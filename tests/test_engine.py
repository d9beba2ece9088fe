"""Continuous batching without threads: each request gets the codes that it gets alone, whatever runs beside it."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import csm.runner
from conftest import StandInGraph
from csm import CSMError, FallbackWarning, Generator, QueueFullError, Segment
from csm.engine import Engine
from csm.kernels.launch import enable_kernels
from csm.prefix_cache import PrefixCache
from csm.request import SpeechRequest
from noise import NOISE


@pytest.fixture(scope="module")
def generator(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Generator.from_pretrained(NOISE, device="cpu")
    torch.set_num_threads(threads)


def engine_of(generator, max_slots=4, **options):
    prefix_cache = PrefixCache(options.pop("prefix_bytes", 1 << 24))
    return Engine(generator.model, lambda: generator.codec, 1920, max_slots, prefix_cache, **options)


def request_of(generator, index, frames, audio=False):
    noise = torch.Generator().manual_seed(index % 3)
    context = [Segment(1, "Before.", codes=torch.randint(256, (7, 8), generator=noise))] if index % 3 else []
    text = ["Hello.", "A longer sentence, by another speaker.", "Three."][index % 3] + "!" * (index // 3)
    temperature = 0.0 if index == 5 else 0.9
    speech = SpeechRequest(text, index % 2, context, frames * 80, temperature, 50, seed=index)
    return generator._request(speech, audio)


@cache
def codes_alone(generator, index):
    """Twelve frames of a request, with nothing else in an engine."""
    engine = engine_of(generator, max_slots=1)
    ticket = engine.submit(request_of(generator, index, 12))
    return torch.stack(run(engine, ticket))


def run(engine, ticket):
    codes = []
    while engine.step() or not ticket.finished:
        pass
    while (frame := ticket.take()) is not None:
        codes.append(frame.codes_K)
    return codes


LIMIT = dict(max_audio_length_ms=960)
ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 5), st.integers(1, 12), st.sampled_from([None, 1, 3]), st.booleans()),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("read"), st.integers(0, 9), st.integers(1, 5)),
)


class Readers:
    """What each ticket's reader has taken so far."""

    def __init__(self):
        self.tickets, self.codes = [], []

    def add(self, ticket, index, frames):
        self.tickets.append((ticket, index, frames))
        self.codes.append([])

    def read(self, which, count):
        for _ in range(count):
            frame = self.tickets[which][0].take()
            if frame is not None:
                self.codes[which].append(frame)


def play(engine, generator, actions):
    readers = Readers()
    for action, *values in actions:
        if action == "submit":
            index, frames, max_unread, audio = values
            readers.add(engine.submit(request_of(generator, index, frames, audio), max_unread), index, frames)
        elif action == "step":
            for _ in range(values[0]):
                engine.step()
        elif values[0] < len(readers.tickets):
            if action == "cancel":
                engine.cancel(readers.tickets[values[0]][0])
            else:
                readers.read(*values)
    for _ in range(1000):
        worked = engine.step()
        for which in range(len(readers.tickets)):
            readers.read(which, 2)
        if not worked and engine.idle and not any(ticket.num_unread for ticket, _, _ in readers.tickets):
            break
    return readers


@settings(max_examples=40, deadline=None)
@given(st.lists(ACTIONS, max_size=30))
def test_any_order_of_arrivals_pauses_and_cancellations(generator, actions):
    engine = engine_of(generator, max_slots=3)
    readers = play(engine, generator, actions)
    assert engine.idle
    assert engine._slots == [None] * 3
    assert len(engine._prefix_cache) == len(engine._prefix_cache._entries)
    for (ticket, index, frames), taken in zip(readers.tickets, readers.codes, strict=True):
        assert ticket.finished
        expected = codes_alone(generator, index)[:frames]
        if ticket.cancelled and ticket.finish_reason == "cancelled":
            expected = expected[: len(taken)]
        assert ticket.finish_reason in ("cancelled", "length")
        assert len(taken) == len(expected) == ticket.num_frames
        for frame, codes in zip(taken, expected, strict=True):
            assert torch.equal(frame.codes_K, codes)
            assert frame.audio_N is None or frame.audio_N.shape == (1920,)
    assert engine._prefix_cache.num_bytes == sum(e.num_bytes for e in engine._prefix_cache._entries.values())


def test_audio_of_interleaved_requests_is_that_of_each_alone(generator):
    """A pause, a move to a lower slot and a newcomer in the middle leave every codec stream as it was."""
    requests = [request_of(generator, index, frames, audio=True) for index, frames in [(0, 3), (1, 12), (2, 12)]]
    expected = []
    for request in requests:
        ticket = (engine := engine_of(generator)).submit(request)
        while engine.step():
            pass
        expected.append(torch.cat([ticket.take().audio_N for _ in range(ticket.num_frames)]))
    engine = engine_of(generator)
    tickets = [
        engine.submit(request, max_unread) for request, max_unread in zip(requests, [None, 2, None], strict=True)
    ]
    audio = [[] for _ in tickets]
    for _ in range(100):
        engine.step()
        for index, ticket in enumerate(tickets):
            frame = ticket.take() if index != 1 or tickets[2].num_frames > 8 else None
            if frame is not None:
                audio[index].append(frame.audio_N)
    for parts, wanted in zip(audio, expected, strict=True):
        assert torch.equal(torch.cat(parts), wanted)


def test_waiting_requests_are_admitted_in_order(generator):
    engine = engine_of(generator, max_slots=1)
    tickets = [engine.submit(request_of(generator, index, 2)) for index in range(5)]
    finished = []
    while engine.step():
        finished += [index for index, ticket in enumerate(tickets) if ticket.finished and index not in finished]
    assert finished == list(range(5))


def test_a_full_queue_refuses(generator):
    engine = engine_of(generator, max_slots=1, max_queue=2)
    for index in range(2):
        engine.submit(request_of(generator, index, 1))
    with pytest.raises(QueueFullError, match="2 requests are waiting, the limit is 2"):
        engine.submit(request_of(generator, 2, 1))
    assert issubclass(QueueFullError, CSMError)


def test_the_batch_covers_the_highest_running_slot_and_slots_move_down(generator, monkeypatch):
    engine, sizes = engine_of(generator, max_slots=4), []
    launch = csm.runner.BatchRunner.launch

    def counted(self, *args):
        sizes.append(self.state.batch)
        return launch(self, *args)

    monkeypatch.setattr(csm.runner.BatchRunner, "launch", counted)
    tickets = [engine.submit(request_of(generator, index, frames)) for index, frames in enumerate([2, 2, 6])]
    while engine.step():
        pass
    assert sizes == [3, 3, 1, 1, 1, 1]
    assert torch.equal(torch.stack(run(engine, tickets[2])), codes_alone(generator, 2)[:6])


def test_a_cancelled_request_frees_its_slot_in_the_next_step(generator):
    engine = engine_of(generator, max_slots=1)
    first, second = (engine.submit(request_of(generator, index, 10)) for index in range(2))
    engine.step()
    engine.cancel(first)
    engine.step()
    assert first.finish_reason == "cancelled"
    assert second.num_frames == 1
    assert engine.num_active == 1


def test_a_paused_request_neither_runs_nor_holds_up_others(generator):
    engine = engine_of(generator, max_slots=2)
    slow = engine.submit(request_of(generator, 0, 12), max_unread=2)
    fast = engine.submit(request_of(generator, 1, 12))
    while engine.step():
        pass
    assert slow.num_frames == 2 and not slow.finished
    assert fast.finish_reason == "length"
    codes = [slow.take().codes_K, slow.take().codes_K]
    while not slow.finished or slow.num_unread:
        engine.step()
        frame = slow.take()
        if frame is not None:
            codes.append(frame.codes_K)
    assert torch.equal(torch.stack(codes), codes_alone(generator, 0))


def test_an_exception_in_a_step_ends_the_running_requests_and_the_engine_lives(generator, monkeypatch):
    engine = engine_of(generator, max_slots=2)
    running = [engine.submit(request_of(generator, index, 9)) for index in range(2)]
    waiting = engine.submit(request_of(generator, 2, 4))
    engine.step()
    step = csm.runner.decode_frame
    monkeypatch.setattr(csm.runner, "decode_frame", lambda *_: 1 / 0)
    engine.step()
    monkeypatch.setattr(csm.runner, "decode_frame", step)
    assert all(isinstance(ticket.error, ZeroDivisionError) for ticket in running)
    assert torch.equal(torch.stack(run(engine, waiting)), codes_alone(generator, 2)[:4])


def test_an_exception_in_a_prefill_ends_that_request_alone(generator, monkeypatch):
    engine = engine_of(generator, max_slots=2)
    fine = engine.submit(request_of(generator, 0, 6))
    engine.step()
    broken = engine.submit(request_of(generator, 1, 6))
    monkeypatch.setattr(engine._prefill, "_run_chunk", lambda *_: 1 / 0)
    engine.step()
    monkeypatch.undo()
    assert isinstance(broken.error, ZeroDivisionError) and broken.num_frames == 0
    assert torch.equal(torch.stack(run(engine, fine)), codes_alone(generator, 0)[:6])


def test_a_prefix_that_cannot_be_kept_costs_nobody_a_slot(generator, monkeypatch):
    engine = engine_of(generator, max_slots=2)
    fine, cancelled = (engine.submit(request_of(generator, index, 6)) for index in range(2))
    for _ in range(3):
        engine.step()
    monkeypatch.setattr(engine._prefix_cache, "store", lambda *_: 1 / 0)
    engine.cancel(cancelled)
    assert torch.equal(torch.stack(run(engine, fine)), codes_alone(generator, 0)[:6])
    assert engine.num_active == 0 and cancelled.finished


def test_a_finished_request_is_a_known_prefix(generator, monkeypatch):
    """The next turn of a conversation prefills its own text only, and the last frame, which no step has read."""
    engine = engine_of(generator)
    speech = SpeechRequest("Hello.", 0, (), 480, seed=1)
    ticket = engine.submit(generator._request(speech, audio=False))
    codes = torch.stack(run(engine, ticket))
    turn = Segment(0, "Hello.", codes=codes)
    request = generator._request(SpeechRequest("And to you.", 1, [turn], 480, seed=2), audio=False)
    lengths = []
    load = PrefixCache.load
    monkeypatch.setattr(PrefixCache, "load", lambda *args: lengths.append(load(*args)) or lengths[-1])
    reply = torch.stack(run(engine, engine.submit(request)))
    assert lengths == [len("[0]Hello.") + 2 + 5]
    fresh = engine_of(generator)
    assert torch.equal(reply, torch.stack(run(fresh, fresh.submit(request))))


def test_a_graph_is_captured_before_the_prompt_and_replayed_for_every_frame(captures, monkeypatch):
    """The path of generate.py on a GPU, with stand-ins for the graphs."""
    monkeypatch.setenv("CSM_SELFCHECK", "0")  # it captures frames of its own
    generator = Generator.from_pretrained(NOISE, device="cpu")
    expected = Generator.from_pretrained(NOISE, device="cpu", graphs=False).generate_codes("Hi.", seed=1, **LIMIT)
    captured_at, stream = [], generator.stream("Hi.", seed=1, **LIMIT)
    for _ in stream:
        captured_at.append(len(captures))
    buckets = len(generator._worker.engine._state.backbone_cache.buckets)
    assert captured_at == [buckets] * 12
    assert [graph.replays for graph in captures] == [12, *[0] * (buckets - 1)]
    assert torch.equal(generator.generate_codes("Hi.", seed=1, **LIMIT), expected)
    assert len(captures) == buckets
    generator.generate_codes_batch([SpeechRequest("Hi.", seed=1, **LIMIT)] * 3)
    assert len(captures) == buckets * 3  # batch sizes 1, 2 and 4: one request after the other was admitted


def test_a_batch_size_is_captured_while_others_run(captures, generator, monkeypatch):
    """A capture runs the step on the slots in use, which then continue as if nothing had happened."""
    monkeypatch.setenv("CSM_SELFCHECK", "0")
    monkeypatch.setattr("csm.graph.capture", lambda step, *_: [step() for _ in range(4)] and StandInGraph(step))
    engine = engine_of(generator)
    first = engine.submit(request_of(generator, 0, 12))
    for _ in range(5):
        engine.step()
    second = engine.submit(request_of(generator, 1, 12))
    codes = [torch.stack(run(engine, ticket)) for ticket in (first, second)]
    assert [codes_alone(generator, index).equal(codes[index]) for index in range(2)] == [True, True]


def test_a_capture_that_fails_falls_back_to_eager_frames(captures, generator, monkeypatch, request):
    """One warning, and the codes are right."""
    monkeypatch.setenv("CSM_SELFCHECK", "0")
    monkeypatch.setattr("csm.graph.capture", lambda *_: 1 / 0)
    engine = engine_of(generator)
    ticket = engine.submit(request_of(generator, 0, 12))
    request.addfinalizer(lambda: enable_kernels(torch.device("cpu"), True))
    with pytest.warns(FallbackWarning, match=r"batch 1 cannot be captured: division by zero\. Frames on cpu"):
        codes = run(engine, ticket)
    assert torch.equal(torch.stack(codes), codes_alone(generator, 0))
