"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): W + (alpha / rank) B A for linear layers of a model.

The model's weights are fused (qkv, gate_up), the adapters are not: q, k, v, gate and up have one each, which applies to
its rows of the fused weight. Merging adapters into the weights removes their cost at generation. An adapter's folder
holds its tensors (safetensors) and its configuration (JSON).

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
    """The adapters' rank, scale (alpha / rank) and dropout, and the layers and transformers that have one."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise CheckpointError(f"the adapter's rank must be at least 1, not {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise CheckpointError(f"the adapter's alpha must be finite and positive, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise CheckpointError(f"the adapter's dropout must be at least 0 and below 1, not {self.dropout}")
        for kind, names, known in (("targets", self.targets, TARGETS), ("parts", self.parts, PARTS)):
            if not names or set(names) - set(known):
                raise CheckpointError(f"the adapter's {kind} must be among {', '.join(known)}, not {list(names)}")


class Layer(NamedTuple):
    """An adapted linear layer: ``num_rows`` rows of the fused ``weight`` from ``first_row`` on."""

    name: str
    weight: str
    first_row: int
    num_rows: int
    num_columns: int


def adapted_layers(config: CSMConfig, lora: LoraConfig) -> list[Layer]:
    """The linear layers that ``lora`` adapts in a model of this configuration."""
    layers: list[Layer] = []
    for part in (part for part in PARTS if part in lora.parts):
        transformer: TransformerConfig = getattr(config, part)
        for index in range(transformer.num_layers):
            layers += _block_layers(f"{part}.layers.{index}", transformer)
    return [layer for layer in layers if layer.name.rsplit(".", 1)[1] in lora.targets]


def _block_layers(block: str, config: TransformerConfig) -> list[Layer]:
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
    """The adapters of a model. A is initialised randomly and B with zeros, so a new adapter changes nothing.

    ``a`` and ``b`` hold A (R, I) and B (O, R) of each layer by name. Dots in names are replaced by slashes, because
    module names must not contain dots.
    """

    def __init__(self, config: CSMConfig, lora: LoraConfig, device: torch.device | None = None, seed: int = 0):
        super().__init__()
        self.config = lora
        self.scale = lora.alpha / lora.rank
        self.layers = adapted_layers(config, lora)
        self.layers_of_weight: dict[str, list[Layer]] = {}
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for layer in self.layers:
            self.layers_of_weight.setdefault(layer.weight, []).append(layer)
            a_RI = torch.randn(lora.rank, layer.num_columns, generator=generator) / math.sqrt(layer.num_columns)
            self.a[_key(layer)] = nn.Parameter(a_RI.to(device or "cpu"))
            self.b[_key(layer)] = nn.Parameter(torch.zeros(layer.num_rows, lora.rank, device=device or "cpu"))

    def delta(self, weight: str, x: Tensor, num_rows: int) -> Tensor | None:
        """The adapters' contribution to ``x @ weight.T``, (..., num_rows); None where ``weight`` has no adapter."""
        layers = self.layers_of_weight.get(weight)
        if layers is None:
            return None
        parts, row = [], 0
        for layer in layers:
            dropped = F.dropout(x, self.config.dropout, self.training)
            if layer.first_row > row:
                parts.append(x.new_zeros(*x.shape[:-1], layer.first_row - row))
            parts.append(F.linear(F.linear(dropped, self.a[_key(layer)]), self.b[_key(layer)] * self.scale))
            row = layer.first_row + layer.num_rows
        if row < num_rows:
            parts.append(x.new_zeros(*x.shape[:-1], num_rows - row))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def merge(self, model: CSM) -> None:
        """Add the adapters to the weights of ``model`` in place and update the depth embedding."""
        weights = dict(model.named_parameters())
        for layer in self.layers:
            rows = weights[layer.weight][layer.first_row : layer.first_row + layer.num_rows]
            a_RI, b_OR = self.a[_key(layer)], self.b[_key(layer)]
            rows.copy_(rows.to(a_RI.dtype) + self.scale * (b_OR @ a_RI).to(rows.device))
        model.precompute_depth_embedding()

    @contextmanager
    def merged(self, model: CSM) -> Iterator[None]:
        """Merge the adapters within the context; then restore the exact weights."""
        weights = dict(model.named_parameters())
        original = {name: weights[name].detach().clone() for name in self.layers_of_weight}
        self.merge(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in original.items():
                    weights[name].copy_(weight)
            model.precompute_depth_embedding()

    def tensors(self) -> dict[str, Tensor]:
        """A and B of each layer, by their names in the adapter's file."""
        named = {}
        for layer in self.layers:
            named[f"{layer.name}.A"], named[f"{layer.name}.B"] = self.a[_key(layer)], self.b[_key(layer)]
        return named


def _key(layer: Layer) -> str:
    return layer.name.replace(".", "/")


def save_adapter(lora: Lora, folder: Path, tensors: Mapping[str, Tensor] | None = None, base: str = "") -> None:
    """Write the adapter's tensors, in float32, and its configuration.

    ``tensors`` replaces the tensors' values. ``base`` is the name of the base model; it is recorded for information.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {name: tensor.detach().float().cpu().contiguous() for name, tensor in (tensors or lora.tensors()).items()}
    save_file(named, folder / f"{WEIGHTS_FILE}.part", metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS_FILE}.part", folder / WEIGHTS_FILE)
    values = {"adapter": "csm-lora", "base_model": base, **asdict(lora.config)}
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: str | Path, config: CSMConfig) -> Lora:
    """Load an adapter for a model of this configuration. Raises CheckpointError, naming the file and the tensor."""
    folder = Path(folder).expanduser()
    lora = Lora(config, _read_config(folder / CONFIG_FILE))
    path = folder / WEIGHTS_FILE
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot read the adapter's weights ({error}); check the adapter's folder"
        ) from error
    expected = lora.tensors()
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(f"{path}: missing tensor {name}; give the model that the adapter was trained on")
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}, the model needs {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{path}: tensor {name} has shape {shapes}; give the model that the adapter was trained on"
            )
        if not found[name].is_floating_point() or not torch.isfinite(found[name]).all():
            raise CheckpointError(
                f"{path}: tensor {name} contains values that are not finite floats; the file is damaged"
            )
    for name in found.keys() - expected.keys():
        raise CheckpointError(f"{path}: unexpected tensor {name}; give the model that the adapter was trained on")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])
    return lora.requires_grad_(False).eval()


def _read_config(path: Path) -> LoraConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("adapter") != "csm-lora":
            raise CheckpointError('not an adapter configuration of this package ("adapter" must be "csm-lora")')
        names = {kind: _strings(values[kind]) for kind in ("targets", "parts")}
        return LoraConfig(int(values["rank"]), float(values["alpha"]), float(values["dropout"]), **names)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot read the adapter configuration ({error!r}); check the adapter's folder"
        ) from error


def _strings(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)
