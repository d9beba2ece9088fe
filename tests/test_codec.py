"""The codec against HF Transformers' Mimi, streaming against decoding all frames at once, and input validation."""

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from csm import AudioError, CheckpointError, Generator
from csm.audio import to_mono
from csm.codec import Codec, normalize_codebooks
from csm.codec_ops import MAX_ROWS, Conv1d, ConvTranspose1d, Linear, use_products
from csm.config import MIMI
from csm.weights.layouts import mimi_table
from noise import CODEC, NOISE, random_state
from oracle import Shape, random_model, save


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Transformers' Mimi and ours, with the same random weights."""
    hf = random_model(Shape())
    generator = Generator.from_pretrained(save(hf, tmp_path_factory.mktemp("hf")), device="cpu")
    return hf.codec_model, generator.codec


@pytest.fixture(scope="module")
def loud():
    """A codec with layer scale 1, so that its transformer affects the output, of the embedded checkpoint's size."""
    state = random_state(mimi_table(CODEC), seed=5)
    for name in state:
        if name.endswith(".scale"):
            state[name].fill_(1.0)
    return Codec(CODEC, CODEC.num_codebooks, state, torch.device("cpu"))


def noise(samples, seed=0):
    return 0.3 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def random_codes(frames, codec, seed=0):
    shape = (frames, codec.num_codebooks)
    return torch.randint(codec.config.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frames", [1, 2, 13, 60])
def test_encode_equals_transformers(pair, frames):
    hf, ours = pair
    audio = noise(frames * 1920)
    with torch.no_grad():
        expected = hf.encode(audio.view(1, 1, -1)).audio_codes[0].T
    codes = ours.encode(audio)
    assert codes.shape == (frames, ours.num_codebooks)
    assert torch.equal(codes, expected)
    assert len(codes.unique()) > min(frames, 8)


@pytest.mark.parametrize("frames", [1, 2, 13, 60, 140])
def test_decode_equals_transformers(pair, frames):
    hf, ours = pair
    codes = random_codes(frames, ours)
    with torch.no_grad():
        expected = hf.decode(codes.T.unsqueeze(0)).audio_values[0, 0]
    audio = ours.decode(codes)
    assert audio.shape == (frames * 1920,)
    assert (audio - expected).norm() / expected.norm() < 1e-3


# 125 frames are 250 latent steps, the context of the codec's transformer. Beyond that its key ring wraps around.
@pytest.mark.parametrize("frames", [1, 2, 7, 50, 125, 126, 127, 200])
def test_stream_equals_whole(loud, frames):
    codes = random_codes(frames, loud)
    decoder = loud.stream_decoder()
    streamed = torch.cat([decoder.step(codes[t : t + 1])[0] for t in range(frames)])
    whole = loud.decode(codes)
    assert streamed.shape == whole.shape == (frames * 1920,)
    assert (streamed - whole).abs().max() <= 1e-4
    assert whole.abs().max() > 0.1


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_long_stream_equals_whole(loud, batch):
    """300 frames: the key ring of 10 s wraps around more than twice. moshi's own ring would give 1.5e-2."""
    codes = torch.stack([random_codes(300, loud, seed) for seed in range(batch)])
    decoder = loud.stream_decoder(batch)
    streamed = torch.cat([decoder.step(codes[:, t]) for t in range(300)], dim=1)
    whole = torch.stack([loud.decode(codes_TK) for codes_TK in codes])
    assert (streamed - whole).abs().max() <= 5e-6
    assert whole.abs().max() > 0.1


@pytest.mark.parametrize("sizes", [[4], [1, 2, 4], [3, 1, 4, 2, 2]])
def test_groups_of_frames_equal_whole(loud, sizes):
    """300 frames, several at a time, in groups of changing sizes."""
    codes = random_codes(300, loud)
    decoder = loud.stream_decoder(max_frames=4)
    parts, start = [], 0
    for size in itertools.cycle(sizes):
        parts.append(decoder.decode(codes[start : start + size].T.unsqueeze(0))[0])
        start += size
        if start >= 300:
            break
    streamed, whole = torch.cat(parts).flatten(), loud.decode(codes)
    assert (streamed - whole).abs().max() <= 5e-6
    assert whole.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the second never runs natively
@pytest.mark.parametrize("steps", [1, 2, 9, MAX_ROWS // 3 + 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.ConvTranspose1d, dict(in_channels=7, out_channels=5, kernel_size=6, stride=3)),
        (nn.ConvTranspose1d, dict(in_channels=4, out_channels=6, kernel_size=2, stride=1)),
        (nn.Conv1d, dict(in_channels=7, out_channels=5, kernel_size=3)),
        (nn.Conv1d, dict(in_channels=33, out_channels=40, kernel_size=1)),
    ],
)
def test_convolutions_as_products_equal_pytorch(kind, options, bias, steps, dtype):
    conv = kind(**options, bias=bias).to(dtype).requires_grad_(False)
    parent = nn.Sequential(conv)
    shape = (3, options["in_channels"], steps + options["kernel_size"] - 1)
    x_BCT = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected, state = parent.double()(x_BCT.double()), {name: x.clone() for name, x in parent.state_dict().items()}
    parent.to(dtype)
    use_products(parent)
    assert type(parent[0]) is {nn.Conv1d: Conv1d, nn.ConvTranspose1d: ConvTranspose1d}[kind]
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(parent(x_BCT).double(), expected, rtol=0, atol=limit)
    for name, tensor in parent.state_dict().items():
        assert torch.equal(tensor.double(), state[name].double())


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, MAX_ROWS), (1, MAX_ROWS + 1)])
@pytest.mark.parametrize("choice", ["", "reference"])
def test_linear_layers_equal_pytorch(shape, choice, monkeypatch):
    monkeypatch.setenv("CSM_OPS", choice)
    parent = nn.Sequential(nn.Linear(70, 30, bias=False)).requires_grad_(False)
    x_BTC = torch.randn(*shape, 70, generator=torch.Generator().manual_seed(1))
    expected = parent.double()(x_BTC.double())
    use_products(parent.float())
    assert type(parent[0]) is Linear
    torch.testing.assert_close(parent(x_BTC).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        nn.ConvTranspose1d(4, 4, 4, 2, groups=2),
        nn.ConvTranspose1d(4, 4, 4, 2, padding=1),
        nn.ConvTranspose1d(4, 4, 4, 2, dilation=2),
        nn.ConvTranspose1d(4, 4, 5, 2),
        nn.Conv1d(4, 4, 3, stride=2),
        nn.Conv1d(4, 4, 3, groups=2),
        nn.Conv1d(4, 4, 3, dilation=2),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.Linear(4, 4),
    ],
    ids=str,
)
def test_other_layers_stay(other):
    parent = nn.Sequential(other)
    use_products(parent)
    assert parent[0] is other


