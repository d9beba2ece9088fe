"""Read ``config.json``, in HF Transformers' form or Sesame's older form, into ``CSMConfig`` and ``CodecConfig``.

A key is read, or it must have the one value that this model supports, or it is known not to affect generation. An
unknown key with a number, a string or a boolean is ignored with a warning; any other unknown key is an error. Missing
keys have the defaults of HF Transformers' configuration classes.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from csm.config import LLAMA_1B, LLAMA_100M, MIMI, CodecConfig, CSMConfig, RopeScaling, TransformerConfig
from csm.errors import CheckpointError, CheckpointWarning

FLAVORS = {"llama-1B": LLAMA_1B, "llama-100M": LLAMA_100M}

# Keys that HF Transformers (4.52 to 5), Unsloth and Sesame's class write and that do not affect generation.
IGNORED = frozenset(
    """
    architectures attn_implementation transformers_weights attention_dropout audio_token_id audio_eos_token_id
    bos_token_id eos_token_id pad_token_id codebook_pad_token_id dtype torch_dtype transformers_version model_type
    initializer_range use_cache use_streaming max_position_embeddings layer_scale_initial_scale unsloth_fixed
    unsloth_version tie_word_embeddings return_dict output_hidden_states output_attentions torchscript pruned_heads
    chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention
    tie_encoder_decoder finetuning_task id2label label2id task_specific_params problem_type tokenizer_class prefix
    sep_token_id decoder_start_token_id max_length min_length do_sample early_stopping num_beams temperature top_k
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values suppress_tokens exponential_decay_length_penalty begin_suppress_tokens num_beam_groups
    diversity_penalty tf_legacy_loss use_bfloat16 auto_map
    """.split()
)
LLAMA_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
LLAMA_KEYS = frozenset(
    """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size rms_norm_eps
    rope_theta rope_scaling rope_parameters max_position_embeddings
    """.split()
)
MIMI_FIXED = {
    "audio_channels": 1,
    "use_causal_conv": True,
    "pad_mode": "constant",
    "trim_right_ratio": 1.0,
    "use_conv_shortcut": False,
    "hidden_act": "gelu",
    "attention_bias": False,
    "num_semantic_quantizers": 1,
    "norm_eps": 1e-5,
    "model_type": "mimi",
    "normalize": False,
}
MIMI_KEYS = {  # HF's name: ours
    "sampling_rate": "sample_rate",
    "hidden_size": "dim",
    "num_filters": "num_filters",
    "num_residual_layers": "num_residual_layers",
    "kernel_size": "kernel_size",
    "last_kernel_size": "last_kernel_size",
    "residual_kernel_size": "residual_kernel_size",
    "dilation_growth_rate": "dilation_base",
    "compress": "compress",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "hidden_dim",
    "sliding_window": "context",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
    "num_quantizers": "num_codebooks",
}
ROPE_KEYS = frozenset(
    "rope_type type factor low_freq_factor high_freq_factor original_max_position_embeddings rope_theta".split()
)


def read_config(path: Path) -> tuple[CSMConfig, CodecConfig]:
    """Shapes of the model and of its codec.

    Raises CheckpointError, which names the file and the key. Unknown scalar keys give one CheckpointWarning.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; copy the config.json of this checkpoint into the folder"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: invalid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    unknown: list[str] = []
    try:
        if "depth_decoder_config" in values:
            configs = _hf_config(values, unknown)
        elif "backbone_flavor" in values:
            configs = _sesame_config(values, unknown), MIMI
        else:
            raise CheckpointError(
                "no key depth_decoder_config (HF form) or backbone_flavor (Sesame's form); this is not a CSM model"
            )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: value of the wrong type: {error!r}") from error
    if "auto_map" in values:  # classes of remote code, which is not run
        unknown.append("'auto_map'")
    if unknown:
        message = f"{path}: unknown keys {', '.join(unknown)} are ignored; if the speech is wrong, look there first"
        warnings.warn(message, CheckpointWarning, stacklevel=2)
    return configs


