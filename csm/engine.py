"""Slots that speak together: requests in, frames out. Knows rows, codes and samples, and nothing of text.

A ``BatchRunner`` steps the first slots of the engine's buffers together. It has one CUDA graph per context bucket of
the KV cache and one for the codec. On a GPU, frame t+1 is launched before frame t is read back: codes and samples
arrive through pinned memory one frame late, and the codec decodes on its own stream while the next frame is computed.

Shapes: B slots, T rows, C columns of a row, K codebooks, N samples of a frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from csm.cache import PrefixCache
from csm.codec import Codec, StreamDecoder
from csm.frame import FrameState, decode_frame
from csm.graph import Graph, Pool, graphs_enabled
from csm.model import CSM
from csm.prefill import Prefill
from csm.sampling import SamplingParams


def _on(device: torch.device) -> AbstractContextManager[object]:
    """CUDA's streams and events are those of the current device: make it this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Request(NamedTuple):
    """A prompt's rows (T, C) and mask, where its context turns end, how to draw, and the most frames to speak."""

    row_TC: Tensor
    mask_TC: Tensor
    turn_ends: tuple[int, ...]
    params: SamplingParams
    max_frames: int


class Frame(NamedTuple):
    """80 ms of one slot: codes (K,) and, where they were asked for, samples (N,), on the CPU."""

    slot: int
    codes_K: Tensor
    audio_N: Tensor | None


class Output:
    """Where one step's codes and samples arrive on the host, and when."""

    def __init__(self, batch: int, num_codebooks: int, frame_size: int, device: torch.device):
        pinned = device.type == "cuda"
        self.codes_BK = torch.zeros(batch, num_codebooks, dtype=torch.int64, pin_memory=pinned)
        self.audio_BN = torch.zeros(batch, frame_size, dtype=torch.float32, pin_memory=pinned)
        self.ready = torch.cuda.Event() if pinned else None

    def wait(self) -> None:
        if self.ready is not None:
            self.ready.synchronize()


class BatchRunner:
    """A batch of slots that step together."""

    def __init__(
        self, model: CSM, state: FrameState, decoder: StreamDecoder | None, codec_stream: torch.cuda.Stream | None
    ):
        self.model = model
        self.state = state
        self.decoder = decoder
        self.device = model.device
        self.graphs: dict[int, Graph] = {}
        self.codec_graph: Graph | None = None
        frame_size = 0 if decoder is None else decoder.audio_BN.shape[1]
        self.outputs = [Output(state.batch, state.codes_BK.shape[1], frame_size, self.device) for _ in range(2)]
        self._codec_stream = codec_stream
        if codec_stream is not None:
            self._spoken, self._decoded = torch.cuda.Event(), torch.cuda.Event()

    def capture(self, frame_pool: Pool, codec_pool: Pool) -> None:
        """Capture the step for every context_bucket, and the codec's."""

        def buffers() -> dict[str, Tensor]:
            weights = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
            return {**weights, **self.state.buffers()}

        for context_bucket in self.state.backbone_cache.buckets:
            step = partial(decode_frame, self.model, self.state, context_bucket)
            self.graphs[context_bucket] = Graph(step, buffers, self.device, frame_pool)
        if self.decoder is not None:
            decoder = self.decoder
            named = {"codes": decoder.codes_BK, "audio": decoder.audio_BN}
            self.codec_graph = Graph(decoder.run, lambda: named, self.device, codec_pool)

    def restart(self, audio: bool) -> None:
        """Before the first step of new requests: the buffers are where they were, the codec begins again."""
        for graph in list(self.graphs.values())[:1]:  # all have the same buffers
            graph.check()
        if audio and self.decoder is not None:
            self.decoder.reset()

    def launch(self, context_bucket: int, output: Output, audio: bool) -> None:
        """One frame of every slot, on its way to ``output``."""
        if context_bucket in self.graphs:
            self.graphs[context_bucket].replay()
        else:
            decode_frame(self.model, self.state, context_bucket)
        output.codes_BK.copy_(self.state.codes_BK, non_blocking=True)
        if not audio:
            if output.ready is not None:
                output.ready.record()
        elif output.ready is None:
            self._decode(output)
        else:
            assert self._codec_stream is not None
            main = torch.cuda.current_stream()
            main.wait_event(self._decoded)  # the codec has read the frame before
            self._hand_over()
            self._spoken.record(main)
            with torch.cuda.stream(self._codec_stream):
                self._codec_stream.wait_event(self._spoken)
                self._run_codec(output)
                self._decoded.record()
                output.ready.record()

    def _hand_over(self) -> None:
        assert self.decoder is not None
        self.decoder.codes_BK.copy_(self.state.codes_BK)

    def _run_codec(self, output: Output) -> None:
        assert self.decoder is not None
        if self.codec_graph is not None:
            self.codec_graph.replay()
        else:
            self.decoder.run()
        output.audio_BN.copy_(self.decoder.audio_BN, non_blocking=True)

    def _decode(self, output: Output) -> None:
        self._hand_over()
        self._run_codec(output)


