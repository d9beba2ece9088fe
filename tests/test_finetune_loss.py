"""The loss, compared with HF Transformers, with cached inference, and with itself over many random samples."""

import pytest
import torch
import torch.nn.functional as F
from test_hf_oracle import SHAPES

from conftest import SESAME_CONFIG
from csm import Generator
from csm.finetune.batches import Example, Turn, collate, sample_frames
from csm.finetune.forward import unfused_attention
from csm.finetune.initial import initial_state
from csm.finetune.loss import Trainee, combine, count
from csm.frame import FrameState, decode_frame
from csm.model import CSM
from csm.prefill import Prefill
from csm.prompt import audio_rows, text_rows
from csm.sampling import SamplingParams
from micro import random_examples
from oracle import AUDIO_EOS_TOKEN, AUDIO_TOKEN, hf_inputs, random_model, save

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["Good morning to you.", "And to you!", "How are you?"]
SPEAKERS = [0, 1, 0]
FRAMES = [16, 10, 13]


def noise(num_frames, seed):
    return 0.3 * torch.randn(num_frames * 1920, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def pair(request, tmp_path_factory):
    """The same random checkpoint in Transformers and here, and a conversation of three recorded turns."""
    hf = random_model(request.param)
    ours = Generator.from_pretrained(save(hf, tmp_path_factory.mktemp("hf")), device="cpu")
    audio = [noise(frames, seed) for seed, frames in enumerate(FRAMES)]
    turns = [
        Turn(ours._tokenizer.encode(speaker, words), ours.encode(sound))
        for speaker, words, sound in zip(SPEAKERS, WORDS, audio, strict=True)
    ]
    return hf, ours, audio, turns


def hf_losses(hf, audio, first_trained):
    """Transformers' losses: codebook 0, depth decoder, total. Labels are all audio frames from ``first_trained`` on."""
    # hf_inputs ends with a text to generate. It is the third turn's; its audio tokens are appended here.
    inputs = hf_inputs(list(zip(WORDS[:2], audio[:2], strict=True)), WORDS[2], SPEAKERS)
    audio_tokens = [AUDIO_TOKEN] * FRAMES[2] + [AUDIO_EOS_TOKEN]
    ids = torch.cat((inputs["input_ids"], torch.tensor([audio_tokens])), dim=1)
    labels = torch.where((ids == AUDIO_TOKEN) | (ids == AUDIO_EOS_TOKEN), ids, -100)
    cutoffs = torch.tensor([[sound.shape[0] for sound in audio]]).cumsum(-1)
    with torch.no_grad():
        merged = hf._merge_input_ids_with_input_values(ids, torch.cat(audio).view(1, 1, -1), cutoffs, labels)
        # Transformers overwrites the labels of all audio tokens, including -100, so turns are masked afterwards.
        ends = (ids[0] == AUDIO_EOS_TOKEN).nonzero().flatten() + 1
        if first_trained:
            merged["labels"][:, : ends[first_trained - 1]] = -100
        out = hf(**merged, attention_mask=torch.ones_like(ids))
    return out.backbone_loss, out.depth_decoder_loss, out.loss


@pytest.mark.parametrize("first_trained", [0, 2], ids=["every turn", "context masked"])
def test_equals_transformers(pair, first_trained):
    hf, ours, audio, turns = pair
    expected0, expected_depth, expected = hf_losses(hf, audio, first_trained)
    batch = collate([Example(tuple(turns), first_trained)], ["draw"], depth_share=1.0)
    counts = count(batch)
    with torch.no_grad():
        sums = Trainee(ours.model)(batch)
    assert counts.frames == sum(FRAMES[first_trained:]) + len(FRAMES[first_trained:])
    torch.testing.assert_close(sums.codebook0 / counts.frames, expected0, atol=1e-5, rtol=0)
    torch.testing.assert_close(sums.depth_J.sum() / counts.depth_codes, expected_depth, atol=1e-5, rtol=0)
    torch.testing.assert_close(combine(sums, counts, 1.0), expected, atol=1e-5, rtol=0)
    print(f"\n{expected.item():.6f} Transformers, {combine(sums, counts, 1.0).item():.6f} ours")


def test_logits_equal_cached_inference(pair):
    """Teacher-forced in a padded batch here; row by row through the KV caches there."""
    _, ours, _, turns = pair
    model, config = ours.model, ours.config
    trainee, batch = Trainee(model), collate([Example((turn,)) for turn in turns], "abc", depth_share=1.0)
    with torch.no_grad():
        h_ND = trainee.predicting_states(batch)
        logits0_NV = h_ND @ model.codebook0_head.T
        logits_JNV = trainee.depth_logits(h_ND, batch.code_AK)
        done = 0
        for turn in turns:
            frames = turn.codes_TK.shape[0]
            rows = generation_rows(config, turn)
            expected_TK = cached_logits(model, rows, len(turn.text_ids))
            mine = logits0_NV[done : done + frames + 1], logits_JNV[:, done : done + frames + 1]
            for codebook in range(config.num_codebooks):
                logits = mine[0] if codebook == 0 else mine[1][codebook - 1]
                torch.testing.assert_close(
                    logits[:, : config.codebook_size], expected_TK[codebook], atol=1e-4, rtol=1e-5
                )
            done += frames + 1


def test_greedy_codes_are_the_largest_logits(pair):
    """The training forward pass over greedily generated codes predicts the same codes."""
    _, ours, _, _ = pair
    codes_TK = ours.generate_codes(WORDS[0], 1, max_audio_length_ms=1600, temperature=0)
    batch = collate([Example((Turn(ours._tokenizer.encode(1, WORDS[0]), codes_TK),))], ["all"], depth_share=1.0)
    trainee, size = Trainee(ours.model), ours.config.codebook_size
    with torch.no_grad():
        h_ND = trainee.predicting_states(batch)
        best = [(h_ND @ ours.model.codebook0_head.T)[:-1, :size].argmax(dim=-1)]
        best += list(trainee.depth_logits(h_ND, batch.code_AK)[:, :-1, :size].argmax(dim=-1))
    assert torch.equal(torch.stack(best, dim=1), codes_TK)


def generation_rows(config, turn):
    text, audio = text_rows(turn.text_ids, config.num_codebooks), audio_rows(turn.codes_TK)
    return torch.cat((text.row_TC, audio.row_TC)), torch.cat((text.mask_TC, audio.mask_TC))


def cached_logits(model, rows, num_text):
    """Logits of every codebook, (frames + 1, codebook_size) each, one row and one code at a time with KV caches."""
    config = model.config
    state = FrameState.allocate(config, 1, model.device, model.dtype)
    expected = [[] for _ in range(config.num_codebooks)]
    forced = []

    def force(logits_BV, codebook, _, codes_BK, table_VD, qkv=None):
        """Replaces ``sample``: stores the logits and returns the forced code."""
        expected[codebook].append(logits_BV[0].clone())
        code_B = forced[-1][codebook].view(1)
        codes_BK[:, codebook] = code_B
        return None if table_VD is None else torch.nn.functional.embedding(code_B, table_VD)

    row_TC, mask_TC = rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("csm.frame.sample", force)
        patch.setattr("csm.frame.can_draw_depth_codes", lambda *_: False)  # which would not call it
        Prefill(model).start(state, 0, row_TC[:num_text], mask_TC[:num_text], SamplingParams(0, 1, 0))
        for codes_K in row_TC[num_text:, :-1]:
            forced.append(codes_K)
            decode_frame(model, state)
    return [torch.stack(logits) for logits in expected]


def test_the_loss_of_sampled_frames_is_unbiased():
    """The mean over many samples of 1/16 of the frames is within four standard errors of the loss over all frames."""
    config = SESAME_CONFIG
    model = CSM.from_state_dict(config, initial_state(config, seed=1), torch.device("cpu"))
    with torch.no_grad():
        model.depth_heads.mul_(40)  # far from uniform predictions, so that frames differ in loss
    trainee = Trainee(model)
    examples = random_examples(6, config, frames=(5, 60), turns=(1, 1))
    draws = 400
    with torch.no_grad():
        whole = collate(examples, [""] * 6, depth_share=1.0)
        full = trainee(whole).depth_J.sum() / count(whole).depth_codes
        values = []
        for draw in range(draws):
            batch = collate(examples, [f"{draw}/{index}" for index in range(6)], depth_share=1 / 16)
            assert count(batch) == count(whole)
            assert batch.weight_S.sum().item() == pytest.approx(count(batch).frames)
            values.append(trainee(batch).depth_J.sum() / count(batch).depth_codes)
    values = torch.stack(values).double()
    error = values.std() / draws**0.5
    print(f"\nall frames {full:.4f}; 1/16, mean of {draws} draws {values.mean():.4f}, standard error {error:.4f}")
    assert values.std() > 0.02 * full
    assert abs(values.mean() - full) < 4 * error


def test_frames_are_sampled_uniformly():
    for num_frames, share, expected in ((3, 1 / 16, 1), (40, 1 / 16, 2), (7, 0.5, 4), (5, 1.0, 5)):
        hits = torch.zeros(num_frames)
        for draw in range(2000):
            chosen, weight = sample_frames(num_frames, share, f"{draw}")
            assert len(set(chosen)) == len(chosen) == expected and weight == num_frames / expected
            hits[chosen] += 1
        probability = expected / num_frames
        spread = (2000 * probability * (1 - probability)) ** 0.5
        assert (hits - 2000 * probability).abs().max() <= 5 * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "positions"), [(6, 2, 17), (4, 4, 1), (3, 1, 8)])
def test_unfused_attention_equals_sdpa(dtype, heads, kv_heads, positions):
    """Values and gradients equal PyTorch's scaled_dot_product_attention in float64: grouped heads, causal mask."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, count, positions, 16, generator=generator).to(dtype) for count in (heads, kv_heads, kv_heads)
    )
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    wide = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    found = unfused_attention(*inputs)
    expected = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    found.square().sum().backward()
    expected.square().sum().backward()
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.06, "rtol": 0.06}
    torch.testing.assert_close(found.double(), expected, **close)
    for one, other in zip(inputs, wide, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, **close)
