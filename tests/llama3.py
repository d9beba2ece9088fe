"""The Llama-3 vocabulary, from the ranks in the llama-models package."""

import base64
import json
import tempfile
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, models

from csm.config import CSM_1B
from csm.prompt import TextTokenizer

# Llama 3's BPE ranks, with the regular expression and the special tokens of its reference tokenizer.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3_ranks():
    import llama_models

    lines = (Path(llama_models.__file__).parent / "llama3" / "tokenizer.model").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def special_tokens():
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    return {name: 128_000 + i for i, name in enumerate(names)} | {
        f"<|reserved_special_token_{i}|>": 128_002 + i for i in range(254)
    }


@cache
def llama3_tokenizers():
    """The same vocabulary as a tokenizer.json, loaded by us, and as a tiktoken encoding."""
    import tiktoken

    ranks = llama3_ranks()
    char_of = byte_characters()
    text_of = {token: "".join(char_of[byte] for byte in token) for token in ranks}
    vocab = {text_of[token]: rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.get):  # a pair merges if its concatenation is a token, lowest rank first
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [[text_of[left], text_of[right]] for left, right in splits if left in ranks and right in ranks]
    document = json.loads(Tokenizer(models.BPE()).to_str())
    document["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": True}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    document["added_tokens"] = [
        dict(id=i, content=name, special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
        for name, i in special_tokens().items()
    ]
    oracle = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(document))
        return TextTokenizer(path, CSM_1B.text_vocab_size), oracle


def byte_characters():
    """The printable character for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
