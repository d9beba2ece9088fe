"""Shared fixtures: the embedded checkpoint, and small checkpoints in Sesame's layout."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: tests never use the network

import json
import math

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before csm.kernels is imported: kernels run in Triton's interpreter

from safetensors.torch import load_file, save_file

from csm import Generator
from csm.config import CSMConfig, TransformerConfig
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import sesame_table
from csm.weights.recipe.shape import byte_tokenizer
from noise import CODEC, NOISE


@pytest.fixture(scope="session")
def tiny():
    """The embedded checkpoint on the CPU."""
    return Generator.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="session")
def noisy():
    """A checkpoint of random weights on the CPU."""
    return Generator.from_pretrained(NOISE, device="cpu")


@pytest.fixture
def one_thread():
    """One thread: small matrices gain nothing from more, and OpenMP threads wait for each other on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StandInGraph:
    """A captured graph on a CPU: a replay calls the step."""

    def __init__(self, step):
        self.step, self.replays = step, 0

    def replay(self):
        self.replays += 1
        self.step()


@pytest.fixture
def captures(monkeypatch):
    """Graphs are "captured" on the CPU too. The list of stand-ins, in the order of their captures."""
    made = []

    def capture(step, device, pool):
        made.append(StandInGraph(step))
        return made[-1]

    monkeypatch.setattr("csm.selfcheck._without_graphs", set())  # no failure of another test
    monkeypatch.setattr("csm.graph.graphs_enabled", lambda device: True)
    monkeypatch.setattr("csm.engine.graphs_enabled", lambda device: True, raising=False)
    monkeypatch.setattr("csm.graph.capture", capture)
    return made


# config.json of the first revision of sesame/csm-1b.
OLD_CONFIG = {
    "backbone_flavor": "llama-1B",
    "decoder_flavor": "llama-100M",
    "text_vocab_size": 128_256,
    "audio_vocab_size": 2051,
    "audio_num_codebooks": 32,
}

SESAME_CONFIG = CSMConfig(
    backbone=TransformerConfig(
        num_layers=3, dim=48, num_heads=6, num_kv_heads=2, head_dim=8, hidden_dim=80, max_positions=2048
    ),
    depth_decoder=TransformerConfig(
        num_layers=2, dim=40, num_heads=5, num_kv_heads=1, head_dim=8, hidden_dim=64, max_positions=8
    ),
    text_vocab_size=258,
    audio_vocab_size=259,
    num_codebooks=8,
    codebook_size=256,
)


def tensors_of(path):
    """Copies of a file's tensors, so that the file may be overwritten."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def sesame_weights(config, seed=0):
    """Random weights with Sesame's names, large enough that every part affects the codes."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for entry in sesame_table(config):
        noise = torch.randn(entry.shape, generator=generator)
        if len(entry.shape) == 1:
            weights[entry.source] = 1 + 0.2 * noise
        elif "embeddings" in entry.source:
            weights[entry.source] = noise
        else:
            fan_in = entry.shape[-2] if entry.source == "audio_head" else entry.shape[-1]
            weights[entry.source] = 1.5 * noise / math.sqrt(fan_in)
    return weights


def write_sesame(folder, weights, config=SESAME_CONFIG, file="model.safetensors"):
    """A folder with weights in Sesame's layout beside the hub's HF-style config.json."""
    folder.mkdir(exist_ok=True)
    if file.endswith(".pt"):
        torch.save(weights, folder / file)
    else:
        save_file(weights, folder / file)
    (folder / "config.json").write_text(json.dumps(write_hf_config(config, CODEC)))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def sesame_state():
    return sesame_weights(SESAME_CONFIG)


@pytest.fixture(scope="session")
def sesame_folder(sesame_state, tmp_path_factory):
    return write_sesame(tmp_path_factory.mktemp("sesame"), sesame_state)
