"""Export of a trained model: a folder with weights, codec and tokenizer that ``Generator`` and HF Transformers load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from csm.errors import CheckpointError
from csm.model import CSM
from csm.weights import Checkpoint, read_codec
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import export, hf_table, mimi_table, target_shapes

SHARD_BYTES = 4 << 30
COPIED = (
    "tokenizer.json",
    "pronunciation.json.gz",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
TOKEN_KEYS = ("audio_token_id", "audio_eos_token_id", "bos_token_id", "eos_token_id", "pad_token_id")


def save_model(
    model: CSM, folder: Path, source: Checkpoint, codec: Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write ``model`` in HF's layout, in ``dtype`` (None keeps the model's), with codec and tokenizer of ``source``.

    ``codec`` is a file of Mimi weights that replace the source's. Raises CheckpointError where a tensor is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {name: tensor.to("cpu", dtype) for name, tensor in export(state, hf_table(model.config))}
    tensors |= codec_tensors(source, codec)
    _write_shards(tensors, folder)
    for name in COPIED:
        path = source.config_folder / name
        if path.is_file() and path.resolve() != (folder / name).resolve():
            shutil.copyfile(path, folder / name)
    values = write_hf_config(model.config, source.codec_config)
    values |= _token_ids(source.config_folder / "config.json")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def codec_tensors(source: Checkpoint, codec: Path | None) -> dict[str, Tensor]:
    """The weights of the codec of ``source``, or of the file ``codec``, under HF's names."""
    table = mimi_table(source.codec_config)
    state = read_codec(source, codec, torch.device("cpu"))
    for name, shape in target_shapes(table).items():
        if name not in state or tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"{codec or source.folder}: missing codec tensor {name} of shape {shape}; give another --codec"
            )
    return dict(export(state, table))


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write one file, or several with an index above SHARD_BYTES. Each file is written atomically."""
    shards: list[dict[str, Tensor]] = [{}]
    available = SHARD_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and size > available:
            shards.append({})
            available = SHARD_BYTES
        shards[-1][name] = tensor
        available -= size
    index = "model.safetensors.index.json"
    for stale in (*folder.glob("model*.safetensors"), folder / index):
        stale.unlink(missing_ok=True)
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / f"{name}.part", metadata={"format": "pt"})
        os.replace(folder / f"{name}.part", folder / name)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def _token_ids(config: Path) -> dict[str, int]:
    """Token ids that HF's processor reads from config.json and this package does not use."""
    values = json.loads(config.read_text(encoding="utf-8"))
    return {key: values[key] for key in TOKEN_KEYS if isinstance(values.get(key), int)}