def write_hf_config(config: CSMConfig, codec: CodecConfig) -> dict[str, Any]:
    """The inverse of ``read_config``: the values of a config.json that HF Transformers reads as the same shapes."""
    codec_values: dict[str, Any] = {theirs: getattr(codec, ours) for theirs, ours in MIMI_KEYS.items()}
    codec_values |= {
        **MIMI_FIXED,
        "num_key_value_heads": codec.num_heads,
        "head_dim": codec.head_dim,
        "vector_quantization_hidden_dimension": codec.codebook_dim,
        "upsample_groups": codec.dim,
        "upsampling_ratios": list(codec.ratios),
        "rope_theta": codec.rope_theta,
    }
    shared = {"num_codebooks": config.num_codebooks, "vocab_size": config.audio_vocab_size}
    return {
        "architectures": ["CsmForConditionalGeneration"],
        "model_type": "csm",
        **shared,
        **_llama_values(config.backbone),
        "text_vocab_size": config.text_vocab_size,
        "codebook_eos_token_id": 0,
        "codebook_pad_token_id": config.audio_vocab_size - 1,
        "tie_codebooks_embeddings": True,
        "depth_decoder_config": {
            "model_type": "csm_depth_decoder_model",
            **shared,
            "backbone_hidden_size": config.backbone.dim,
            **_llama_values(config.depth_decoder),
        },
        "codec_config": codec_values,
    }


