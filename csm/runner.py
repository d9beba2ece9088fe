"""One batched step of the model and the codec: launch, capture, read back.

A ``BatchRunner`` steps the first ``batch`` slots of the engine's buffers together, with one CUDA graph per context
bucket of the KV cache. An ``AudioDecoder`` turns codes into samples: on a GPU with each step, on a CPU when the engine
hands out frames. On a GPU both write into an ``Output``: pinned host memory, device codes for the codec, and the event
that says when the host may read. The codec runs on its own stream, so it decodes frame t while the model generates
frame t+1.

Shapes: B slots, K codebooks, N samples of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from csm.codec import Codec, StreamDecoder
from csm.frame import FrameState, decode_frame
from csm.graph import Graph, Pool
from csm.model import CSM

FRAMES_AHEAD = 2  # on a GPU: frames launched before the oldest one is read back
MAX_GROUP = 4  # on a CPU: frames of a request that the codec decodes together


class Output:
    """Where one step's codes and samples arrive.

    ``codes_BK`` and ``audio_BN`` are on the host. ``device_codes_BK`` holds the codes on the device for the codec, so
    the model may generate the next frame before the codec has read this one.
    """

    def __init__(self, batch: int, num_codebooks: int, frame_size: int, device: torch.device):
        on_gpu = device.type == "cuda"
        self.codes_BK = torch.zeros(batch, num_codebooks, dtype=torch.int64, pin_memory=on_gpu)
        self.audio_BN = torch.zeros(batch, frame_size, dtype=torch.float32, pin_memory=on_gpu)
        self.device_codes_BK = torch.zeros_like(self.codes_BK, device=device) if on_gpu else self.codes_BK
        self.generated = torch.cuda.Event() if on_gpu else None
        self.ready = torch.cuda.Event() if on_gpu else None

    def wait(self) -> None:
        """Block until codes and samples are on the host."""
        if self.ready is not None:
            self.ready.synchronize()


class AudioDecoder(Protocol):
    """The codec's streaming state of every slot."""

    def reset(self, slot: int) -> None:
        """Start a new stream in ``slot``."""

    def move(self, source: int, target: int) -> None:
        """Continue the stream of slot ``source`` in slot ``target``."""


def group_size(num_frames: int, max_unread: int | None) -> int:
    """How many frames the codec decodes together on a CPU, after the first ``num_frames`` frames of a request.

    The codec reads its weights once for a group, but the group's first frame waits for the last. So a group must fit
    into what a listener has in reserve. While generation is faster than playback the reserve grows with every frame:
    the first frame is decoded alone, the next 12 in pairs, then 4 together. A player that starts 0.1 s after the first
    audio never waits for a group where generation takes at most 0.88 of the time that it plays. The groups depend on
    nothing else, so the samples of a request are the same in every run. A group is never larger than ``max_unread``.
    """
    size = 1 if num_frames == 0 else 2 if num_frames < 13 else MAX_GROUP
    return size if max_unread is None else min(size, max_unread)


class SlotDecoders:
    """A stream decoder per slot, for devices without graphs: a slot's samples do not depend on the others."""

    def __init__(self, codec: Codec, num_slots: int):
        self._codec = codec
        self._decoders: list[StreamDecoder | None] = [None] * num_slots

    def _decoder(self, slot: int) -> StreamDecoder:
        decoder = self._decoders[slot]
        if decoder is None:
            with torch.inference_mode(False):
                decoder = self._decoders[slot] = self._codec.stream_decoder(max_frames=MAX_GROUP)
        return decoder

    def decode(self, slot: int, codes_TK: Tensor) -> Tensor:
        """Decode the slot's next frames, at most ``MAX_GROUP``, (T, K) to (T, N) on the CPU."""
        return self._decoder(slot).decode(codes_TK.T.unsqueeze(0).to(self._codec.device))[0].cpu()

    def reset(self, slot: int) -> None:
        self._decoder(slot).reset()

    def move(self, source: int, target: int) -> None:
        decoders = self._decoders
        decoders[source], decoders[target] = decoders[target], decoders[source]


