"""The child that reads a GGUF file and writes a Hugging Face directory. No torch.

Started by ``gguf.converted`` with the file, the folder, and limits of memory (bytes) and
processor time (seconds). Says why it refuses a file in one line on standard error.
"""

from __future__ import annotations

import collections
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptcore.weights.gguf import write_note

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
LLAMA3_FACTORS = (8.0, 32.0)
"""What Llama 3.1 and 3.2 stretch by; a GGUF keeps only the resulting frequencies."""


class Refused(Exception):
    """Why a file cannot be converted, in a sentence."""


def bound(memory_bytes: int, seconds: int) -> None:
    """Hold this process to that much address space and processor time."""
    import resource

    for kind, limit in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CPU, seconds)):
        _, hard = resource.getrlimit(kind)
        ceiling = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(kind, (ceiling, hard))
        except (ValueError, OSError):
            continue  # macOS refuses some; the parent watches too


def convert(source: Path, target: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer of ``source`` into ``target``."""
    from gguf import GGUFReader

    reader = GGUFReader(str(source))
    architecture = value(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise Refused(
            f"its architecture is {str(architecture)[:60]!r}; these can be read: "
            f"{', '.join(ARCHITECTURES)}"
        )
    config = config_of(reader, architecture)
    write_tokenizer(reader, target, config)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    with (target / "model.safetensors").open("wb") as out:
        write_tensors(out, list(tensors_of(reader, architecture, config)))
    types = collections.Counter(t.tensor_type.name for t in reader.tensors if len(t.shape) > 1)
    write_note(target, f"{types.most_common(1)[0][0]} (GGUF)")


def value(reader: Any, key: str, default: Any = None) -> Any:
    """Return a key's value, ``default`` where it is missing."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def config_of(reader: Any, architecture: str) -> dict[str, Any]:
    """Return the Hugging Face config that the keys describe."""

    def number(key: str, default: Any = None) -> Any:
        found = value(reader, f"{architecture}.{key}", default)
        if found is None or isinstance(found, list | str):
            raise Refused(f"its key {architecture}.{key} is missing or no number")
        return found

    shapes = {t.name: [int(n) for n in t.shape] for t in reader.tensors}  # innermost first
    if "token_embd.weight" not in shapes:
        raise Refused("it has no token embedding")
    vocabulary = shapes["token_embd.weight"][-1]
    ends = {"eos_token_id": value(reader, "tokenizer.ggml.eos_token_id")}
    tied = "output.weight" not in shapes
    if architecture == "gpt2":
        return ends | {
            "model_type": "gpt2",
            "n_layer": number("block_count"),
            "n_head": number("attention.head_count"),
            "n_embd": number("embedding_length"),
            "n_inner": number("feed_forward_length"),
            "n_positions": number("context_length"),
            "vocab_size": vocabulary,
            "layer_norm_epsilon": float(number("attention.layer_norm_epsilon", 1e-5)),
            "tie_word_embeddings": tied,
        }
    heads, width = number("attention.head_count"), number("embedding_length")
    head_width = number("attention.key_length", width // max(heads, 1))
    theta = float(number("rope.freq_base", 10_000.0))
    return ends | {
        "model_type": architecture,
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_width,
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": vocabulary,
        "rms_norm_eps": float(str(np.float32(number("attention.layer_norm_rms_epsilon", 1e-6)))),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(reader, architecture, theta, head_width),
        "tie_word_embeddings": tied,
    }


def rope_scaling(
    reader: Any, architecture: str, theta: float, head_width: int
) -> dict[str, Any] | None:
    """Return Llama 3's scaling, found again from the factors that the file keeps."""
    kind = value(reader, f"{architecture}.rope.scaling.type", "none")
    kept = next((t for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    if kept is None:
        if kind not in ("none", None):
            raise Refused(f"its rotary scaling {str(kind)[:40]!r} is not supported; llama3 is")
        return None
    frequencies = theta ** -(np.arange(0, head_width, 2) / head_width)
    for factor in LLAMA3_FACTORS:
        turns = 8192 * frequencies / (2 * np.pi)
        share = np.clip((turns - 1) / 3, 0, 1)
        if np.allclose(1 / (share + (1 - share) / factor), kept.data, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
    raise Refused("its rotary factors are not those of Llama 3")


Planned = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]


def tensors_of(reader: Any, architecture: str, config: dict[str, Any]) -> Iterator[Planned]:
    """Yield (checkpoint's name, shape, function that dequantizes) of every tensor."""
    from gguf import dequantize

    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        name = new_name(tensor.name, architecture)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        conv1d = architecture == "gpt2" and name.startswith("h.") and len(shape) == 2

        def read(tensor: Any = tensor, shape: tuple[int, ...] = shape) -> np.ndarray:
            return np.asarray(dequantize(tensor.data, tensor.tensor_type), "<f4").reshape(shape)

        if conv1d:
            yield name, shape[::-1], lambda read=read: np.ascontiguousarray(read().T)
        elif architecture == "llama" and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config[
                "num_attention_heads" if "attn_q" in tensor.name else "num_key_value_heads"
            ]
            yield name, shape, lambda read=read, heads=heads: unpermuted(read(), heads)
        else:
            yield name, shape, read


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rotary rows: pairs side by side become two halves."""
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows, columns)


LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
GPT2_NAMES = {
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
    "token_embd": "wte",
    "position_embd": "wpe",
    "output_norm": "ln_f",
    "output": "lm_head",
}


def new_name(name: str, architecture: str) -> str:
    """Return a GGUF tensor's name as Hugging Face checkpoints have it."""
    names = GPT2_NAMES if architecture == "gpt2" else LLAMA_NAMES
    stem, _, kind = name.rpartition(".")
    prefix = ""
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2)
        prefix = f"h.{layer}." if architecture == "gpt2" else f"model.layers.{layer}."
    return f"{prefix}{names.get(stem, stem)}.{kind}"


def write_tensors(out: BinaryIO, planned: list[Planned]) -> None:
    """Write a safetensors file, one tensor in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in planned:
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for name, shape, read in planned:
        tensor = read()
        if tensor.shape != shape:
            raise Refused(f"its tensor {name} is {tensor.shape}, not {shape}")
        out.write(tensor.data)


def write_tokenizer(reader: Any, target: Path, config: dict[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json from the vocabulary and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    kind = value(reader, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise Refused(
            f"its tokenizer is of kind {str(kind)[:40]!r}; byte-level BPE ('gpt2') can be read: "
            "use the model's Hugging Face folder"
        )
    tokens = value(reader, "tokenizer.ggml.tokens")
    merges = value(reader, "tokenizer.ggml.merges")
    types = value(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[tuple(one.split(" ", 1)) for one in merges])
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = splitting(value(reader, "tokenizer.ggml.pre"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == 3  # control
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == 4  # user defined
        ]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    settings: dict[str, Any] = {}
    for name in ("bos", "eos", "unknown", "padding"):
        id = value(reader, f"tokenizer.ggml.{name}_token_id")
        if isinstance(id, int) and 0 <= id < len(tokens):
            short = {"unknown": "unk", "padding": "pad"}.get(name, name)
            settings[f"{short}_token"] = tokens[id]
    template = value(reader, "tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def splitting(kind: str | None) -> tuple[Any, Any]:
    """Return normalizer and pre-tokenizer of that name in llama.cpp's list.

    Source of the patterns: the tokenizer.json files of GPT-2, SmolLM2, Llama 3 and Qwen2.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in (None, "default", "gpt-2"):
        return None, byte_level
    if kind in ("smollm", "starcoder", "refact", "command-r"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        return None, pre_tokenizers.Sequence([digits, byte_level])
    if kind in ("llama-bpe", "llama3", "llama-v3", "qwen2"):
        numbers = r"\p{N}" if kind == "qwen2" else r"\p{N}{1,3}"
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
            + numbers
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        normalizer = normalizers.NFC() if kind == "qwen2" else None
        return normalizer, pre_tokenizers.Sequence([words, rest])
    raise Refused(f"how its tokenizer splits words ({kind[:40]!r}) is not known here")


def main() -> int:
    """Convert as the arguments say; return the exit status."""
    source, target, memory_bytes, seconds = sys.argv[1:]
    bound(int(memory_bytes), int(seconds))
    try:
        convert(Path(source), Path(target))
    except Refused as error:
        sys.stderr.write(f"refused: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