def test_a_state_dict_can_be_saved(loud, tmp_path):
    save_file(loud.state_dict(), tmp_path / "codec.safetensors")
    saved = load_file(tmp_path / "codec.safetensors")
    assert saved.keys() == loud.state_dict().keys()
    again = Codec(CODEC, CODEC.num_codebooks, saved, torch.device("cpu"))
    codes_TK = random_codes(3, loud)
    assert torch.equal(again.decode(codes_TK), loud.decode(codes_TK))


def test_mimi_runs_by_products_on_a_cpu(loud):
    decoder = [*loud._mimi.decoder.modules(), *loud._mimi.decoder_transformer.modules()]
    layers = [module for module in decoder if isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d))]
    assert len(layers) > 20
    assert {type(layer) for layer in layers} == {Linear, Conv1d, ConvTranspose1d}


def test_normalized_codebooks_make_the_same_codec():
    """Same codes, same samples, and no second table."""
    state, cpu = random_state(mimi_table(CODEC), 1), torch.device("cpu")
    usage = [name for name in state if name.endswith("cluster_usage")]
    for seed, name in enumerate(usage):
        state[name] = 0.5 + torch.rand(state[name].shape, generator=torch.Generator().manual_seed(seed))
        state[name][0] = 0  # a code that was never used
    before, after = (Codec(CODEC, CODEC.num_codebooks, s, cpu) for s in (state, normalize_codebooks(state)))
    audio = torch.randn(20 * CODEC.frame_size, generator=torch.Generator().manual_seed(1)) / 4
    codes_TK = before.encode(audio)
    assert torch.equal(codes_TK, after.encode(audio))
    assert torch.equal(before.decode(codes_TK), after.decode(codes_TK))
    tables = [module for module in after._mimi.modules() if hasattr(module, "cluster_usage")]
    assert len(tables) == len(usage) > 1
    assert all(table.embedding is table.embedding_sum for table in tables)


