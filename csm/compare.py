"""``python -m csm compare A B``: how far a quantised (or otherwise changed) model is from the one it was made of.

A generates sentences; both models then read A's codes (teacher forcing), and their logits are compared; so are their
logits on rows of random text and codes. Reported are the relative error of each layer's weights, the Kullback-Leibler
divergence of B's distributions from A's and the share of positions with the same best code, by codebook, and the number
of frames until the codes of both, generated greedily, differ. With ``--sentences`` both models also generate a file's
sentences, and a recogniser transcribes them.

Shapes: N rows of prompt and codes, T frames, K codebooks, V ids, D dim.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from csm.cache import KVCache
from csm.command_line import add_tokenizer_option
from csm.errors import CSMError
from csm.evaluate.command import read_lines
from csm.evaluate.measure import Evaluator, GenerationSettings, Sentence, evaluate_speech
from csm.evaluate.report import summary
from csm.evaluate.report import table as speech_table
from csm.generator import Generator
from csm.kernels.quantized import dense
from csm.kernels.row_file import gather
from csm.model import CSM
from csm.prompt import TextTokenizer, build_prompt, text_rows
from csm.quantize import quantized_weights
from csm.weights import open_checkpoint

SENTENCES = (
    "Good morning, how are you today?",
    "The quick brown fox jumps over the lazy dog.",
    "We will meet again tomorrow at nine.",
    "Please close the window before you leave.",
)
RANDOM_TEXT_ROWS, RANDOM_FRAMES = 16, 48


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
    code_embeddings = [gather(code_TK[:, k], model.code_embedding(k)) for k in range(K - 1)]
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
    row_NC, mask_NC = with_codes(prompt.row_TC, prompt.mask_TC, code_TK)
    logits = [teacher_forced_logits(g.model, row_NC.to(g.device), mask_NC.to(g.device), len(code_TK)) for g in (a, b)]
    return divergence(logits[0].cpu(), logits[1].cpu())


def compare_random(a: Generator, b: Generator) -> Divergence:
    """Both models on a prompt of random tokens and the random codes of RANDOM_FRAMES frames."""
    generator, config = torch.Generator().manual_seed(0), a.config
    ids = torch.randint(config.text_vocab_size, (RANDOM_TEXT_ROWS,), generator=generator)
    text_NC, text_mask_NC, _ = text_rows(ids.tolist(), config.num_codebooks)
    code_TK = torch.randint(config.codebook_size, (RANDOM_FRAMES, config.num_codebooks), generator=generator)
    row_NC, mask_NC = with_codes(text_NC, text_mask_NC, code_TK)
    logits = [teacher_forced_logits(g.model, row_NC.to(g.device), mask_NC.to(g.device), RANDOM_FRAMES) for g in (a, b)]
    return divergence(logits[0].cpu(), logits[1].cpu())


def with_codes(row_NC: Tensor, mask_NC: Tensor, code_TK: Tensor) -> tuple[Tensor, Tensor]:
    """A prompt's rows and mask, followed by those of codes."""
    code_mask_TC = F.pad(torch.ones_like(code_TK, dtype=torch.bool), (0, 1))
    return torch.cat((row_NC, F.pad(code_TK, (0, 1)))), torch.cat((mask_NC, code_mask_TC))


def greedy_agreement(a: Generator, b: Generator, text: str) -> int:
    """Frames until the codes that both generate at temperature 0 differ, of at most 4 s."""
    codes = [g.generate_codes(text, temperature=0, max_audio_length_ms=4000) for g in (a, b)]
    num_frames = min(len(code_TK) for code_TK in codes)
    same_T = (codes[0][:num_frames] == codes[1][:num_frames]).all(1)
    return num_frames if bool(same_T.all()) else int((~same_T).float().argmax())


