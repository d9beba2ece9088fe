"""Generate codes along recordings: ``python -m csm.weights.recipe.drawn train.jsonl MODEL OUT.npz``.

A decoder trained on the encoder's codes alone reconstructs a model's codes worse: generated frames fit each other less
well than recorded ones. ``csm.weights.recipe.codec --decoder-only OUT.npz`` therefore trains it on both, as Tacotron 2
trains its vocoder on predicted spectrograms (https://arxiv.org/abs/1712.05884, section 3.1). Codebook 0, the phones, is
the recording's. The other codebooks are sampled given it and the recording's earlier frames.

Shapes: K codebooks, T frames of a recording, F frames of all of them; others as in ``csm.finetune.batches``.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from csm.finetune.batches import Example, Turn, collate
from csm.finetune.codes import CodecSource, CodeStore, encode_missing
from csm.finetune.loss import Trainee
from csm.finetune.manifest import Clip, read_manifest
from csm.model import CSM
from csm.prompt import TextTokenizer
from csm.weights import Checkpoint, open_checkpoint, read_model

AT_ONCE = 16


def draw(logits_NV: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One sampled id for each row, (N,) int64, from the ``top_k`` most likely ones."""
    best_NJ, id_NJ = (logits_NV / temperature).topk(top_k, dim=-1)
    place_N1 = torch.multinomial(best_NJ.softmax(-1), 1, generator=generator)
    return id_NJ.gather(-1, place_N1)[:, 0]


@torch.no_grad()
def draw_codes(
    trainee: Trainee, turns: Sequence[Turn], temperature: float, top_k: int, generator: torch.Generator
) -> list[Tensor]:
    """Codes (T, K) of each turn: codebook 0 is its own, the others are sampled given the earlier ones in the frame."""
    batch = collate([Example((turn,)) for turn in turns], [""] * len(turns), depth_share=1.0).to(trainee.model.device)
    h_ND = trainee.predicting_states(batch)
    code_NK = batch.code_AK[batch.target_N]
    for codebook in range(1, code_NK.shape[1]):
        logits_NV = trainee.depth_logits(h_ND, code_NK)[codebook - 1, :, : trainee.model.config.codebook_size]
        code_NK[:, codebook] = draw(logits_NV, temperature, top_k, generator)
    frames = [len(turn.codes_TK) + 1 for turn in turns]  # with the frame of zeros that ends a turn
    return [codes[:-1] for codes in code_NK.cpu().split(frames)]


def draw_recordings(
    checkpoint: Checkpoint, clips: Sequence[Clip], codes: Sequence[Tensor], args: argparse.Namespace
) -> Tensor:
    """Recorded and sampled codes of recordings, (2, F, K) int16."""
    tokenizer = TextTokenizer(checkpoint.tokenizer_path, checkpoint.config.text_vocab_size)
    texts = [tokenizer.encode(clip.speaker, clip.text) for clip in clips]
    turns = [Turn(text, codes_TK) for text, codes_TK in zip(texts, codes, strict=True)]
    device = torch.device(args.device)
    model = CSM.from_state_dict(checkpoint.config, read_model(checkpoint, device, torch.float32), device)
    trainee, generator = Trainee(model).eval(), torch.Generator(device).manual_seed(args.seed)
    drawn: dict[int, Tensor] = {}
    # Batches of similar length have little padding and few different shapes.
    order = sorted(range(len(turns)), key=lambda index: turns[index].num_positions)
    for first in tqdm(range(0, len(order), AT_ONCE), desc="drawing", mininterval=5):
        which = order[first : first + AT_ONCE]
        some = draw_codes(trainee, [turns[index] for index in which], args.temperature, args.top_k, generator)
        drawn |= dict(zip(which, some, strict=True))
    both = torch.cat(list(codes)), torch.cat([drawn[index] for index in range(len(turns))])
    return torch.stack([codes_FK.to(torch.int16) for codes_FK in both])


def fingerprint(checkpoint: Checkpoint, args: argparse.Namespace) -> str:
    """A hash of everything that sampled codes depend on: weights, manifest, options."""
    digest = hashlib.sha256(repr((args.temperature, args.top_k, args.seed, args.device)).encode())
    for path in (args.manifest, *sorted(checkpoint.folder.glob("*.safetensors"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--codes", type=Path, help="folder of encoded recordings (default: codes, beside the manifest)")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    digest = fingerprint(checkpoint, args)
    if args.out.exists():
        with np.load(args.out) as file:
            if str(file["digest"]) == digest:
                print(f"{args.out}: up to date")
                return
    source = CodecSource(checkpoint, None, checkpoint.config.num_codebooks)
    store = CodeStore(args.codes or args.manifest.parent / "codes", source)
    clips = read_manifest(args.manifest).clips
    encode_missing(store, clips, 1, progress=True)
    codes = store.read(clips)
    codes_2FK = draw_recordings(checkpoint, clips, codes, args)
    part = args.out.with_suffix(".part.npz")
    np.savez(part, codes=codes_2FK.numpy(), ends=np.cumsum([len(codes_TK) for codes_TK in codes]), digest=digest)
    part.replace(args.out)


if __name__ == "__main__":
    main()
