"""The prefix cache: its budget in bytes, which entry leaves first, and that no prefix in it is lost."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csm.cache import KVCache
from csm.config import TransformerConfig
from csm.prefix_cache import PrefixCache
from csm.prompt import Prompt

CONFIG = TransformerConfig(
    num_layers=3, dim=8, num_heads=4, num_kv_heads=2, head_dim=6, hidden_dim=8, max_positions=256
)
POSITION_BYTES = 2 * 3 * 2 * 6 * 2  # keys and values, layers, heads, head dim, bfloat16
CACHE = KVCache.allocate(CONFIG, 1, 256, torch.device("cpu"), torch.bfloat16)
CACHE.k_LBGSd.normal_()
CACHE.v_LBGSd.normal_()


def check_prefix_cache(cache, config):
    """The budget against the memory that is held, and the index against the entries."""
    entries = list(cache._entries.values())
    tensors = [tensor for entry in entries for tensor in (entry.k_LBGSd, entry.v_LBGSd)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert len(storages) == 2 * len(entries)  # no memory is shared by two entries
    values = config.num_layers * config.num_kv_heads * config.head_dim * sum(max(entry.keys) for entry in entries)
    size = 2 * values * (tensors[0].element_size() if tensors else 0)
    assert cache.num_bytes == size == sum(storages.values()) <= cache.max_bytes
    prefixes = {(length, key) for entry in entries for length, key in entry.keys.items()}
    assert {(length, key) for key, (_, length) in cache._found.items()} == prefixes  # all are found, and no other
    assert all(cache._entries[serial].keys[length] == key for key, (serial, length) in cache._found.items())
    assert cache._lengths == Counter(length for _, length in cache._found.values())


def prompt_of(turns):
    """A prompt of turns, each a number that fills so many rows: (what, rows)."""
    rows = torch.cat([torch.full((rows, 2), what) for what, rows in turns])
    ends = torch.tensor([rows for _, rows in turns]).cumsum(0).tolist()
    return Prompt(rows, torch.ones_like(rows, dtype=torch.bool), tuple(ends))


def longer(prompt):
    """The prompt with one more row: the last row is never loaded."""
    return Prompt(
        torch.cat((prompt.row_TC, prompt.row_TC[-1:])),
        torch.cat((prompt.mask_TC, prompt.mask_TC[-1:])),
        prompt.turn_ends,
    )


def store(cache, prompt):
    cache.store(prompt, prompt.row_TC.shape[0], CACHE)


def found(cache, prompt):
    """The length of the longest prefix; its keys and values must be those that were stored."""
    target = KVCache.allocate(CONFIG, 1, 256, torch.device("cpu"), torch.bfloat16)
    length = cache.load(longer(prompt), target)
    assert torch.equal(target.k_LBGSd[:, :, :, :length], CACHE.k_LBGSd[:, :, :, :length])
    assert torch.equal(target.v_LBGSd[:, :, :, :length], CACHE.v_LBGSd[:, :, :, :length])
    return length


def test_the_budget_is_in_bytes_of_keys_and_values():
    cache = PrefixCache(30 * POSITION_BYTES + POSITION_BYTES - 1)
    for what in range(3):
        store(cache, prompt_of([(what, 10)]))
        assert cache.num_bytes == (what + 1) * 10 * POSITION_BYTES
    store(cache, prompt_of([(3, 1)]))  # 31 positions are one byte too many
    assert cache.num_bytes == 21 * POSITION_BYTES and len(cache) == 3
    store(cache, prompt_of([(4, 31)]))  # larger than the budget: nothing leaves for it
    assert cache.num_bytes == 21 * POSITION_BYTES and len(cache) == 3


@pytest.mark.parametrize("use", ["load", "store"])
def test_the_least_recently_used_entry_leaves_first(use):
    cache, prompts = PrefixCache(30 * POSITION_BYTES), [prompt_of([(what, 10)]) for what in range(5)]
    for prompt in prompts[:3]:
        store(cache, prompt)
    (found if use == "load" else store)(cache, prompts[0])
    store(cache, prompts[3])
    store(cache, prompts[4])
    # Looking each up in this order changes nothing: no entry is stored meanwhile.
    assert [found(cache, prompt) for prompt in prompts] == [10, 0, 0, 10, 10]


def test_a_voice_outlives_the_entry_that_brought_it():
    """Two texts in one voice: the voice is found as long as one of the two is there."""
    cache = PrefixCache(30 * POSITION_BYTES)
    voice = (7, 8)
    first, second, third = prompt_of([voice, (1, 7)]), prompt_of([voice, (2, 7)]), prompt_of([(3, 10)])
    store(cache, first)
    store(cache, second)
    store(cache, third)  # the first one leaves
    assert found(cache, first) == 8  # the voice, of the second entry
    assert found(cache, second) == 15
    check_prefix_cache(cache, CONFIG)


TURNS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["store", "load"]), TURNS), max_size=25), st.integers(0, 40))
def test_any_order_of_uses(actions, positions):
    """Against a list of prompts, the least recently used first, which knows rows and no hashes."""
    cache, kept = PrefixCache(positions * POSITION_BYTES), []
    for action, turns in actions:
        prompt, serials = prompt_of(turns), list(cache._entries)
        size, known = length_of(prompt), max((known_length(entry, prompt) for entry in kept), default=0)
        if action == "load":
            assert found(cache, prompt) == known
        else:
            store(cache, prompt)
        if known and (action == "load" or known == size):  # one of those that hold it is now the last
            which = serials.index(next(reversed(cache._entries)))
            assert known_length(kept[which], prompt) == known
            kept.append(kept.pop(which))
        elif action == "store" and size <= positions:
            kept = [entry for entry in kept if known_length(prompt, entry) < length_of(entry)] + [prompt]
            while sum(map(length_of, kept)) > positions:
                kept.pop(0)
        assert [max(entry.keys) for entry in cache._entries.values()] == [length_of(entry) for entry in kept]
        assert cache.num_bytes == POSITION_BYTES * sum(map(length_of, kept))
        check_prefix_cache(cache, CONFIG)


def length_of(prompt):
    return prompt.row_TC.shape[0]


def known_length(entry, prompt):
    """The longest end of a turn of ``entry`` up to which both have the same rows."""
    ends = [end for end in entry.turn_ends if end <= prompt.row_TC.shape[0]]
    return max((end for end in ends if torch.equal(entry.row_TC[:end], prompt.row_TC[:end])), default=0)
