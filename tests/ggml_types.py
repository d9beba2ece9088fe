"""ggml's types, value by value as its documentation defines them, and GGUF files from their parts. Slow and plain.

Nothing of csm.weights or of the package gguf is used.
"""

import struct

import numpy as np

TYPES = {  # name: number, values and bytes of a block, offsets of its float16 scales
    "F32": (0, 1, 4, ()),
    "F16": (1, 1, 2, ()),
    "Q4_0": (2, 32, 18, (0,)),
    "Q4_1": (3, 32, 20, (0, 2)),
    "Q5_0": (6, 32, 22, (0,)),
    "Q5_1": (7, 32, 24, (0, 2)),
    "Q8_0": (8, 32, 34, (0,)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q5_K": (13, 256, 176, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
    "BF16": (30, 1, 2, ()),
}


def half(data, at):
    return float(np.frombuffer(data[at : at + 2], "<f2")[0])


def nibbles(data):
    """Lower four bits of all bytes, then the upper four."""
    return [b & 15 for b in data] + [b >> 4 for b in data]


def high_bits(data):
    bits = int.from_bytes(data, "little")
    return [(bits >> j & 1) << 4 for j in range(32)]


def scales_and_minimums(data):
    """The 6-bit numbers of a super-block of q4_k and q5_k: those of sub-blocks 4 to 7 are in two pieces."""
    scales = [data[j] & 63 for j in range(4)] + [(data[8 + j] & 15) | (data[j] >> 6) << 4 for j in range(4)]
    minimums = [data[4 + j] & 63 for j in range(4)] + [(data[8 + j] >> 4) | (data[4 + j] >> 6) << 4 for j in range(4)]
    return scales, minimums


def k_block(data, high):
    """A super-block of q4_k, or of q5_k with its ``high`` bits."""
    d, d_min = half(data, 0), half(data, 2)
    scales, minimums = scales_and_minimums(data[4:16])
    low = data[-128:]
    values = []
    for sub in range(8):
        for j in range(32):
            byte = low[sub // 2 * 32 + j]
            q = (byte >> 4 if sub % 2 else byte & 15) + (16 if high and high[j] >> sub & 1 else 0)
            values.append(d * scales[sub] * q - d_min * minimums[sub])
    return values


def q6_k_block(data):
    low, high, scales, d = data[:128], data[128:192], np.frombuffer(data[192:208], np.int8), half(data, 208)
    values = []
    for at in range(256):
        half_block, within = divmod(at, 128)
        quarter, j = divmod(within, 32)
        byte = low[half_block * 64 + quarter % 2 * 32 + j]
        q = (byte >> 4 if quarter >= 2 else byte & 15) | (high[half_block * 32 + j] >> 2 * quarter & 3) << 4
        values.append(d * int(scales[at // 16]) * (q - 32))
    return values


def decode_block(kind, data):
    """The values of one block as Python floats (64 bits)."""
    if kind in ("F32", "F16"):
        return [float(np.frombuffer(data, "<f4" if kind == "F32" else "<f2")[0])]
    if kind == "BF16":
        return [struct.unpack("<f", b"\0\0" + data)[0]]
    if kind == "Q8_0":
        return [half(data, 0) * q for q in np.frombuffer(data[2:], np.int8).tolist()]
    if kind == "Q4_0":
        return [half(data, 0) * (q - 8) for q in nibbles(data[2:])]
    if kind == "Q4_1":
        return [half(data, 0) * q + half(data, 2) for q in nibbles(data[4:])]
    if kind == "Q5_0":
        return [half(data, 0) * (q + h - 16) for q, h in zip(nibbles(data[6:]), high_bits(data[2:6]), strict=True)]
    if kind == "Q5_1":
        pairs = zip(nibbles(data[8:]), high_bits(data[4:8]), strict=True)
        return [half(data, 0) * (q + h) + half(data, 2) for q, h in pairs]
    if kind == "Q6_K":
        return q6_k_block(data)
    return k_block(data, data[16:48] if kind == "Q5_K" else None)


def decode(kind, data):
    size = TYPES[kind][2]
    blocks = (data[at : at + size] for at in range(0, len(data), size))
    return np.array([value for block in blocks for value in decode_block(kind, block)])


def random_blocks(kind, count, seed=0):
    """Blocks with any bits, but scales of about 1."""
    _, _, size, scales = TYPES[kind]
    rng = np.random.default_rng(seed)
    if kind in ("F32", "F16", "BF16"):
        data = rng.standard_normal(count).astype("<f4")
        return data.tobytes() if kind == "F32" else data.astype("<f2").tobytes() if kind == "F16" else bf16(data)
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = rng.uniform(-1, 1, (count, 1)).astype("<f2").view(np.uint8)
    return blocks.tobytes()


def bf16(data):
    return (data.view(np.uint32) >> 16).astype("<u2").tobytes()


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, data):
    """A metadata entry: kind 4 is uint32, 7 bool, 8 a string, 9 an array."""
    return string(key) + struct.pack("<I", kind) + data


def tensor_info(name, shape, kind, offset):
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return string(name) + dims + struct.pack("<IQ", kind, offset)


def gguf_bytes(metadata, tensors, version=3, alignment=32, counts=None):
    """A file. ``tensors``: (name, shape, type number, bytes). ``counts`` replaces those of tensors and metadata."""
    infos, data = b"", b""
    for name, shape, kind, content in tensors:
        infos += tensor_info(name, shape, kind, len(data))
        data += content + b"\0" * (-len(content) % alignment)
    counts = counts or (len(tensors), len(metadata))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(metadata) + infos
    return header + b"\0" * (-len(header) % alignment) + data
