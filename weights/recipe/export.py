"""Write a trained codec: ``python -m csm.weights.recipe.export RUN FOLDER --codebooks 12``.

Makes ``FOLDER/codec.safetensors`` in moshi's names and float16, and ``FOLDER/codec.json``: its shapes and its training.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from csm.config import CodecConfig
from csm.weights.recipe.shape import CODEC


def finished_state(state: dict[str, Tensor], config: CodecConfig) -> dict[str, Tensor]:
    """A training state in float16, with ``config``'s codebooks as they are used rather than as running sums.

    A sum and its count, each rounded, would give a less exact quotient than the rounded quotient over a count of one.
    """
    state = dict(state)
    for name in [name for name in state if name.endswith("embedding_sum")]:
        usage = name.replace("embedding_sum", "cluster_usage")
        state[name] = state[name] / state[usage].clamp(min=1e-5)[:, None]
        state[usage] = torch.ones_like(state[usage])
    used = {name: tensor for name, tensor in state.items() if _codebook_of(name) < config.num_codebooks}
    return {name: tensor.to(torch.float16).contiguous() for name, tensor in used.items()}


def _codebook_of(name: str) -> int:
    """Which codebook a tensor belongs to; 0 for what they share."""
    match = re.match(r"quantizer\.rvq_rest\.vq\.layers\.(\d+)\.", name)
    return int(match[1]) + 1 if match else 0


def export_codec(checkpoint: Path, folder: Path, num_codebooks: int) -> None:
    """Write a run's ``checkpoint.pt`` as a codec of the first ``num_codebooks`` codebooks."""
    trained = torch.load(checkpoint, weights_only=True)
    config = replace(CODEC, num_codebooks=num_codebooks)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(finished_state(trained["mimi"], config), folder / "codec.safetensors", metadata={"format": "pt"})
    values = {
        "config": asdict(config),
        "training": {"steps": trained["step"], "minutes": round(trained["seconds"] / 60, 1)},
    }
    (folder / "codec.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--codebooks", type=int, default=CODEC.num_codebooks)
    arguments = parser.parse_args()
    export_codec(arguments.run / "checkpoint.pt", arguments.folder, arguments.codebooks)


if __name__ == "__main__":
    main()
