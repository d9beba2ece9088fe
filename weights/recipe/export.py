"""From training to a checkpoint in HF's layout: config.json, tokenizer.json, model.safetensors.

- ``python -m csm.weights.recipe.export codec RUN FOLDER``: a trained codec and a model without training, from which
  ``python -m csm finetune --config FOLDER/config.json --model FOLDER`` starts.
- ``python -m csm.weights.recipe.export model RUN/model FOLDER``: what came of that as it is shipped, the model in
  bfloat16 and the codec in float16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from csm.config import CodecConfig, CSMConfig
from csm.finetune.initial import initial_state
from csm.weights import open_checkpoint, read_codec, read_model
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import export, hf_table, mimi_table
from csm.weights.recipe.shape import CODEC, MODEL, byte_tokenizer

CPU = torch.device("cpu")


def finished_codec(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A training state with its codebooks as they are used rather than as running sums.

    A sum and its count, each rounded, would give a less exact quotient than the rounded quotient over a count of one.
    """
    state = dict(state)
    for name in [name for name in state if name.endswith("embedding_sum")]:
        usage = name.replace("embedding_sum", "cluster_usage")
        state[name] = state[name] / state[usage].clamp(min=1e-5)[:, None]
        state[usage] = torch.ones_like(state[usage])
    return state


def export_codec(run: Path, folder: Path, seed: int = 0) -> None:
    """The codec of a run of ``csm.weights.recipe.codec`` and a model's random weights."""
    trained = torch.load(run / "checkpoint.pt", weights_only=True)
    _write(folder, MODEL, initial_state(MODEL, seed), CODEC, finished_codec(trained["mimi"]))


def export_model(source: Path, folder: Path) -> None:
    """A checkpoint in the precision that it is shipped in."""
    checkpoint = open_checkpoint(source)
    model, codec = read_model(checkpoint, CPU, torch.bfloat16), read_codec(checkpoint, None, CPU)
    _write(folder, checkpoint.config, model, checkpoint.codec_config, codec)


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
    parser.add_argument("what", choices=("codec", "model"))
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "codec":
        export_codec(arguments.source, arguments.folder)
    else:
        export_model(arguments.source, arguments.folder)


if __name__ == "__main__":
    main()