def test_a_step_takes_few_ops():
    """Mimi's numbers of layers and codebooks; the number of ops does not depend on the other sizes."""
    config = replace(CODEC, num_layers=8, num_codebooks=32)
    codec = Codec(config, 32, random_state(mimi_table(config), seed=5), torch.device("cpu"))
    decoder = codec.stream_decoder()
    with CountOps() as step:
        decoder.run()
    assert step.count <= 800
    with CountOps() as reset:
        decoder.reset()
    assert reset.count <= 4


class CountOps(TorchDispatchMode):
    """Counts ops that launch a kernel: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = [
            x for x in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(x, torch.Tensor)
        ]
        inputs = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        is_view = func.is_view and all(x.untyped_storage()._cdata in inputs for x in results)
        self.count += bool(results) and not is_view and "empty" not in func._schema.name
        return result


def test_reset_restarts_in_place(loud):
    decoder = loud.stream_decoder(batch=2)
    addresses = {name: buffer.data_ptr() for name, buffer in decoder.buffers().items()}
    for t in range(130):
        decoder.step(random_codes(2, loud, t))
    decoder.reset()
    fresh = loud.stream_decoder(batch=2)
    for t in range(130):
        codes = random_codes(2, loud, 1000 + t)
        assert torch.equal(decoder.step(codes), fresh.step(codes))
    assert {name: buffer.data_ptr() for name, buffer in decoder.buffers().items()} == addresses


def frames_of(decoder, seeds, codec):
    """Step once for every seed; the audio of each step."""
    batch = decoder.codes_BK.shape[0]
    return torch.stack([decoder.step(random_codes(batch, codec, seed)) for seed in seeds], dim=1)


def test_one_slot_restarts_while_the_others_go_on(loud):
    decoder, unaffected, fresh = (loud.stream_decoder(batch=3) for _ in range(3))
    for one in (decoder, unaffected):
        frames_of(one, range(130), loud)
    decoder.reset([1])
    after, expected, restarted = (frames_of(one, range(130, 138), loud) for one in (decoder, unaffected, fresh))
    assert torch.equal(after[[0, 2]], expected[[0, 2]])
    assert torch.equal(after[1], restarted[1])
    assert not torch.equal(after[1], expected[1])


def test_a_moved_slot_continues_its_stream(loud, one_thread):
    """One thread: with more, a convolution's rounding depends on the place in the batch."""
    decoder, unmoved = (loud.stream_decoder(batch=3) for _ in range(2))
    for one in (decoder, unmoved):
        frames_of(one, range(130), loud)
    decoder.move(2, 0)
    for t in range(130, 138):
        codes = random_codes(3, loud, t)
        audio, expected = decoder.step(codes[[2, 1, 2]]), unmoved.step(codes)
        assert torch.equal(audio[1:], expected[1:])
        assert torch.equal(audio[0], expected[2])


@pytest.mark.slow
def test_an_inactive_slot_keeps_its_state(loud):
    """Paused for 7 frames of a full ring, while the others go on."""
    decoder, other = (loud.stream_decoder(batch=3) for _ in range(2))
    for one in (decoder, other):
        frames_of(one, range(130), loud)
    decoder.active_B[1] = False
    paused, expected = (frames_of(one, range(130, 137), loud) for one in (decoder, other))
    assert torch.equal(paused[[0, 2]], expected[[0, 2]])
    decoder.active_B[1] = True
    uninterrupted = loud.stream_decoder(batch=3)
    frames_of(uninterrupted, range(130), loud)
    resumed, continued = (frames_of(one, range(200, 208), loud) for one in (decoder, uninterrupted))
    assert torch.equal(resumed[1], continued[1])


