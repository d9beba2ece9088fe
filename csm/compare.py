"""``python -m csm compare A B``: how far a quantised (or otherwise changed) model is from the one it was made of.

A generates sentences; both models then read A's codes (teacher forcing), and their logits are compared. Reported are
the relative error of the weights, the Kullback-Leibler divergence of B's distributions from A's and the share of
positions with the same best code, by codebook, and the number of frames until the codes of both, generated greedily,
differ.

Shapes: N rows of prompt and codes, T frames, K codebooks, V ids, D dim.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from csm.cache import KVCache
from csm.command_line import add_tokenizer_option
from csm.errors import CSMError
from csm.generator import Generator
from csm.kernels.quantized import dense
from csm.model import CSM
from csm.prompt import TextTokenizer, build_prompt
from csm.quantize import quantized_weights
from csm.weights import open_checkpoint

SENTENCES = (
    "Good morning, how are you today?",
    "The quick brown fox jumps over the lazy dog.",
    "We will meet again tomorrow at nine.",
    "Please close the window before you leave.",
)


class Divergence(NamedTuple):
    """``kl_K`` in nats and ``agreement_K``, the share of equal best ids, each averaged over frames."""

    kl_K: Tensor
    agreement_K: Tensor


def weight_errors(a: CSM, b: CSM) -> dict[str, float]:
    """|b - a| / |a| of every weight that a scheme can name (Frobenius norms)."""
    errors = {}
    for ours, theirs in zip(quantized_weights(a), quantized_weights(b), strict=True):
        reference = dense(ours.value).float()
        errors[ours.name] = ((dense(theirs.value).float() - reference).norm() / reference.norm()).item()
    return errors


@torch.inference_mode()
def teacher_forced_logits(model: CSM, row_NC: Tensor, mask_NC: Tensor, num_frames: int) -> Tensor:
    """Logits of all codebooks of the last ``num_frames`` rows, which hold codes: (T, K, V) float32."""
    config, device = model.config, model.device
    K, num_rows = config.num_codebooks, row_NC.shape[0]
    position_1N = torch.arange(num_rows, device=device).unsqueeze(0)
    cache = KVCache.allocate(config.backbone, 1, num_rows, device, model.dtype)
    x_1ND = model.embed_rows(row_NC.unsqueeze(0), mask_NC.unsqueeze(0))
    hidden_1ND = model.backbone(x_1ND, cache, model.backbone.attention_metadata(position_1N, num_rows))
    hidden_T1D = hidden_1ND[0, num_rows - num_frames - 1 : -1].unsqueeze(1)  # a row predicts the next one's codes
    code_TK = row_NC[num_rows - num_frames :, :-1]
    code_embeddings = [F.embedding(code_TK[:, k], model.code_embedding(k)) for k in range(K - 1)]
    x_TKD = torch.stack((model.enter_depth(hidden_T1D).squeeze(1), *code_embeddings), dim=1)
    depth_cache = KVCache.allocate(config.depth_decoder, num_frames, K, device, model.dtype)
    position_TK = torch.arange(K, device=device).repeat(num_frames, 1)
    meta = model.depth_decoder.attention_metadata(position_TK, K)
    hidden_TKD = model.depth_decoder(x_TKD, depth_cache, meta)
    logits = [model.logits(0, hidden_T1D)] + [model.logits(k, hidden_TKD[:, k : k + 1]) for k in range(1, K)]
    return torch.cat(logits, dim=1).float()


def divergence(logits_a_TKV: Tensor, logits_b_TKV: Tensor) -> Divergence:
    """Of B's distributions from A's."""
    log_a_TKV, log_b_TKV = logits_a_TKV.log_softmax(-1), logits_b_TKV.log_softmax(-1)
    kl_TK = (log_a_TKV.exp() * (log_a_TKV - log_b_TKV)).sum(-1)
    agreement_TK = logits_a_TKV.argmax(-1) == logits_b_TKV.argmax(-1)
    return Divergence(kl_TK.mean(0), agreement_TK.float().mean(0))


def compare_sentence(a: Generator, b: Generator, tokenizer: TextTokenizer, text: str, seed: int) -> Divergence:
    """Both models on the codes that A generates for ``text``."""
    code_TK = a.generate_codes(text, seed=seed, max_audio_length_ms=8000)
    if not len(code_TK):
        raise CSMError(f"the first model generates no audio for {text!r}")
    prompt = build_prompt([], tokenizer.encode(0, text), a.config)
    row_NC = torch.cat((prompt.row_TC, F.pad(code_TK, (0, 1))))
    code_mask_TC = torch.ones(code_TK.shape[0], row_NC.shape[1], dtype=torch.bool)
    code_mask_TC[:, -1] = False
    mask_NC = torch.cat((prompt.mask_TC, code_mask_TC))
    logits = [teacher_forced_logits(g.model, row_NC.to(g.device), mask_NC.to(g.device), len(code_TK)) for g in (a, b)]
    return divergence(logits[0].cpu(), logits[1].cpu())


def greedy_agreement(a: Generator, b: Generator, text: str) -> int:
    """Frames until the codes that both generate at temperature 0 differ, of at most 4 s."""
    codes = [g.generate_codes(text, temperature=0, max_audio_length_ms=4000) for g in (a, b)]
    num_frames = min(len(code_TK) for code_TK in codes)
    same_T = (codes[0][:num_frames] == codes[1][:num_frames]).all(1)
    return num_frames if bool(same_T.all()) else int((~same_T).float().argmax())


def report(errors: dict[str, float], parts: Sequence[Divergence], greedy: Sequence[int]) -> str:
    """The comparison as a Markdown table."""
    kl_K = torch.stack([part.kl_K for part in parts]).mean(0)
    agreement_K = torch.stack([part.agreement_K for part in parts]).mean(0)
    lines = ["| | |", "|---|---|"]
    for stack in ("backbone", "depth_decoder", "projection", "codebook0_head", "depth_heads"):
        of_stack = [error for name, error in errors.items() if name.startswith(stack)]
        lines.append(f"| weight error, {stack} | {100 * sum(of_stack) / len(of_stack):.2f} % |")
    for name, which in (("codebook 0", slice(0, 1)), ("codebooks 1 on", slice(1, None))):
        lines.append(f"| KL divergence, {name} | {kl_K[which].mean():.4f} nats |")
        lines.append(f"| same best code, {name} | {100 * agreement_K[which].mean():.1f} % |")
    lines.append(f"| frames until greedy codes differ | {', '.join(map(str, greedy))} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    parser.add_argument("a", help="hub name, folder, GGUF file, or tiny")
    parser.add_argument("b", nargs="?", help="another model, or a folder of csm quantize (default: A)")
    parser.add_argument("--scheme", help="quantise B: int8, fp8, int4-depth, int4, or types by part")
    add_tokenizer_option(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def tokenizer_of(args: argparse.Namespace, name: str) -> Path | None:
    """``--tokenizer`` for a GGUF file; the other model may be something else."""
    return args.tokenizer if name.endswith(".gguf") else None


def load(args: argparse.Namespace, name: str, scheme: str | None = None) -> Generator:
    """One of the models, on the CPU."""
    if args.tokenizer is not None and not any(each.endswith(".gguf") for each in (args.a, args.b or args.a)):
        raise CSMError("--tokenizer is that of a GGUF file, and neither model is one")
    return Generator.from_pretrained(
        name,
        "cpu",
        getattr(torch, args.dtype),
        progress=not args.quiet,
        quantize=scheme,
        tokenizer=tokenizer_of(args, name),
    )


def run(args: argparse.Namespace) -> str:
    """Compare the models; return the table."""
    a, b = load(args, args.a), load(args, args.b or args.a, args.scheme)
    if a.config != b.config:
        raise CSMError(f"{args.a} and {args.b} are models of different shapes")
    checkpoint = open_checkpoint(args.a, tokenizer=tokenizer_of(args, args.a))
    tokenizer = TextTokenizer(checkpoint.tokenizer_path, a.config.text_vocab_size)
    bar = tqdm(SENTENCES, desc="comparing", disable=args.quiet, leave=False)
    parts = [compare_sentence(a, b, tokenizer, text, seed) for seed, text in enumerate(bar)]
    greedy = [greedy_agreement(a, b, text) for text in SENTENCES]
    return report(weight_errors(a.model, b.model), parts, greedy)
