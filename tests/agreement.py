"""How far a generator's greedy codes agree with golden codes, which another implementation made from the same weights.

Shapes: T frames, K codebooks, C columns of a row (K codebooks, then text).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from csm import Generator
from csm.cache import KVCache
from csm.prompt import TextTokenizer, audio_rows, text_rows

FLOAT32_FLOOR = 0.99  # teacher-forced: two float32 implementations differ in a few near-ties only


@dataclass(frozen=True)
class Golden:
    """A sentence and its greedy codes (T, K); the frame after the last one is K zeros, which end the speech."""

    speaker: int
    text: str
    codes_TK: Tensor


@dataclass(frozen=True)
class Agreement:
    """What ``compare`` measured. Frames count from 1."""

    num_frames: int
    generated_frames: int
    first_difference: int | None
    teacher_forced: float
    ends: bool

    def __str__(self) -> str:
        same = f"{self.num_frames} of {self.num_frames} frames equal"
        free = same if self.first_difference is None else f"first difference in frame {self.first_difference}"
        ends = "ends" if self.ends else "does not end"
        return (
            f"free running: {free}, {self.generated_frames} frames; teacher-forced: {self.teacher_forced:.2%} of the "
            f"codes equal, speech {ends} after frame {self.num_frames}"
        )

    def failures(self, floor: float = FLOAT32_FLOOR) -> list[str]:
        """What is wrong: empty if these are the right weights, read and computed as they should be."""
        failures = []
        if self.first_difference == 1:
            failures.append("frame 1 differs from the golden codes")
        if self.teacher_forced < floor:
            failures.append(f"teacher-forced agreement is {self.teacher_forced:.2%}, expected at least {floor:.0%}")
        if not self.ends:
            failures.append(f"the frame after frame {self.num_frames} is not all zeros")
        return failures


def compare(generator: Generator, golden: Golden) -> Agreement:
    """Generate the sentence greedily, and predict each code from the golden codes before it."""
    num_frames, num_codebooks = golden.codes_TK.shape
    assert num_codebooks == generator.config.num_codebooks, (num_codebooks, generator.config.num_codebooks)
    limit_ms = 80 * (num_frames + 8)
    codes_TK = generator.generate_codes(golden.text, golden.speaker, max_audio_length_ms=limit_ms, temperature=0)
    common = min(num_frames, codes_TK.shape[0])
    differing = (codes_TK[:common] != golden.codes_TK[:common]).any(dim=1).nonzero()
    first_difference = int(differing[0]) + 1 if len(differing) else None
    if first_difference is None and codes_TK.shape[0] != num_frames:
        first_difference = common + 1
    forced_TK = teacher_forced_codes(generator, golden)
    return Agreement(
        num_frames=num_frames,
        generated_frames=codes_TK.shape[0],
        first_difference=first_difference,
        teacher_forced=(forced_TK[:-1] == golden.codes_TK).double().mean().item(),
        ends=not forced_TK[-1].any(),
    )


@torch.no_grad()
def teacher_forced_codes(generator: Generator, golden: Golden) -> Tensor:
    """The likeliest codes of T + 1 frames, (T + 1, K), each given the golden codes of all positions before it.

    One prefill of the backbone over the prompt and the golden frames, then one of the depth decoder with a frame in
    each slot. No step of the engine is involved.
    """
    model, config, device = generator.model, generator.config, generator.device
    tokenizer = TextTokenizer(generator._checkpoint.tokenizer_path, config.text_vocab_size)
    text = text_rows(tokenizer.encode(golden.speaker, golden.text), config.num_codebooks)
    audio = audio_rows(golden.codes_TK)  # the last of its T + 1 rows is the frame of zeros
    num_frames = golden.codes_TK.shape[0] + 1
    row_TC = torch.cat((text.row_TC, audio.row_TC[:-1])).to(device)
    mask_TC = torch.cat((text.mask_TC, audio.mask_TC[:-1])).to(device)

    num_rows = row_TC.shape[0]
    cache = KVCache.allocate(config.backbone, 1, config.backbone.max_positions, device, model.dtype)
    meta = model.backbone.attention_metadata(torch.arange(num_rows, device=device)[None], context_bucket=num_rows)
    hidden = model.backbone(model.embed_rows(row_TC[None], mask_TC[None]), cache, meta)[:, -num_frames:]
    codes = [model.logits(0, hidden)[0].argmax(-1)]

    given_TK = audio.row_TC[:, :-1].to(device)
    embedded = [model.code_embedding(k)[given_TK[:, k]] for k in range(config.num_codebooks - 1)]
    x = torch.stack((model.enter_depth(hidden)[0], *embedded), dim=1)
    cache = KVCache.allocate(config.depth_decoder, num_frames, config.num_codebooks, device, model.dtype)
    positions = torch.arange(config.num_codebooks, device=device).expand(num_frames, -1)
    meta = model.depth_decoder.attention_metadata(positions, context_bucket=config.num_codebooks)
    hidden = model.depth_decoder(x, cache, meta)
    codes += [model.logits(k, hidden[:, k : k + 1])[:, 0].argmax(-1) for k in range(1, config.num_codebooks)]
    return torch.stack(codes, dim=1).cpu()
