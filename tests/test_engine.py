"""Continuous batching without threads: each request gets the codes that it gets alone, whatever runs beside it."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefix_cache import check_prefix_cache

import csm.runner
from conftest import StandInGraph
from csm import CSMError, FallbackWarning, Generator, QueueFullError, Segment
from csm.engine import Engine
from csm.frame import decode_frame
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


@cache
def audio_alone(generator, index):
    """The samples of ``codes_alone``, one frame a row."""
    engine = engine_of(generator, max_slots=1)
    ticket = engine.submit(request_of(generator, index, 12, audio=True))
    step_until(engine, lambda: ticket.finished)
    audio_TN = torch.stack([ticket.take().audio_N for _ in range(ticket.num_frames)])
    assert audio_TN.std() > 1000 * AUDIO_TOLERANCE
    return audio_TN


def run(engine, ticket):
    codes = []
    step_until(engine, lambda: ticket.finished)
    while engine.step():
        pass
    while (frame := ticket.take()) is not None:
        codes.append(frame.codes_K)
    return codes


def step_until(engine, condition):
    for _ in range(200):
        if condition():
            return
        engine.step()
    raise AssertionError("it did not happen within 200 steps")


class Watched(Engine):
    """An engine that notes what it does, in order. ``ahead`` frames are launched ahead, as on a GPU."""

    ahead = 0

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.admitted, self.events, self.marks = [], [], [0]

    def _runner(self, batch):
        runner = super()._runner(batch)
        if runner.frames_ahead != self.ahead:
            runner.frames_ahead = self.ahead
            runner._outputs = [copy.deepcopy(runner._outputs[0]) for _ in range(self.ahead + 1)]
        return runner

    def _next_request(self):
        free = [slot for slot, active in enumerate(self._slots) if active is None]
        active = super()._next_request()
        if active is not None:
            assert active.slot == min(free)
            self.admitted.append(active.ticket)
        return active

    def _run_chunk(self, active):
        self.events.append(active.ticket)
        super()._run_chunk(active)

    def _launch(self, *args):
        launched = super()._launch(*args)
        if launched:
            self.events.append("frame")
        return launched

    def step(self):
        """A step, and what no step may do: let a frame wait for more than a chunk, or a request for no reason."""
        can_run = any(active.runnable for active in self._active() if not active.done) or bool(self._in_flight)
        held = [active for active in self._active() if not active.done]
        wanted = any(active.job for active in held) or (
            len(held) < self.max_slots and any(not ticket.cancelled for ticket in self._queue)
        )
        first = len(self.events)
        worked = super().step()
        chunks = [event for event in self.events[first:] if event != "frame"]
        assert bool(chunks) == wanted
        assert len(set(chunks)) <= 1 and (len(chunks) <= 1 or not can_run)
        return worked


def watched(generator, max_slots, prefix_bytes=1 << 24, ahead=0):
    engine = Watched(generator.model, lambda: generator.codec, 1920, max_slots, PrefixCache(prefix_bytes))
    engine.ahead = ahead
    return engine


def check_holdings(engine):
    """No slot, buffer or cache entry is given twice or lost, and the prefix cache keeps its budget."""
    held = [active for active in engine._slots if active is not None]
    assert all(engine._slots[active.slot] is active and not active.ticket.finished for active in held)
    tickets = [*(active.ticket for active in held), *engine._queue]
    assert len(set(tickets)) == len(tickets)
    assert sum(active.job is not None for active in held) <= 1  # they would share the staging cache
    decoders = [] if engine._decoder is None else [each for each in engine._decoder._decoders if each is not None]
    assert len(set(decoders)) == len(decoders) <= engine.max_slots
    check_prefix_cache(engine._prefix_cache, engine.model.config.backbone)
    caches = {
        tensor.data_ptr()
        for cache in (engine._state.backbone_cache, engine._prefill.cache)
        for tensor in (cache.k_LBGSd, cache.v_LBGSd)
    }
    assert not caches & {entry.k_LBGSd.data_ptr() for entry in engine._prefix_cache._entries.values()}


LIMIT = dict(max_audio_length_ms=960)
AUDIO_TOLERANCE = 1e-5  # samples are decoded in other groups of frames than alone, which round differently
POSITION_BYTES = 2 * 4 * 2 * 32 * 4  # of the noise checkpoint: keys and values, layers, heads, head dim, float32
ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 5), st.integers(1, 12), st.sampled_from([None, 1, 3]), st.booleans()),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("read"), st.integers(0, 9), st.integers(1, 5)),
)


class Readers:
    """What each ticket's reader has taken so far."""

    def __init__(self):
        self.tickets, self.frames = [], []

    def add(self, ticket, index, frames):
        self.tickets.append((ticket, index, frames))
        self.frames.append([])

    def read(self, which, count):
        for _ in range(count):
            frame = self.tickets[which][0].take()
            if frame is not None:
                self.frames[which].append(frame)


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
        check_holdings(engine)
    for _ in range(1000):
        worked = engine.step()
        check_holdings(engine)
        for which in range(len(readers.tickets)):
            readers.read(which, 2)
        if not worked and engine.idle and not any(ticket.num_unread for ticket, _, _ in readers.tickets):
            break
    return readers