def _llama_values(config: TransformerConfig) -> dict[str, Any]:
    scaling = config.rope_scaling and {
        "rope_type": "llama3",
        "factor": config.rope_scaling.factor,
        "low_freq_factor": config.rope_scaling.low_freq_factor,
        "high_freq_factor": config.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": config.rope_scaling.original_max_positions,
    }
    return {
        **LLAMA_FIXED,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


def _sesame_config(values: Mapping[str, Any], unknown: list[str]) -> CSMConfig:
    keys = {"backbone_flavor", "decoder_flavor", "text_vocab_size", "audio_vocab_size", "audio_num_codebooks"}
    unknown += _check_keys("", values, keys, {})
    missing = keys - values.keys()
    if missing:
        raise CheckpointError(f"missing key {sorted(missing)[0]!r}")
    num_codebooks = _integer(values, "audio_num_codebooks")
    return CSMConfig(
        backbone=_flavor(values["backbone_flavor"]),
        depth_decoder=replace(_flavor(values["decoder_flavor"]), max_positions=num_codebooks),
        text_vocab_size=_integer(values, "text_vocab_size"),
        audio_vocab_size=_integer(values, "audio_vocab_size"),
        num_codebooks=num_codebooks,
        codebook_size=MIMI.codebook_size,
    )


def _flavor(name: object) -> TransformerConfig:
    if name not in FLAVORS:
        raise CheckpointError(f"unknown flavor {name!r}; expected one of {', '.join(FLAVORS)}")
    return FLAVORS[str(name)]


def _hf_config(values: Mapping[str, Any], unknown: list[str]) -> tuple[CSMConfig, CodecConfig]:
    shapes = {"num_codebooks", "vocab_size", "text_vocab_size", "depth_decoder_config", "codec_config"}
    # The published file has the keys of both forms.
    legacy = {"backbone_flavor", "decoder_flavor", "audio_vocab_size", "audio_num_codebooks"}
    fixed = {**LLAMA_FIXED, "tie_codebooks_embeddings": True, "codebook_eos_token_id": 0}
    unknown += _check_keys("", values, shapes | legacy | LLAMA_KEYS, fixed)
    depth, codec = values["depth_decoder_config"], values.get("codec_config", {})
    depth_keys = LLAMA_KEYS | {"num_codebooks", "vocab_size", "backbone_hidden_size"}
    unknown += _check_keys("depth_decoder_config.", depth, depth_keys, LLAMA_FIXED)

    num_codebooks, vocab = _integer(values, "num_codebooks", 32), _integer(values, "vocab_size", 2051)
    codec_config = _mimi_config(codec, unknown)
    config = CSMConfig(
        backbone=_llama(values, LLAMA_1B, _integer(values, "max_position_embeddings", 2048)),
        depth_decoder=_llama(depth, LLAMA_100M, num_codebooks),
        text_vocab_size=_integer(values, "text_vocab_size", 128_256),
        audio_vocab_size=vocab,
        num_codebooks=num_codebooks,
        codebook_size=codec_config.codebook_size,
    )
    for key, defaulted, expected in (
        ("num_codebooks", 32, num_codebooks),
        ("vocab_size", 2051, vocab),
        ("backbone_hidden_size", 2048, config.backbone.dim),
    ):
        if depth.get(key, defaulted) != expected:
            raise CheckpointError(f"depth_decoder_config.{key}: expected {expected}, got {depth.get(key, defaulted)}")
    if codec_config.num_codebooks < num_codebooks:
        raise CheckpointError(
            f"codec_config.num_quantizers: expected at least {num_codebooks}, got {codec_config.num_codebooks}"
        )
    return config, codec_config


def _llama(values: Mapping[str, Any], default: TransformerConfig, max_positions: int) -> TransformerConfig:
    dim = _integer(values, "hidden_size", default.dim)
    num_heads = _integer(values, "num_attention_heads", default.num_heads)
    scaling = values.get("rope_parameters") or values.get("rope_scaling")
    rope = values.get("rope_parameters") or values
    _check_mapping("rope_parameters", rope)
    return TransformerConfig(
        num_layers=_integer(values, "num_hidden_layers", default.num_layers),
        dim=dim,
        num_heads=num_heads,
        num_kv_heads=_integer(values, "num_key_value_heads", num_heads),
        head_dim=_integer(values, "head_dim", dim // max(num_heads, 1)),
        hidden_dim=_integer(values, "intermediate_size", default.hidden_dim),
        max_positions=max_positions,
        norm_eps=_number(values, "rms_norm_eps", default.norm_eps),
        rope_theta=_number(rope, "rope_theta", default.rope_theta),
        rope_scaling=_rope_scaling(scaling),
    )


def _rope_scaling(values: Mapping[str, Any] | None) -> RopeScaling | None:
    if not values:
        return None
    unknown = _check_keys("rope_scaling.", values, ROPE_KEYS, {})
    if unknown:
        raise CheckpointError(f"unknown key {unknown[0]}; this scaling of RoPE is not supported")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"rope_scaling.rope_type: expected 'llama3' or 'default', got {kind!r}")
    return RopeScaling(
        factor=_number(values, "factor"),
        low_freq_factor=_number(values, "low_freq_factor"),
        high_freq_factor=_number(values, "high_freq_factor"),
        original_max_positions=_integer(values, "original_max_position_embeddings"),
    )


def _mimi_config(values: Mapping[str, Any], unknown: list[str]) -> CodecConfig:
    _check_mapping("codec_config", values)
    fields = {ours: _integer(values, theirs, getattr(MIMI, ours)) for theirs, ours in MIMI_KEYS.items()}
    dim, num_heads = fields["dim"], fields["num_heads"]
    fixed = {
        **MIMI_FIXED,
        "num_key_value_heads": num_heads,
        "vector_quantization_hidden_dimension": fields["codebook_dim"],
        "head_dim": dim // max(num_heads, 1),
        "upsample_groups": dim,
        "num_codebooks": fields["num_codebooks"],
    }
    shapes = MIMI_KEYS.keys() | {"upsampling_ratios", "rope_theta", "rope_parameters", "frame_rate", "_frame_rate"}
    unknown += _check_keys("codec_config.", values, shapes, fixed)
    rope = values.get("rope_parameters") or values
    frame_rate = values.get("_frame_rate") or values.get("frame_rate") or MIMI.frame_rate
    return CodecConfig(
        **fields,
        ratios=tuple(values.get("upsampling_ratios") or MIMI.ratios),
        rope_theta=_number(rope, "rope_theta", MIMI.rope_theta),
        frame_rate=_number({"frame_rate": frame_rate}, "frame_rate"),
    )


def _check_keys(
    where: str, values: Mapping[str, Any], read: set[str] | frozenset[str], fixed: dict[str, Any]
) -> list[str]:
    """The unknown keys whose values are scalars, quoted.

    Null values and Transformers' private keys (``_attn_implementation_autoset``...) are ignored. Raises CheckpointError
    at a key of ``fixed`` with another value, and at an unknown key that cannot be ignored: an object, a list, a bias
    or a quantization.
    """
    _check_mapping(where.rstrip("."), values)
    unknown = []
    for key, value in values.items():
        if key in fixed:
            if value is not None and value != fixed[key]:
                raise CheckpointError(f"{where}{key}: expected {fixed[key]!r}, got {value!r}; not supported")
        elif key not in read and key not in IGNORED and value is not None and not key.startswith("_"):
            if "quantization" in key:
                raise CheckpointError(f"{where}{key}: quantized weights are not supported; use the original checkpoint")
            if not isinstance(value, (bool, int, float, str)):
                raise CheckpointError(f"unknown key {where + key!r}; remove it if it does not change the model")
            if "bias" in key and value is not False:
                raise CheckpointError(f"{where}{key}: expected False, got {value!r}; biases are not supported")
            unknown.append(repr(where + key))
    return unknown


def _check_mapping(where: str, values: object) -> None:
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where}: expected an object, got {values!r}")


def _integer(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer; ``default`` where the key is missing or null."""
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"{key}: expected an integer, got {value!r}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number; ``default`` where the key is missing or null."""
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointError(f"{key}: expected a finite number, got {value!r}")
    return float(value)