def layer_errors(errors: Mapping[str, float]) -> dict[str, float]:
    """The mean error of each layer's weights, and those of the heads and the projection."""
    by_layer: dict[str, list[float]] = {}
    for name, error in errors.items():
        layer = ".".join(name.split(".")[:3]) if ".layers." in name else name
        by_layer.setdefault(layer, []).append(error)
    return {layer: sum(own) / len(own) for layer, own in by_layer.items()}


def report(errors: Mapping[str, float], speech: Sequence[Divergence], random: Divergence, greedy: Sequence[int]) -> str:
    """The comparison as a Markdown table."""
    lines = ["| | |", "|---|---|"]
    lines += [f"| weight error, {layer} | {100 * error:.2f} % |" for layer, error in layer_errors(errors).items()]
    for source, parts in (("speech", speech), ("random rows", [random])):
        kl_K = torch.stack([part.kl_K for part in parts]).mean(0)
        agreement_K = torch.stack([part.agreement_K for part in parts]).mean(0)
        for name, which in (("codebook 0", slice(0, 1)), ("codebooks 1 on", slice(1, None))):
            lines.append(f"| {source}: KL divergence, {name} | {kl_K[which].mean():.4f} nats |")
            lines.append(f"| {source}: same best code, {name} | {100 * agreement_K[which].mean():.1f} % |")
    lines.append(f"| frames until greedy codes differ | {', '.join(map(str, greedy))} |")
    return "\n".join(lines)


def transcribed(
    evaluator: Evaluator, a: Generator, b: Generator, sentences: Sequence[Sentence], seeds: int, progress: bool
) -> str:
    """Word error rate, seconds and share of ended utterances of both models on these sentences: a table."""
    settings = GenerationSettings(seeds=seeds)
    made = {
        name: evaluate_speech(evaluator, g, sentences, settings, progress=progress) for name, g in (("A", a), ("B", b))
    }
    seconds = {name: sum(one.seconds for one in utterances) for name, utterances in made.items()}
    ratio = seconds["B"] / seconds["A"] if seconds["A"] else math.nan
    summaries = {name: summary(utterances) for name, utterances in made.items()}
    return f"{speech_table(summaries)}\n\nB's audio is {ratio:.2f} times as long as A's."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    parser.add_argument("a", help="hub name, folder, GGUF file, or tiny")
    parser.add_argument("b", nargs="?", help="another model, or a folder of csm quantize (default: A)")
    parser.add_argument("--scheme", help="quantise B: int8, fp8, int4-depth, int4, or types by part")
    add_tokenizer_option(parser)
    parser.add_argument("--sentences", type=Path, help="a text file: generate its lines with both, and transcribe them")
    parser.add_argument("--seeds", type=int, default=1, help="generations of each of the --sentences (default: 1)")
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
    """Compare the models; return the tables."""
    if args.seeds < 1:
        raise CSMError(f"--seeds must be at least 1, not {args.seeds}")
    sentences = None if args.sentences is None else read_lines(args.sentences)
    evaluator = None if sentences is None else Evaluator()  # a missing package is an error before the models are loaded
    a, b = load(args, args.a), load(args, args.b or args.a, args.scheme)
    if a.config != b.config:
        raise CSMError(f"{args.a} and {args.b} are models of different shapes")
    checkpoint = open_checkpoint(args.a, tokenizer=tokenizer_of(args, args.a))
    tokenizer = TextTokenizer(checkpoint.tokenizer_path, a.config.text_vocab_size)
    bar = tqdm(SENTENCES, desc="comparing", disable=args.quiet, leave=False)
    parts = [compare_sentence(a, b, tokenizer, text, seed) for seed, text in enumerate(bar)]
    greedy = [greedy_agreement(a, b, text) for text in SENTENCES]
    text = report(weight_errors(a.model, b.model), parts, compare_random(a, b), greedy)
    if evaluator is None or sentences is None:
        return text
    return f"{text}\n\n{transcribed(evaluator, a, b, sentences, args.seeds, not args.quiet)}"