def test_a_long_recording_holds_up_no_stream(loud, monkeypatch):
    """A stream steps while another thread encodes; and the encoder is the same codec, with the same tensors."""
    audio = torch.randn(24_000, generator=torch.Generator().manual_seed(0)) / 9
    expected = loud.encode(audio)
    assert torch.equal(expected, loud._mimi.encode(audio.view(1, 1, -1))[0].T)
    own, shared = ({t.data_ptr() for t in module.parameters()} for module in (loud._encoder, loud._mimi))
    assert own == shared
    inside, go_on = threading.Event(), threading.Event()
    encode = loud._encoder.encode
    monkeypatch.setattr(loud._encoder, "encode", lambda *args: (inside.set(), go_on.wait(30), encode(*args))[2])
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(loud.encode, audio)
        assert inside.wait(30)
        decoder = loud.stream_decoder()
        for seed in range(3):
            decoder.step(random_codes(1, loud, seed))
        assert not pending.done()
        go_on.set()
        assert torch.equal(pending.result(30), expected)


def test_buffers_name_weights_and_state(loud):
    decoder = loud.stream_decoder()
    names = decoder.buffers()
    assert {"codes_BK", "audio_BN", "active_B", "decoder.model.0.conv.conv.weight", "decoder.model.0.previous"} <= set(
        names
    )
    assert {"decoder_transformer.transformer.layers.1.self_attn.cache", "upsample.convtr.partial"} <= set(names)
    before = {name: buffer.clone() for name, buffer in names.items()}
    decoder.step(random_codes(1, loud))
    changed = {name for name, buffer in decoder.buffers().items() if not torch.equal(buffer, before[name])}
    assert {"codes_BK", "audio_BN", "upsample.convtr.partial"} <= changed
    assert not changed & set(loud.buffers())


def test_batched_streams_equal_single_ones(loud):
    codes = torch.stack([random_codes(5, loud, seed) for seed in range(3)])
    decoder = loud.stream_decoder(batch=3)
    together = torch.cat([decoder.step(codes[:, t]) for t in range(5)], dim=1)
    for slot in range(3):
        torch.testing.assert_close(together[slot], loud.decode(codes[slot]), atol=1e-4, rtol=0)


def test_open_streams_are_independent(loud):
    first, second = random_codes(6, loud, 1), random_codes(6, loud, 2)
    one, other = loud.stream_decoder(), loud.stream_decoder()
    chunks = ([], [])
    for t in range(6):
        chunks[0].append(one.step(first[t : t + 1])[0])
        loud.decode(second)
        loud.encode(noise(1920))
        chunks[1].append(other.step(second[t : t + 1])[0])
    torch.testing.assert_close(torch.cat(chunks[0]), loud.decode(first), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(chunks[1]), loud.decode(second), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (1919, 1), (1920, 1), (1921, 2), (5000, 3)])
def test_a_partial_frame_is_padded_with_silence(loud, samples, frames):
    audio = noise(samples)
    padded = torch.nn.functional.pad(audio, (0, frames * 1920 - samples))
    codes = loud.encode(audio)
    assert codes.shape == (frames, CODEC.num_codebooks)
    assert torch.equal(codes, loud.encode(padded))


RATES = [1_999, 8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 24_001, 37_411]


@pytest.mark.parametrize("rate", RATES)
def test_any_sample_rate(rate):
    """A 440 Hz tone at any rate is a 440 Hz tone at 24 kHz."""
    tone = torch.sin(2 * math.pi * 440 * torch.arange(2 * rate) / rate)
    mono = to_mono(tone, rate, 24_000)
    expected = torch.sin(2 * math.pi * 440 * torch.arange(mono.shape[0]) / 24_000)
    assert mono.shape[0] == pytest.approx(48_000, abs=2)
    assert (mono - expected)[4000:-4000].abs().max() < 0.01


def test_channels_are_averaged():
    left, right = noise(4000, 1), noise(4000, 2)
    torch.testing.assert_close(to_mono(torch.stack((left, right)), 24_000, 24_000), (left + right) / 2)
    assert torch.equal(to_mono(left[None], 24_000, 24_000), left)