class Engine:
    """One set of buffers for up to ``max_batch`` slots, and the runners over them.

    One call of ``run`` at a time; whoever wants several streams at once takes several engines. ``codec`` gives the
    codec when samples are first asked for.
    """

    def __init__(self, model: CSM, codec: Callable[[], Codec], max_batch: int, prefixes: PrefixCache):
        self.model = model
        self.max_batch = max_batch
        self._codec = codec
        with torch.inference_mode(False):  # buffers that any later call may write, whatever mode this one is in
            self._state = FrameState.allocate(model.config, max_batch, model.device, model.dtype)
            self._prefill = Prefill(model, prefixes)
        self._runners: dict[tuple[int, bool], BatchRunner] = {}
        self._codec_stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self.captured_batch_sizes: list[int] = []  # batch sizes

    def capture(self, batches: Sequence[int]) -> None:
        """Capture the prompts' passes, and a runner of each of these batch sizes. Not in the middle of a request."""
        if not graphs_enabled(self.model.device):
            return
        frame_pool, codec_pool = Pool(self.model.device), Pool(self.model.device)
        for batch in sorted(set(batches), reverse=True):  # the largest first: the smaller ones fit its memory
            self._runner(batch, audio=True).capture(frame_pool, codec_pool)
        self._prefill.capture(frame_pool)
        self.captured_batch_sizes = sorted(set(batches))

    def run(self, requests: Sequence[Request], audio: bool) -> Iterator[Frame]:
        """Speak all requests, slot i the i-th, and hand out frames until every one has ended."""
        assert 1 <= len(requests) <= self.max_batch
        try:
            yield from self._run(requests, audio)
        finally:
            if self._codec_stream is not None:  # whatever comes next waits for what is still being decoded
                torch.cuda.current_stream(self.model.device).wait_stream(self._codec_stream)

    def _run(self, requests: Sequence[Request], audio: bool) -> Iterator[Frame]:
        # A captured runner with slots to spare beats one of the very size that is not captured.
        batch = next((size for size in self.captured_batch_sizes if size >= len(requests)), len(requests))
        runner = self._runner(batch, audio or batch in self.captured_batch_sizes)
        with _on(self.model.device):
            runner.restart(audio)
            self._prefill.check()
            for slot, request in enumerate(requests):
                row_TC, mask_TC, turn_ends, params, _ = request
                self._prefill.start(runner.state, slot, row_TC, mask_TC, params, turn_ends)
        live = {slot: request.max_frames for slot, request in enumerate(requests)}
        longest = max(request.row_TC.shape[0] for request in requests)
        for spoken, output in enumerate(self._steps(runner, longest, max(live.values()), audio), start=1):
            output.wait()
            for slot, max_frames in list(live.items()):
                if not output.codes_BK[slot].any():  # a frame of zeros ends the speech
                    del live[slot]
                    continue
                yield Frame(slot, output.codes_BK[slot].clone(), output.audio_BN[slot].clone() if audio else None)
                if spoken == max_frames:
                    del live[slot]
            if not live:
                return

    def _steps(self, runner: BatchRunner, longest: int, count: int, audio: bool) -> Iterator[Output]:
        """``count`` steps; on a GPU each is launched before the one before it is handed out."""
        ahead = 1 if runner.device.type == "cuda" else 0
        launched: deque[Output] = deque()
        for step in range(count):
            output = runner.outputs[step % 2]
            with _on(runner.device):
                runner.launch(runner.state.backbone_cache.bucket_for(longest + step), output, audio)
            launched.append(output)
            if len(launched) > ahead:
                yield launched.popleft()
        yield from launched

    def _runner(self, batch: int, audio: bool) -> BatchRunner:
        if (batch, audio) not in self._runners:
            with torch.inference_mode(False), torch.no_grad():
                decoder = self._codec().stream_decoder(batch) if audio else None
                self._runners[batch, audio] = BatchRunner(
                    self.model, self._state.narrow(batch), decoder, self._codec_stream
                )
        return self._runners[batch, audio]
