"""GGUF files for tests: checkpoints written as llama.cpp's converter does, and raw headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers

from tests.tiny import CHAT_TEMPLATE

ARCHITECTURES = {
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL


def write_gguf(
    model: transformers.PreTrainedModel,
    tokenizer: Path,
    file: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    keys: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` and a byte-level BPE ``tokenizer.json`` as one GGUF file.

    Names of tensors come from the gguf package; the order of Llama's rotary rows and GPT-2's
    transposed weights are those of llama.cpp's ``convert_hf_to_gguf.py``.
    """
    config = model.config
    writer = gguf.GGUFWriter(file, config.model_type)
    add_shape(writer, config)
    add_tokenizer(writer, json.loads(tokenizer.read_text()), config.vocab_size)
    for key, value in (keys or {}).items():
        {bool: writer.add_bool, str: writer.add_string}.get(type(value), writer.add_uint32)(
            key, value
        )
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new_name, name
        values = stored_as(name, parameter.float().numpy(), config)
        is_matrix = values.ndim > 1 and "position" not in new_name
        add_tensor(writer, new_name, values, kind if is_matrix else gguf.GGMLQuantizationType.F32)
    scaling = getattr(config, "rope_parameters", None) or {}
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config.head_dim, scaling))
    return finish(writer)


def add_shape(writer: gguf.GGUFWriter, config: transformers.PretrainedConfig) -> None:
    """Write the keys of a config, which transformers names alike for all families but GPT-2."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)


def stored_as(name: str, values: np.ndarray, config: transformers.PretrainedConfig) -> np.ndarray:
    """Return a weight in the order in which llama.cpp keeps it."""
    if config.model_type == "gpt2" and name.endswith(
        ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    ):
        return np.ascontiguousarray(values.T)
    if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        is_query = name.endswith("q_proj.weight")
        heads = config.num_attention_heads if is_query else config.num_key_value_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    return values


def llama3_factors(head_dim: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """Return what llama.cpp keeps of Llama 3's scaling: a factor a frequency."""
    found = []
    for at in range(0, head_dim, 2):
        wavelength = 2 * np.pi * scaling["rope_theta"] ** (at / head_dim)
        turns = scaling["original_max_position_embeddings"] / wavelength
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if turns > high:
            found.append(1.0)
        elif turns < low:
            found.append(scaling["factor"])
        else:
            smooth = (turns - low) / (high - low)
            found.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(found, dtype=np.float32)


def add_tokenizer(writer: gguf.GGUFWriter, written: Mapping[str, Any], vocabulary: int) -> None:
    """Write vocabulary and merges, filled up to the model's ``vocabulary`` with unused tokens."""
    ids = {**written["model"]["vocab"], **{t["content"]: t["id"] for t in written["added_tokens"]}}
    assert len(ids) <= vocabulary
    tokens = sorted(ids, key=ids.__getitem__)
    control = {one["content"] for one in written["added_tokens"]}
    tokens += [f"[unused{id}]" for id in range(len(tokens), vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if one in control else NORMAL for one in tokens])
    writer.add_token_merges([" ".join(one) for one in written["model"]["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|im_start|>"))
    writer.add_chat_template(CHAT_TEMPLATE)


def add_tensor(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType
) -> None:
    """Write ``values`` quantized by the gguf package."""
    writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> Path:
    """Write the file to disk and return its path."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


def head(tensors: int = 0, keys: int = 0, version: int = 3, word: bytes = b"GGUF") -> bytes:
    """Return the first 24 bytes of a file."""
    return word + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes | str) -> bytes:
    """Return a text with its length before it."""
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def array_key(name: str, kind: int, count: int, elements: bytes = b"") -> bytes:
    """Return a key whose value is an array that claims ``count`` elements of a kind."""
    return text(name) + struct.pack("<IIQ", 9, kind, count) + elements


def tensor_entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """Return a tensor's entry in the header; ``shape`` is innermost first, as files have it."""
    extents = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + extents + struct.pack("<IQ", kind, offset)


BOMB = head(keys=1) + array_key("a", 0, 2**62)
"""One key whose array claims 2⁶² numbers: 49 bytes that let a trusting reader grow for ever."""
