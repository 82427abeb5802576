"""A GGUF file for llama.cpp: matrices in F16 or Q8_0, all else in fp32.

Names, keys and the order of rotary rows are those of llama.cpp's own converter; ``gguf_child.py``
is the way back. Matrices whose columns do not come in blocks of 32 stay F16 in a Q8_0 file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptcore.errors import NumericalError
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from gptcore.export import Form, Parts
    from gptcore.tokenizer import Tokenizer

BLOCK = 32
"""Columns that share a scale in Q8_0."""
F16_MOST = 65504.0
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens in llama.cpp's numbers."""
SPLITTINGS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
"""llama.cpp's names of ways to split words, of those that ``gguf_child.splitting`` knows."""
NAMES = {
    "embedding": "token_embd",
    "positions": "position_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}

Floats = NDArray[np.float32]


def blocked_by(spec: ModelSpec) -> str | None:
    """Return why llama.cpp cannot compute a shape, or None."""
    if spec.family == "gpt2" and spec.gelu != "tanh":
        return "llama.cpp's GPT-2 has the GELU by tanh, and this model the exact one."
    if spec.family == "gpt2" and spec.heads * spec.head_width != spec.width:
        return "llama.cpp's GPT-2 has heads that fill the width: choose a recipe that keeps them."
    return None


def write(work: Path, form: Form, parts: Parts, progress: Callable[[float], None]) -> str:
    """Write the file and return a note.

    Raises:
        OSError: the disk is full or cannot be written.
        NumericalError: a weight is too large for 16 bits.
    """
    import gguf

    spec = parts.plain.spec
    eight = form.name.endswith("q8_0")
    notes = []
    with contextlib.closing(gguf.GGUFWriter(work, spec.family)) as writer:
        add_keys(writer, spec, eight=eight)
        notes += add_tokenizer(writer, parts.tokenizer, spec.vocabulary)
        tensors = list(named(parts))
        left = 0
        for done, (name, values) in enumerate(tensors):
            progress(0.5 * done / len(tensors))
            left += add_tensor(writer, name, values, eight=eight)
        if left:
            notes.append(f"{left} matrices have columns in no blocks of {BLOCK} and stay F16.")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        progress(0.55)
        writer.write_tensors_to_file()
    progress(1.0)
    return " ".join(notes)


def add_keys(writer: Any, spec: ModelSpec, *, eight: bool) -> None:
    """Write what llama.cpp needs to know of the shape."""
    import gguf

    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.MOSTLY_Q8_0 if eight else kinds.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.width)
    writer.add_feed_forward_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_head_count(spec.heads)
    writer.add_vocab_size(spec.vocabulary)
    if spec.norm == "layernorm":
        writer.add_layer_norm_eps(spec.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(spec.norm_eps)
    if spec.family != "gpt2":
        writer.add_head_count_kv(spec.kv_heads)
        writer.add_key_length(spec.head_width)
        writer.add_value_length(spec.head_width)
        writer.add_rope_dimension_count(spec.head_width)
        writer.add_rope_freq_base(spec.rope_theta)


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocabulary: int) -> list[str]:
    """Write the tokenizer, and return notes on what is lost."""
    text = tokenizer.as_json()
    if text is None:
        writer.add_tokenizer_model("no_vocab")
        return ["It has no tokenizer: token ids only."]
    known = json.loads(text)
    split = splitting_of(known)
    if known["model"].get("type") != "BPE" or split is None:
        writer.add_tokenizer_model("no_vocab")
        return ["llama.cpp has no such tokenizer: the file takes token ids only."]
    tokens: list[str] = [f"[PAD{id}]" for id in range(vocabulary)]
    types = [UNUSED] * vocabulary
    for one, id in known["model"]["vocab"].items():
        tokens[id], types[id] = one, NORMAL
    for added in known["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = known["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_ids:
        writer.add_eos_token_id(max(tokenizer.eos_ids))
    writer.add_add_bos_token(tokenizer.encode_prompt("")[:1] == [tokenizer.bos_id])
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    return []


def splitting_of(known: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of how a tokenizer.json splits words, None where it has none."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    from gptcore.weights.gguf_child import splitting

    for name in SPLITTINGS:
        plain = Fast(models.BPE())
        plain.normalizer, plain.pre_tokenizer = splitting(name)
        form = json.loads(plain.to_str())
        if all(form[part] == known.get(part) for part in ("normalizer", "pre_tokenizer")):
            return name
    return None


def named(parts: Parts) -> Iterator[tuple[str, Floats]]:
    """Yield every tensor under llama.cpp's name and in its arrangement."""
    spec, tensors = parts.plain.spec, dict(parts.plain.tensors)
    for layer in range(spec.layers) if spec.family == "gpt2" else ():
        for end in ("weight", "bias"):
            three = [
                tensors.pop(f"blocks.{layer}.attention.{one}.{end}").float().numpy()
                for one in "qkv"
            ]
            yield f"blk.{layer}.attn_qkv.{end}", np.concatenate(three)
    for name, tensor in tensors.items():
        module, _, end = name.rpartition(".")
        values = tensor.float().numpy()
        prefix = ""
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            prefix = f"blk.{number}."
        if spec.family == "llama" and module in ("attention.q", "attention.k"):
            values = permuted(values, spec.heads if module.endswith("q") else spec.kv_heads)
        yield f"{prefix}{NAMES[module]}.{end}", values
    if spec.rope_scaling is not None:
        yield "rope_freqs.weight", rope_factors(spec)


def permuted(values: Floats, heads: int) -> Floats:
    """Put rotary rows in llama.cpp's order: two halves become pairs side by side."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def rope_factors(spec: ModelSpec) -> Floats:
    """Return by what llama.cpp divides the rotary frequencies of Llama 3."""
    import torch

    from gptcore.model import stretched

    assert spec.rope_scaling is not None
    steps = torch.arange(0, spec.head_width, 2, dtype=torch.float32) / spec.head_width
    frequencies = 1.0 / spec.rope_theta**steps
    found: Floats = (frequencies / stretched(frequencies, spec.rope_scaling)).numpy()
    return found


def add_tensor(writer: Any, name: str, values: Floats, *, eight: bool) -> bool:
    """Write a tensor in its form; return whether it stays F16 for its shape.

    Raises:
        NumericalError: a weight is too large for 16 bits.
    """
    import gguf

    if values.ndim == 1 or name == "position_embd.weight":
        writer.add_tensor(name, values)
        return False
    if eight and values.shape[1] % BLOCK == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        return False
    if (most := float(np.abs(values).max(initial=0.0))) > F16_MOST:
        raise NumericalError(
            f"{name} has a weight of {most:,.0f}, and 16 bits hold {F16_MOST:,.0f} at most: choose "
            "gguf-q8_0 or hf."
        )
    writer.add_tensor(name, values.astype(np.float16))
    return eight
