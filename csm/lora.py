"""Low-rank adapters (https://arxiv.org/abs/2106.09685): W + (alpha / rank) B A beside the linear layers of a model.

The layers' own weights are fused; an adapter is not: q, k, v, gate and up have one each, which covers its rows of the
fused weight. Merged, an adapter costs nothing at generation. Its file holds its tensors alone, beside a JSON of what it
was made for.

Shapes: R rank, I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from csm.config import CSMConfig, TransformerConfig
from csm.errors import CheckpointError
from csm.model import CSM

PARTS = ("backbone", "depth_decoder")
TARGETS = ("q", "k", "v", "output", "gate", "up", "down")
WEIGHTS_FILE, CONFIG_FILE = "adapter.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LoraConfig:
    """Which linear layers of which transformers have an adapter, and of what rank."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise CheckpointError(f"the rank of an adapter must be at least 1, not {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise CheckpointError(f"alpha must be a positive number, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise CheckpointError(f"the dropout of an adapter must be within 0 and 1, not {self.dropout}")
        for kind, names, known in (("targets", self.targets, TARGETS), ("parts", self.parts, PARTS)):
            if not names or set(names) - set(known):
                raise CheckpointError(f"{kind} of an adapter must be among {', '.join(known)}, not {list(names)}")


class Layer(NamedTuple):
    """An adapted linear layer: rows ``first`` to ``first + rows`` of the fused ``weight``, under its own ``name``."""

    name: str
    weight: str
    first: int
    rows: int
    columns: int


def adapted_layers(config: CSMConfig, lora: LoraConfig) -> list[Layer]:
    """The linear layers that ``lora`` adapts in a model of this shape."""
    layers: list[Layer] = []
    for part in (part for part in PARTS if part in lora.parts):
        transformer: TransformerConfig = getattr(config, part)
        for index in range(transformer.num_layers):
            layers += _block(f"{part}.layers.{index}", transformer)
    return [layer for layer in layers if layer.name.rsplit(".", 1)[1] in lora.targets]


def _block(block: str, config: TransformerConfig) -> list[Layer]:
    attention, mlp, dim, hidden = f"{block}.attention", f"{block}.mlp", config.dim, config.hidden_dim
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return [
        Layer(f"{attention}.q", f"{attention}.qkv", 0, q_rows, dim),
        Layer(f"{attention}.k", f"{attention}.qkv", q_rows, kv_rows, dim),
        Layer(f"{attention}.v", f"{attention}.qkv", q_rows + kv_rows, kv_rows, dim),
        Layer(f"{attention}.output", f"{attention}.output", 0, dim, q_rows),
        Layer(f"{mlp}.gate", f"{mlp}.gate_up", 0, hidden, dim),
        Layer(f"{mlp}.up", f"{mlp}.gate_up", hidden, hidden, dim),
        Layer(f"{mlp}.down", f"{mlp}.down", 0, dim, hidden),
    ]


class Lora(nn.Module):
    """The adapters of a model: A of each is random and B zero, so that at first they add nothing.

    ``a`` holds A (R, I) and ``b`` B (O, R) of each layer by name, dots written as slashes (a module's name has none).
    """

    def __init__(self, config: CSMConfig, lora: LoraConfig, device: torch.device | None = None, seed: int = 0):
        super().__init__()
        self.config = lora
        self.scale = lora.alpha / lora.rank
        self.layers = adapted_layers(config, lora)
        self.of_weight: dict[str, list[Layer]] = {}
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for layer in self.layers:
            self.of_weight.setdefault(layer.weight, []).append(layer)
            a_RI = torch.randn(lora.rank, layer.columns, generator=generator) / math.sqrt(layer.columns)
            self.a[_key(layer)] = nn.Parameter(a_RI.to(device or "cpu"))
            self.b[_key(layer)] = nn.Parameter(torch.zeros(layer.rows, lora.rank, device=device or "cpu"))

    def added(self, weight: str, x: Tensor, num_rows: int) -> Tensor | None:
        """What the adapters add to ``x @ weight.T``, (..., num_rows); None where they adapt none of its rows."""
        layers = self.of_weight.get(weight)
        if layers is None:
            return None
        parts, at = [], 0
        for layer in layers:
            dropped = F.dropout(x, self.config.dropout, self.training)
            if layer.first > at:
                parts.append(x.new_zeros(*x.shape[:-1], layer.first - at))
            parts.append(F.linear(F.linear(dropped, self.a[_key(layer)]), self.b[_key(layer)] * self.scale))
            at = layer.first + layer.rows
        if at < num_rows:
            parts.append(x.new_zeros(*x.shape[:-1], num_rows - at))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def merge(self, model: CSM) -> None:
        """Add the adapters to the weights of ``model``, in place, and update the depth embedding."""
        weights = dict(model.named_parameters())
        for layer in self.layers:
            rows = weights[layer.weight][layer.first : layer.first + layer.rows]
            a_RI, b_OR = self.a[_key(layer)], self.b[_key(layer)]
            rows.copy_(rows.to(a_RI.dtype) + self.scale * (b_OR @ a_RI).to(rows.device))
        model.precompute_depth_embedding()

    @contextmanager
    def merged(self, model: CSM) -> Iterator[None]:
        """Merged for the time; what was there before is then put back, to the last bit."""
        weights = dict(model.named_parameters())
        before = {name: weights[name].detach().clone() for name in self.of_weight}
        self.merge(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    weights[name].copy_(weight)
            model.precompute_depth_embedding()

    def tensors(self) -> dict[str, Tensor]:
        """A and B of each layer, under the names that a file has."""
        named = {}
        for layer in self.layers:
            named[f"{layer.name}.A"], named[f"{layer.name}.B"] = self.a[_key(layer)], self.b[_key(layer)]
        return named


def _key(layer: Layer) -> str:
    return layer.name.replace(".", "/")


def save_adapter(lora: Lora, folder: Path, tensors: Mapping[str, Tensor] | None = None, base: str = "") -> None:
    """Write the adapter alone: its tensors in float32 (``tensors``: others of the same names) and its configuration.

    ``base`` names the model that it was trained on, for the reader.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {name: tensor.detach().float().cpu().contiguous() for name, tensor in (tensors or lora.tensors()).items()}
    save_file(named, folder / f"{WEIGHTS_FILE}.part", metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS_FILE}.part", folder / WEIGHTS_FILE)
    values = {"adapter": "csm-lora", "base_model": base, **asdict(lora.config)}
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: str | Path, config: CSMConfig) -> Lora:
    """An adapter for a model of this shape. Raises CheckpointError, naming the file and the tensor that do not fit."""
    folder = Path(folder).expanduser()
    lora = Lora(config, _read_config(folder / CONFIG_FILE))
    path = folder / WEIGHTS_FILE
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not an adapter that can be read: {error}") from error
    expected = lora.tensors()
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(f"{path}: tensor {name} is missing; was the adapter made for a smaller model?")
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}; the model asks for {tuple(tensor.shape)}"
            raise CheckpointError(f"{path}: tensor {name} has shape {shapes}: made for a model of another shape")
        if not found[name].is_floating_point() or not torch.isfinite(found[name]).all():
            raise CheckpointError(f"{path}: tensor {name} has values that are no finite floats")
    for name in found.keys() - expected.keys():
        raise CheckpointError(f"{path}: tensor {name} is left over: no part of this model has such an adapter")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])
    return lora.requires_grad_(False).eval()


def _read_config(path: Path) -> LoraConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("adapter") != "csm-lora":
            raise CheckpointError(f"{path}: not the configuration of an adapter of this package")
        names = {kind: _strings(values[kind]) for kind in ("targets", "parts")}
        return LoraConfig(int(values["rank"]), float(values["alpha"]), float(values["dropout"]), **names)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not an adapter's configuration that can be read: {error!r}") from error


def _strings(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)
