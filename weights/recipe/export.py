"""Export training results as checkpoints in HF's layout.

- ``python -m csm.weights.recipe.export codec RUN/checkpoint.pt codec.safetensors``: a trained codec alone, with moshi's
  names, in float16.
- ``python -m csm.weights.recipe.export start codec.safetensors FOLDER --pronunciation FILE``: a checkpoint of that
  codec and an untrained model, for ``python -m csm finetune --config FOLDER/config.json --model FOLDER``.
  ``--weights CHECKPOINT`` takes the model's weights from a checkpoint with byte tokens instead.
- ``python -m csm.weights.recipe.export model RUN/model FOLDER``: a trained model as it is shipped, in bfloat16 with the
  codec in float16. ``--codec codec.safetensors`` replaces the codec.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from csm.config import CodecConfig, CSMConfig
from csm.finetune.initial import initial_state
from csm.pronounce import PRONUNCIATION_FILE
from csm.weights import open_checkpoint, read_codec, read_model
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import export, hf_table, mimi_table
from csm.weights.recipe.codec import fold_layer_scales
from csm.weights.recipe.shape import CODEC, MODEL, SPECIAL_TOKENS, byte_tokenizer, phone_tokenizer

CPU = torch.device("cpu")
TEXT_FILES = ("tokenizer.json", PRONUNCIATION_FILE)
GENERATION = {"do_sample": True, "temperature": 0.4, "top_k": 50}  # the checkpoint's defaults


def export_codec(trained: Path, file: Path) -> None:
    """Write the codec of a checkpoint of ``csm.weights.recipe.codec``, with codebooks instead of their running sums.

    Rounding a codebook is more exact than rounding its sum and its count. Layer scales are folded before rounding, so
    that ``start_from``, which folds them again, does not change the codes.
    """
    state = fold_layer_scales(torch.load(trained, weights_only=True, map_location=CPU)["mimi"])
    for name in [name for name in state if name.endswith("embedding_sum")]:
        usage = name.replace("embedding_sum", "cluster_usage")
        state[name] = state[name] / state[usage].clamp(min=1e-5)[:, None]
        state[usage] = torch.ones_like(state[usage])
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(torch.float16).contiguous() for name, tensor in state.items()}, file)


def export_start(codec: Path, folder: Path, pronunciation: Path, weights: Path | None = None, seed: int = 0) -> None:
    """A checkpoint to start training from: a codec that ``export_codec`` wrote, and random weights for the model.

    ``weights`` is a checkpoint of the same shape to take the weights from instead. Only its text embedding is
    replaced: each phone starts as the mean of the bytes that spell it, if the checkpoint's tokens were bytes.
    """
    model = initial_state(MODEL, seed)
    if weights is not None:
        before = read_model(open_checkpoint(weights), CPU, torch.float32)
        model = before | {"text_embedding": phone_embedding(before["text_embedding"])}
    state = {name: tensor.float() for name, tensor in load_file(codec).items()}
    _write(folder, MODEL, model, CODEC, state)
    phone_tokenizer().save(str(folder / "tokenizer.json"))
    shutil.copyfile(pronunciation, folder / PRONUNCIATION_FILE)


# Bytes that spell each phone, where it is not its own letter.
SPELT = dict(
    pair.split(":")
    for pair in """
    ɑ:o æ:a ʌ:u ɔ:o W:ou ə:a I:i ʧ:ch ð:th ɛ:e ɜ:er A:a ɪ:i i:ee ʤ:j ŋ:ng O:o Y:oy ʃ:sh θ:th ʊ:oo u:oo j:y ʒ:s
    """.split()
)


def phone_embedding(byte_embedding: Tensor) -> Tensor:
    """The phone tokenizer's text embedding, (tokens, dim), from that of the byte tokenizer."""
    before, after = byte_tokenizer(), phone_tokenizer()
    rows = []
    for index in range(after.get_vocab_size()):
        token = after.id_to_token(index)
        same = before.token_to_id(token) if token in SPECIAL_TOKENS else None
        ids = before.encode(SPELT.get(token, token)).ids if same is None else [same]
        rows.append(byte_embedding[ids].mean(dim=0))
    return torch.stack(rows)


def export_model(source: Path, folder: Path, codec: Path | None = None) -> None:
    """Write a checkpoint in the precision of shipped weights, with its own codec or one from ``export_codec``."""
    checkpoint = open_checkpoint(source)
    model, codec_state = read_model(checkpoint, CPU, torch.bfloat16), read_codec(checkpoint, codec, CPU)
    _write(folder, checkpoint.config, model, checkpoint.codec_config, codec_state)
    for name in TEXT_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)


def _write(
    folder: Path, config: CSMConfig, model: dict[str, Tensor], codec_config: CodecConfig, codec: dict[str, Tensor]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(export(model, hf_table(config)))
    codec = {name: tensor.to(torch.float16) for name, tensor in codec.items()}
    tensors |= dict(export(codec, mimi_table(codec_config)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = write_hf_config(config, codec_config)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("codec", "start", "model"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--codec", type=Path, help="model: a codec file to use instead of the checkpoint's own")
    parser.add_argument(
        "--pronunciation", type=Path, help="start: the text stage's file (csm.weights.recipe.pronunciation)"
    )
    parser.add_argument("--weights", type=Path, help="start: a checkpoint to take the model's weights from")
    args = parser.parse_args()
    if args.what == "codec":
        export_codec(args.source, args.target)
    elif args.what == "start":
        if args.pronunciation is None:
            parser.error("start needs --pronunciation FILE")
        export_start(args.source, args.target, args.pronunciation, args.weights)
    else:
        export_model(args.source, args.target, args.codec)


if __name__ == "__main__":
    main()