def end_index_4_after_6_frames(model, state, context_bucket):
    decode_frame(model, state, context_bucket)
    state.codes_BK.masked_fill_(((state.seed_B == 4) & (state.frame_B > 6)).unsqueeze(1), 0)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(ACTIONS, min_size=8, max_size=24),
    st.sampled_from([0, 2]),
    st.sampled_from([0, 40 * POSITION_BYTES, 1 << 24]),
)
def test_any_order_of_arrivals_pauses_and_cancellations(generator, actions, ahead, prefix_bytes):
    engine = watched(generator, 3, prefix_bytes, ahead)
    buffers = {name: buffer.data_ptr() for name, buffer in engine._state.buffers().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csm.runner, "decode_frame", end_index_4_after_6_frames)
        readers = play(engine, generator, actions)
        for (ticket, index, num_frames), frames in zip(readers.tickets, readers.frames, strict=True):
            check_frames(generator, ticket, index, num_frames, frames)
    assert engine.idle and engine.num_waiting == engine.num_active == 0
    assert engine._slots == [None] * 3
    assert engine._prefill._job is None or engine._prefill._job.is_done
    assert {name: buffer.data_ptr() for name, buffer in engine._state.buffers().items()} == buffers
    submitted = [ticket for ticket, _, _ in readers.tickets]
    assert engine.admitted == [ticket for ticket in submitted if ticket in engine.admitted]  # first come, first served
    assert all(ticket.cancelled for ticket in submitted if ticket not in engine.admitted)


def check_frames(generator, ticket, index, num_frames, frames):
    """Codes equal to the bit, and samples up to ``AUDIO_TOLERANCE``; a cancelled request has the first ones."""
    codes, audio = codes_alone(generator, index)[:num_frames], audio_alone(generator, index)[:num_frames]
    if ticket.finish_reason == "cancelled":
        assert ticket.cancelled
        codes, audio = codes[: len(frames)], audio[: len(frames)]
    else:
        assert ticket.finish_reason == ("length" if len(codes) == num_frames else "end")
    assert len(frames) == len(codes) == ticket.num_frames
    for frame, codes_K, audio_N in zip(frames, codes, audio, strict=True):
        assert torch.equal(frame.codes_K, codes_K)
        assert (frame.audio_N is None) == (not ticket.request.audio)
        if frame.audio_N is not None:
            torch.testing.assert_close(frame.audio_N, audio_N, atol=AUDIO_TOLERANCE, rtol=0)


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_burst_of_prompts_is_read_a_chunk_at_a_time_between_frames(generator, ahead):
    """However many wait, and whether the engine was idle or busy when they came."""
    engine = watched(generator, 4, prefix_bytes=0, ahead=ahead)
    first, second = "first", "second"
    names = {}

    def burst(name, count):
        for _ in range(count):
            names[engine.submit(request_of(generator, 1, 12))] = name

    burst(first, 2)
    for _ in range(3):
        engine.step()
    burst(second, 2)
    for _ in range(4):
        engine.step()
    events = [names.get(event, event) for event in engine.events]
    # Each prompt has two chunks, one for each turn. Nothing runs until the first prompt is done.
    wanted = [first, first, "frame", first, "frame", first, "frame", *[second, "frame"] * 4]
    assert events == wanted


def test_paused_requests_let_a_burst_of_prompts_burst_no_more(generator):
    """The first newcomer runs at once, and a paused request that is read meanwhile waits for one chunk."""
    engine = watched(generator, 4, prefix_bytes=0)
    paused = engine.submit(request_of(generator, 0, 12), max_unread=1)
    while engine.step():
        pass
    newcomers = [engine.submit(request_of(generator, 1, 12)) for _ in range(3)]
    del engine.events[:]
    run_chunk = engine._run_chunk

    def read_after(active):
        run_chunk(active)
        paused.take()

    engine._run_chunk = read_after
    engine.step()
    del engine._run_chunk
    for _ in range(3):
        engine.step()
    assert engine.events == [newcomers[0], "frame", newcomers[0], "frame", newcomers[1], "frame", newcomers[1], "frame"]