@pytest.mark.parametrize(("dtype", "full"), [(torch.int16, 32768), (torch.int32, 2**31)])
def test_integer_pcm(dtype, full):
    pcm = torch.tensor([0, full // 2, -full], dtype=torch.int64).to(dtype)
    assert to_mono(pcm, 24_000, 24_000).tolist() == [0.0, 0.5, -1.0]


def test_eight_bit_pcm():
    assert to_mono(torch.tensor([0, 128, 192], dtype=torch.uint8), 24_000, 24_000).tolist() == [-1.0, 0.0, 0.5]


BAD_AUDIO = {
    "empty": (torch.zeros(0), "empty"),
    "no channels": (torch.zeros(0, 100), "empty"),
    "nan": (torch.tensor([0.0, math.nan]), "not finite"),
    "infinite": (torch.tensor([0.0, math.inf]), "not finite"),
    "scalar": (torch.tensor(1.0), "shape"),
    "three dimensions": (torch.zeros(1, 1, 100), "shape"),
    "samples first": (torch.zeros(48_000, 2), "channels"),
    "complex": (torch.zeros(10, dtype=torch.complex64), "real"),
    "bool": (torch.zeros(10, dtype=torch.bool), "real"),
}


@pytest.mark.parametrize("name", BAD_AUDIO)
def test_invalid_audio_is_rejected(loud, name):
    audio, message = BAD_AUDIO[name]
    with pytest.raises(AudioError, match=message):
        loud.encode(audio)


@pytest.mark.parametrize("rate", [0, -24_000])
def test_invalid_sample_rates_are_rejected(rate):
    with pytest.raises(AudioError, match="sample rate"):
        to_mono(noise(100), rate, 24_000)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(3, 7, dtype=torch.int64), "shape"),
        (torch.zeros(8, dtype=torch.int64), "shape"),
        (torch.zeros(3, 8), "integers"),
        (torch.full((3, 8), 256), "255"),
        (torch.full((3, 8), -1), "from 0"),
    ],
)
def test_invalid_codes_are_rejected(loud, codes, message):
    with pytest.raises(AudioError, match=message):
        loud.decode(codes)


def test_no_codes_give_no_audio(loud):
    assert loud.decode(torch.zeros(0, 8, dtype=torch.int64)).shape == (0,)


@given(st.integers(1, 20_000), st.sampled_from([8_000, 16_000, 24_000, 48_000]), st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_every_length_gives_its_frames(loud, samples, rate, channels):
    codes = loud.encode(noise(samples * channels).view(channels, samples), rate)
    assert codes.shape[0] == math.ceil(math.ceil(samples * 24_000 / rate) / 1920)


def test_fewer_codebooks_than_the_codec_has():
    """Using only the first codebooks of a codec does not change their codes."""
    state = random_state(mimi_table(CODEC), seed=5)
    few, all_of_them = (Codec(CODEC, count, state, torch.device("cpu")) for count in (3, 8))
    audio = noise(9600)
    assert torch.equal(few.encode(audio), all_of_them.encode(audio)[:, :3])


def kyutai_names(state):
    """Rename moshi's current names to those in Kyutai's published file."""
    return {
        name.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0.weight", "out_proj.weight"): tensor
        for name, tensor in state.items()
    }


def test_a_file_in_kyutais_layout(tmp_path):
    state = random_state(mimi_table(CODEC), seed=9)
    save_file(kyutai_names(state), tmp_path / "mimi.safetensors")
    generator = Generator.from_pretrained(NOISE, device="cpu", codec=tmp_path / "mimi.safetensors")
    expected = Codec(CODEC, 8, state, torch.device("cpu"))
    codes = random_codes(4, expected)
    assert torch.equal(generator.decode(codes), expected.decode(codes))


def test_a_codec_of_another_shape_is_rejected(tmp_path):
    save_file(kyutai_names(random_state(mimi_table(MIMI), seed=9)), tmp_path / "mimi.safetensors")
    generator = Generator.from_pretrained(NOISE, device="cpu", codec=tmp_path / "mimi.safetensors")
    with pytest.raises(CheckpointError, match=r"mimi\.safetensors: not a Mimi"):
        generator.decode(torch.zeros(1, 8, dtype=torch.int64))


def test_codes_need_no_codec(monkeypatch):
    monkeypatch.setattr("csm.generator.read_codec", lambda *_: pytest.fail("loaded the codec"))
    generator = Generator.from_pretrained(NOISE, device="cpu")
    assert generator.generate_codes("Hello.", 0, max_audio_length_ms=160, seed=0).shape == (2, 8)