class BatchDecoder:
    """One stream decoder over all slots on a stream of its own, captured per batch size."""

    def __init__(self, codec: Codec, num_slots: int, device: torch.device):
        with torch.inference_mode(False):
            self._decoder = codec.stream_decoder(num_slots)
        self._views: dict[int, StreamDecoder] = {}
        self._graphs: dict[int, Graph] = {}
        self._device = device
        self._active: tuple[int, ...] = ()
        # High priority: the codec's small kernels must not queue behind the model's next frame.
        self._stream = torch.cuda.Stream(device, priority=-1)

    def _view(self, batch: int) -> StreamDecoder:
        if batch not in self._views:
            with torch.inference_mode(False):
                self._views[batch] = self._decoder.narrow(batch)
        return self._views[batch]

    def capture(self, batch: int, pool: Pool) -> None:
        """Capture the codec's step for this batch size; the streams of all slots go on unharmed."""
        view = self._view(batch)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        self._decoder.active_B.fill_(False)  # a capture runs the step
        self._active = ()
        self._graphs[batch] = Graph(view.run, view.buffers, self._device, pool)
        self._stream.wait_stream(current)

    def check(self) -> None:
        """Raise GraphError if a weight or buffer of the captured codec has moved."""
        for graph in self._graphs.values():
            graph.check()

    def decode(self, output: Output, slots: Sequence[int]) -> None:
        """Decode the codes of these slots into samples. Streams of other slots stay where they are."""
        assert output.generated is not None and output.ready is not None
        view = self._view(output.codes_BK.shape[0])
        graph = self._graphs.get(output.codes_BK.shape[0])
        with torch.cuda.stream(self._stream):
            self._set_active(tuple(slots))
            self._stream.wait_event(output.generated)
            view.codes_BK.copy_(output.device_codes_BK)
            if graph is None:
                view.run()
            else:
                graph.replay()
            output.audio_BN.copy_(view.audio_BN, non_blocking=True)
            output.ready.record()

    def _set_active(self, slots: tuple[int, ...]) -> None:
        if slots != self._active:
            active_B = torch.zeros(self._decoder.active_B.shape, dtype=torch.bool)
            active_B[list(slots)] = True
            self._decoder.active_B.copy_(active_B.pin_memory(), non_blocking=True)
            self._active = slots

    def reset(self, slot: int) -> None:
        with torch.cuda.stream(self._stream):
            self._decoder.reset([slot])

    def move(self, source: int, target: int) -> None:
        with torch.cuda.stream(self._stream):
            self._decoder.move(source, target)


def audio_decoder(codec: Codec, num_slots: int, device: torch.device) -> AudioDecoder:
    """The decoder that suits the device."""
    return BatchDecoder(codec, num_slots, device) if device.type == "cuda" else SlotDecoders(codec, num_slots)


class BatchRunner:
    """Steps the first ``state.batch`` slots together."""

    def __init__(self, model: CSM, state: FrameState, frame_size: int):
        self.model = model
        self.state = state
        self._graphs: dict[int, Graph] = {}
        num_codebooks, on_gpu = state.codes_BK.shape[1], model.device.type == "cuda"
        self.frames_ahead = FRAMES_AHEAD if on_gpu else 0
        self._outputs = [
            Output(state.batch, num_codebooks, frame_size, model.device) for _ in range(self.frames_ahead + 1)
        ]
        self._next_output = 0

    @property
    def is_captured(self) -> bool:
        return bool(self._graphs)

    def capture(self, pool: Pool) -> None:
        """Capture the step for every context bucket. Slots in use continue where they were."""
        everything = slice(None)
        saved = self.state.save(everything)
        for context_bucket in self.state.backbone_cache.buckets:
            step = partial(decode_frame, self.model, self.state, context_bucket)
            self._graphs[context_bucket] = Graph(step, self._buffers, self.model.device, pool)
        self.state.restore(saved, everything)

    def _buffers(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers()), **self.state.buffers()}

    def check(self) -> None:
        """Raise GraphError if a weight or buffer of the captured step has moved."""
        for graph in list(self._graphs.values())[:1]:  # every bucket's graph has the same buffers
            graph.check()

    def launch(self, context_bucket: int, decoder: BatchDecoder | None, slots: Sequence[int]) -> Output:
        """Generate one frame of every slot, and decode the samples of ``slots`` if there is a decoder.

        At most ``frames_ahead + 1`` outputs may be unread at a time: their buffers are used in turn.
        """
        output = self._outputs[self._next_output]
        self._next_output = (self._next_output + 1) % len(self._outputs)
        self._generate(context_bucket)
        self._read_back(output)
        if decoder is not None:
            decoder.decode(output, slots)
        elif output.ready is not None:
            output.ready.record()
        return output

    def _generate(self, context_bucket: int) -> None:
        if context_bucket in self._graphs:
            self._graphs[context_bucket].replay()
        else:
            decode_frame(self.model, self.state, context_bucket)

    def _read_back(self, output: Output) -> None:
        if output.generated is None:
            output.codes_BK.copy_(self.state.codes_BK)
            return
        output.device_codes_BK.copy_(self.state.codes_BK)
        output.codes_BK.copy_(self.state.codes_BK, non_blocking=True)
        output.generated.record()