def test_a_request_that_is_cancelled_while_an_idle_engine_reads_its_prompt_costs_one_chunk(generator):
    engine = watched(generator, 2, prefix_bytes=0)
    gone, fine = (engine.submit(request_of(generator, 1, 2)) for _ in range(2))
    run_chunk = engine._run_chunk
    engine._run_chunk = lambda active: (run_chunk(active), engine.cancel(gone))
    Engine.step(engine)
    del engine._run_chunk
    assert engine.events == [gone, fine, fine, "frame"] and gone.finish_reason == "cancelled"


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
    tickets = [engine.submit(request_of(generator, index, frames)) for index, frames in enumerate([6, 4, 6])]
    while engine.step():
        pass
    assert sizes == [1, 1, 2, 2, 3, 3, 1, 1, 1, 1]  # two chunks for each prompt but the first
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


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_exception_in_a_step_ends_the_requests_in_it_and_the_engine_lives(generator, monkeypatch, ahead):
    """A paused request is not in the step, though the batch covers its slot; nor is one that waits."""
    engine = watched(generator, 3, ahead=ahead)
    paused = engine.submit(request_of(generator, 3, 9), max_unread=2)
    while engine.step():
        pass
    running = [engine.submit(request_of(generator, index, 9)) for index in range(2)]
    step_until(engine, lambda: all(ticket.num_frames for ticket in running))
    waiting = [engine.submit(request_of(generator, 2, 4)) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(csm.runner, "decode_frame", lambda *_: 1 / 0)
        engine.step()
    assert all(isinstance(ticket.error, ZeroDivisionError) for ticket in running)
    assert engine.num_active == 1 and not paused.finished
    for ticket in waiting:
        assert torch.equal(torch.stack(run(engine, ticket)), codes_alone(generator, 2)[:4])
    codes = []
    for _ in range(30):
        engine.step()
        codes += [] if (frame := paused.take()) is None else [frame.codes_K]
    assert torch.equal(torch.stack(codes), codes_alone(generator, 3)[:9])
    assert engine.idle


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_exception_while_a_frame_is_awaited_ends_the_requests_in_it(generator, monkeypatch, ahead):
    """As CUDA reports a failed kernel, also for a request whose last frame it was."""
    engine = watched(generator, 2, ahead=ahead)
    tickets = [engine.submit(request_of(generator, 0, frames)) for frames in (1, 9)]
    monkeypatch.setattr(csm.runner.Output, "wait", lambda _: 1 / 0)
    step_until(engine, lambda: all(ticket.finished for ticket in tickets))
    monkeypatch.undo()
    assert all(isinstance(ticket.error, ZeroDivisionError) for ticket in tickets) and engine.idle
    again = engine.submit(request_of(generator, 0, 9))
    assert torch.equal(torch.stack(run(engine, again)), codes_alone(generator, 0)[:9])


def test_an_exception_in_one_slots_codec_ends_that_request_alone(generator, monkeypatch):
    """The others keep their codes and samples, and the slot is free for the next request."""
    engine = watched(generator, 3)
    requests = [(0, 12), (1, 12), (2, 12)]
    tickets = [engine.submit(request_of(generator, *each, audio=True)) for each in requests]
    step_until(engine, lambda: all(ticket.num_frames for ticket in tickets))
    decode = csm.runner.SlotDecoders.decode
    broken = engine._slots[1].ticket

    def fail_in_slot_1(self, slot, codes_TK):
        return decode(self, slot, codes_TK) if slot != 1 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(csm.runner.SlotDecoders, "decode", fail_in_slot_1)
        step_until(engine, lambda: broken.finished)
    assert broken is tickets[1] and isinstance(broken.error, ZeroDivisionError)
    assert broken.finish_reason == "error" and engine._slots[1] is None
    after = engine.submit(request_of(generator, 1, 12, audio=True))
    while engine.step():
        check_holdings(engine)
    for index, ticket in ((0, tickets[0]), (2, tickets[2]), (1, after)):
        check_frames(generator, ticket, index, 12, [ticket.take() for _ in range(ticket.num_unread)])


@pytest.mark.parametrize("at", ["frame", "end"])
def test_an_exception_in_a_readers_notify_ends_that_request_alone(generator, at):
    engine = watched(generator, 2)

    def notify():
        if at == "frame" or broken.finished:
            raise ZeroDivisionError

    broken = engine.submit(request_of(generator, 1, 3), notify=notify)
    fine = engine.submit(request_of(generator, 0, 6))
    assert torch.equal(torch.stack(run(engine, fine)), codes_alone(generator, 0)[:6])
    assert broken.finish_reason == ("error" if at == "frame" else "length")
    assert engine.idle


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
