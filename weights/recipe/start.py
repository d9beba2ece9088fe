"""Put a model without training beside a trained codec: ``python -m csm.weights.recipe.start CODEC FOLDER``.

FOLDER is then a checkpoint in HF's layout: tokenizer, codec, and random weights for ``python -m csm finetune --config
FOLDER/config.json --model FOLDER`` to start from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file

from csm.finetune.initial import initial_state
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import export, hf_table, mimi_table
from csm.weights.recipe.shape import MODEL, byte_tokenizer, load_codec


def write_start(codec: Path, folder: Path, seed: int = 0) -> None:
    """The folder, of the codec that ``export`` wrote."""
    config, codec_state = load_codec(codec)
    if (config.num_codebooks, config.codebook_size) != (MODEL.num_codebooks, MODEL.codebook_size):
        raise ValueError(f"{codec}: {config.num_codebooks} codebooks of {config.codebook_size} do not fit the model")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(export(initial_state(MODEL, seed), hf_table(MODEL)))
    tensors |= dict(export(codec_state, mimi_table(config)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = write_hf_config(MODEL, config)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    byte_tokenizer().save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_start(arguments.codec, arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
