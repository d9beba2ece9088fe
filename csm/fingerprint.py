"""A hash of a model: what of a book or a batch may be used again after a stop depends on it.

Names and paths do not count: a folder may hold other weights than it did, and the same weights may move.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from csm.generator import Generator
from csm.kernels.row_file import RowFile
from csm.model import CSM
from csm.prompt import Segment
from csm.quantize import quantized_weights

SAMPLED = 4096  # values of each tensor that are read


def fingerprint(generator: Generator, references: Sequence[Segment]) -> str:
    """A hash of the model (configuration, type, device, tensors' values), its tokenizer and the voices' codes."""
    digest = hashlib.sha256(f"csm-book-1 {generator.config} {generator.model.dtype} {generator.device.type}".encode())
    digest.update(generator.tokenizer.fingerprint().encode())
    tensors = [*sorted(generator.model.state_dict().items()), *quantised_tensors(generator.model)]
    _add(digest, tensors)
    for segment in references:
        assert segment.codes is not None
        digest.update(f"{segment.speaker} {segment.text!r}".encode())
        digest.update(segment.codes.to(torch.int32).cpu().numpy().tobytes())
    return digest.hexdigest()


def codec_fingerprint(generator: Generator) -> str:
    """A hash of the codec, which makes the samples of a model's codes: values of every tensor."""
    digest = hashlib.sha256(f"{generator.codec.config}".encode())
    _add(digest, sorted(generator.codec.state_dict().items()))
    return digest.hexdigest()


def _add(digest: hashlib._Hash, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.shape[0] // SAMPLED)][:SAMPLED]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sampled.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def quantised_tensors(model: CSM) -> Iterator[tuple[str, Tensor]]:
    """What a state dict lacks: the tensors of quantised weights, and rows of tables that are in a file."""
    for weight in quantized_weights(model):
        if not isinstance(weight.value, Tensor):
            for name, part in vars(weight.value).items():
                if isinstance(part, Tensor):
                    yield f"{weight.name}.{name} {weight.value.kind}", part
    for name, table in (("text_embedding", model.text_embedding), ("audio_embedding", model.audio_embedding)):
        if isinstance(table, RowFile):
            yield name, table.gather(torch.arange(0, table.shape[0], max(1, table.shape[0] // 64)))
