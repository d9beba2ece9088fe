"""A model and a data set (noise with sentences as its text) that are small enough to train in seconds."""

import json

import numpy as np
import sphn
import torch

from csm.config import CSMConfig, TransformerConfig
from csm.finetune.batches import Example, Turn
from csm.weights.config_json import write_hf_config
from noise import CODEC

# Uses NOISE's tokenizer and the first 4 codebooks of its codec.
MICRO = CSMConfig(
    backbone=TransformerConfig(
        num_layers=2, dim=48, num_heads=3, num_kv_heads=1, head_dim=16, hidden_dim=64, max_positions=160
    ),
    depth_decoder=TransformerConfig(
        num_layers=1, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden_dim=48, max_positions=4
    ),
    text_vocab_size=258,
    audio_vocab_size=259,
    num_codebooks=4,
    codebook_size=256,
)
SENTENCES = (
    "One for all.",
    "All for one.",
    "Two cities.",
    "It was the best.",
    "It was the worst.",
    "Of times.",
    "A tale.",
    "The end.",
)


def write_config(path, config=MICRO):
    path.write_text(json.dumps(write_hf_config(config, CODEC)))
    return path


def write_data(folder, sentences=SENTENCES, seconds=(0.4, 0.8)):
    """Write a manifest and recordings of noise, ``seconds[0]`` to ``seconds[1]`` long."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for index, text in enumerate(sentences):
        samples = rng.normal(size=int(24_000 * rng.uniform(*seconds))).astype("float32") / 5
        sphn.write_wav(str(folder / f"{index}.wav"), samples, 24_000)
        lines.append(json.dumps({"audio": f"{index}.wav", "text": text, "speaker": index % 2}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def random_examples(count, config=MICRO, seed=0, turns=(1, 2), text=(3, 8), frames=(3, 9)):
    """Conversations of random text ids and codes."""
    generator = torch.Generator().manual_seed(seed)

    def random_int(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def turn():
        ids = torch.randint(config.text_vocab_size, (random_int(*text),), generator=generator).tolist()
        codes = torch.randint(config.codebook_size, (random_int(*frames), config.num_codebooks), generator=generator)
        return Turn(ids, codes.to(torch.int16))

    return [Example(tuple(turn() for _ in range(random_int(turns[0], turns[1] + 1)))) for _ in range(count)]
