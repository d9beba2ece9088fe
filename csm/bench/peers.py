"""What the step is compared with: ``torch.compile`` of the same modules, and HF Transformers with the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csm.bench.model_setup import Setup, prompt_rows
from csm.bench.stepping import FrameRunner, Make, bench_bucket, stepping
from csm.frame import FrameState, decode_frame
from csm.model import CSM
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import export, hf_table

NEVER = -1  # an id that no codebook has


def compiled(mode: str) -> Make:
    """The step with both transformers under ``torch.compile``."""

    def make_step(model: CSM, state: FrameState) -> Callable[[], None]:
        torch.compiler.reset()  # recompilations of earlier rows count against the limit of this one
        for cache in (state.backbone_cache, state.depth_cache):
            torch._dynamo.mark_static_address(cache.k_LBGSd)
            torch._dynamo.mark_static_address(cache.v_LBGSd)
        model.backbone.compile(mode=mode, dynamic=False)
        model.depth_decoder.compile(mode=mode, dynamic=False)

        def step() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            decode_frame(model, state, bench_bucket(state))

        return step

    return lambda setup, batch: stepping(setup, batch, make_step)


def transformers_model(setup: Setup) -> Any:
    """HF Transformers' CSM with the same weights. Its codec stays on the meta device: codes do not need it.

    It never stops at a frame of zeros, so a trained model is timed for as many frames as were asked for.
    """
    from transformers import CsmConfig, CsmForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    values = write_hf_config(setup.config, setup.codec_config)
    values["depth_decoder_config"]["max_position_embeddings"] = setup.config.num_codebooks + 1
    values |= {"audio_token_id": 1, "audio_eos_token_id": 2, "pad_token_id": 0}
    with torch.device("meta"):
        model = CsmForConditionalGeneration(CsmConfig(**values))
    tensors = dict(export(setup.weights, hf_table(setup.config)))
    model.load_state_dict(tensors, strict=False, assign=True)
    with setup.device:
        for part in (model.backbone_model, model.depth_decoder.model):  # buffers that no checkpoint holds
            part.rotary_emb = type(part.rotary_emb)(part.config)
    offsets = torch.arange(setup.config.num_codebooks, device=setup.device) * setup.config.audio_vocab_size
    model.backbone_model.embed_tokens.audio_tokens_offsets = offsets
    model.config.codebook_eos_token_id = NEVER
    return model.eval()


def load_transformers(folder: str) -> Any:
    """HF Transformers' CSM from a folder in its layout, in bfloat16, with its codec in float32. It never stops."""
    from transformers import CsmForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = CsmForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.codec_model.float()
    model.config.codebook_eos_token_id = NEVER
    return model


class Clock:
    """A streamer for ``generate``: keeps each frame, and the milliseconds since the one before."""

    def __init__(self, num_codebooks: int):
        self.num_codebooks = num_codebooks
        self.frames: list[tuple[float, Tensor]] = []
        self.last = time.perf_counter()

    def put(self, codes_BK: Tensor) -> None:
        if codes_BK.shape[-1] == self.num_codebooks:  # the prompt, which has another shape, is put too
            now = time.perf_counter()
            self.frames.append(((now - self.last) * 1000, codes_BK))
            self.last = now

    def end(self) -> None:
        pass


def transformers(static_cache: bool) -> Make:
    """HF Transformers' ``generate``; with a static cache it is compiled, as its documentation describes."""

    def make(setup: Setup, batch: int) -> FrameRunner:
        model = transformers_model(setup)
        if static_cache:
            torch.compiler.reset()
            model.generation_config.cache_implementation = "static"
            model.depth_decoder.generation_config.cache_implementation = "static"
        ids = prompt_rows(setup.config)[0][:, -1].to(setup.device).repeat(batch, 1)

        @torch.no_grad()
        def generate(frames: int) -> list[tuple[float, Tensor]]:
            clock = Clock(setup.config.num_codebooks)
            options = dict(do_sample=False, depth_decoder_do_sample=False, max_new_tokens=frames)
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
            return clock.frames

        return generate

    return make
