"""From training to a checkpoint in HF's layout: config.json, tokenizer.json, model.safetensors.

- ``python -m csm.weights.recipe.export codec RUN/checkpoint.pt codec.safetensors``: a trained codec alone, in moshi's
  names and float16.
- ``python -m csm.weights.recipe.export start codec.safetensors FOLDER``: a checkpoint of that codec and a model without
  training, from which ``python -m csm finetune --config FOLDER/config.json --model FOLDER`` starts.
- ``python -m csm.weights.recipe.export model RUN/model FOLDER``: what came of that as it is shipped, the model in
  bfloat16 and the codec in float16; ``--codec codec.safetensors`` takes that one, whose decoder learned more since.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from csm.config import CodecConfig, CSMConfig
from csm.finetune.initial import initial_state
from csm.weights import open_checkpoint, read_codec, read_model
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import export, hf_table, mimi_table
from csm.weights.recipe.codec import fold_layer_scales
from csm.weights.recipe.shape import CODEC, MODEL, byte_tokenizer

CPU = torch.device("cpu")


def export_codec(trained: Path, file: Path) -> None:
    """The codec of a checkpoint of ``csm.weights.recipe.codec``, its codebooks as they are used, not as running sums.

    A sum and its count, each rounded, would give a less exact quotient than the rounded quotient over a count of one.
    Layer scales are folded before the rounding: who goes on with the codec folds again, and must not change its codes.
    """
    state = fold_layer_scales(torch.load(trained, weights_only=True)["mimi"])
    for name in [name for name in state if name.endswith("embedding_sum")]:
        usage = name.replace("embedding_sum", "cluster_usage")
        state[name] = state[name] / state[usage].clamp(min=1e-5)[:, None]
        state[usage] = torch.ones_like(state[usage])
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(torch.float16).contiguous() for name, tensor in state.items()}, file)


def export_start(codec: Path, folder: Path, seed: int = 0) -> None:
    """A checkpoint of a codec that ``export_codec`` wrote, and a model's random weights."""
    state = {name: tensor.float() for name, tensor in load_file(codec).items()}
    _write(folder, MODEL, initial_state(MODEL, seed), CODEC, state)


def export_model(source: Path, folder: Path, codec: Path | None = None) -> None:
    """A checkpoint in the precision that it is shipped in, with its own codec or one that ``export_codec`` wrote."""
    checkpoint = open_checkpoint(source)
    model, codec_state = read_model(checkpoint, CPU, torch.bfloat16), read_codec(checkpoint, codec, CPU)
    _write(folder, checkpoint.config, model, checkpoint.codec_config, codec_state)


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
    byte_tokenizer().save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("codec", "start", "model"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--codec", type=Path, help="of a model: a codec in the place of its own")
    args = parser.parse_args()
    if args.what == "codec":
        export_codec(args.source, args.target)
    elif args.what == "start":
        export_start(args.source, args.target)
    else:
        export_model(args.source, args.target, args.codec)


if __name__ == "__main__":
    main()
