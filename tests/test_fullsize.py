"""CSM-1B's own shape with random weights, beside HF Transformers: ``make fullsize``.

Needs about 16 GB of memory and 13 GB of disk. Prints a Markdown table for docs/log.md.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import save_file

from conftest import OLD_CONFIG
from csm.config import CSM_1B, MIMI
from csm.weights.checkpoint import MIMI_FILE
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import export, hf_table, mimi_table, sesame_table
from csm.weights.recipe.shape import byte_tokenizer
from noise import random_state

pytestmark = pytest.mark.fullsize

FRAMES = 10
ROUNDS = 3

SIZE = {torch.bfloat16: 2, torch.float32: 4}


@pytest.fixture(scope="module")
def recording():
    spec = find_spec("moonshine_voice")
    if spec is None or spec.origin is None:
        pytest.fail("moonshine-voice, which carries the recording, is not installed: make fullsize installs it")
    return max((Path(spec.origin).parent / "assets").glob("*.wav"), key=lambda path: path.stat().st_size)


def write_tokenizer(folder):
    byte_tokenizer().save(str(folder / "tokenizer.json"))


def write_sesame(state, folder, dtype):
    """As sesame/csm-1b had it first: Sesame's names, the old config.json, Mimi in Kyutai's file."""
    tensors = {name: tensor.to(dtype) for name, tensor in export(state, sesame_table(CSM_1B))}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(OLD_CONFIG))
    save_file(random_state(mimi_table(MIMI), seed=1), folder / MIMI_FILE)
    write_tokenizer(folder)


def write_hf(state, folder, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in export(state, hf_table(CSM_1B))}
    tensors |= {name: tensor.float() for name, tensor in export(random_state(mimi_table(MIMI), 1), mimi_table(MIMI))}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = write_hf_config(CSM_1B, MIMI) | {"audio_token_id": 258, "audio_eos_token_id": 259, "pad_token_id": 128_002}
    config["depth_decoder_config"]["max_position_embeddings"] = 33
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


class Worker:
    """A loaded model in a process of its own."""

    def __init__(self, who, folder, dtype, recording):
        script = Path(__file__).parent / "fullsize_worker.py"
        command = [sys.executable, script, who, folder, str(dtype).removeprefix("torch."), recording]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loaded = json.loads(self.process.stdout.readline())

    def speak(self, frames):
        print(frames, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def table(rows):
    columns = list(next(iter(rows.values())))
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for who, row in rows.items():
        print(f"| {who} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_full_size_beside_transformers(dtype, recording, tmp_path):
    state = random_state(sesame_table(CSM_1B), seed=0)
    parameters = sum(tensor.numel() for tensor in state.values())
    assert round(parameters / 1e9, 3) == 1.553
    state["codebook0_head"][2048:] = 0  # Transformers does not mask the ids that Mimi does not know
    state["depth_heads"][:, 2048:] = 0
    state = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}  # the same weights in both dtypes
    folders = {"ours": tmp_path / "sesame", "transformers": tmp_path / "hf"}
    for who, write in (("ours", write_sesame), ("transformers", write_hf)):
        folders[who].mkdir()
        write(state, folders[who], dtype)
    del state
    workers = {who: Worker(who, folder, dtype, recording) for who, folder in folders.items()}
    times = {who: {1: [], FRAMES + 1: []} for who in workers}
    last = {who: worker.speak(2) for who, worker in workers.items()}  # warm: the codec is loaded, pages are touched
    for _ in range(ROUNDS):  # in turns, so that both see the same machine
        for frames in (1, FRAMES + 1):
            for who, worker in workers.items():
                last[who] = worker.speak(frames)
                times[who][frames].append(last[who]["seconds"])
    for worker in workers.values():
        worker.process.communicate()

    model_gb = parameters * SIZE[dtype] / 1e9
    rows = {}
    for who, worker in workers.items():
        per_frame = [(many - one) / FRAMES for one, many in zip(times[who][1], times[who][FRAMES + 1], strict=True)]
        rows[who] = {
            "load s": worker.loaded["load_s"],
            "load peak GB": worker.loaded["load_peak_gb"],
            "run peak GB": last[who]["run_peak_gb"],
            "first frame ms": median(times[who][1]) * 1000,
            "ms per frame": median(per_frame) * 1000,
        }
    print(f"\n{os.cpu_count()} cores, torch {torch.__version__}, {dtype}, weights {model_gb:.2f} GB, {recording.name}")
    table(rows)
    assert len(last["ours"]["codes"]) == FRAMES + 1
    assert rows["ours"]["load peak GB"] < 1.15 * model_gb
    assert rows["ours"]["ms per frame"] <= rows["transformers"]["ms per frame"]
    if dtype == torch.float32:
        assert last["ours"]["codes"] == last["transformers"]["codes"]
