"""The child that reads a GGUF file and writes a Hugging Face directory. No torch.

Started by ``gguf.converted`` with the file, the folder, and limits of memory (bytes) and
processor time (seconds). Says why it refuses a file in one line on standard error.
"""

from __future__ import annotations

import collections
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gptcore.weights.gguf import write_note
from gptcore.weights.gguf_file import GGUFFile, Refused, StoredTensor

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
LLAMA3_FACTORS = (8.0, 32.0)
"""What Llama 3.1 and 3.2 stretch by; a GGUF keeps only the resulting frequencies."""
CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens in llama.cpp's numbers."""


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
    file = GGUFFile(source)
    architecture = text(file, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise Refused(
            f"its architecture is {str(architecture)[:60]!r}; these can be read: "
            f"{', '.join(ARCHITECTURES)}"
        )
    config = config_of(file, architecture)
    write_tokenizer(file, target)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    with (target / "model.safetensors").open("wb") as out:
        write_tensors(out, [planned(one, architecture, config) for one in wanted(file)])
    types = collections.Counter(t.type_name for t in file.tensors.values() if len(t.shape) > 1)
    write_note(target, f"{types.most_common(1)[0][0]} (GGUF)")


def text(file: GGUFFile, key: str) -> str | None:
    """Return a key's text, None where it is missing or no text."""
    found = file.keys.get(key)
    return found if isinstance(found, str) else None


def number(file: GGUFFile, key: str, default: float | None = None) -> Any:
    """Return a key's number."""
    found = file.keys.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Refused(f"its key {key} is missing or no number")
    return found


def texts(file: GGUFFile, key: str) -> list[str]:
    """Return a key's list of texts."""
    found = file.keys.get(key)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise Refused(f"its key {key} is missing or no list of texts")
    return found


def config_of(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """Return the Hugging Face config that the keys describe."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise Refused("it has no token embedding")
    ends = file.keys.get("tokenizer.ggml.eos_token_id")
    common = {
        "vocab_size": embedding.shape[0],
        "eos_token_id": ends if isinstance(ends, int) else None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }

    def own(key: str, default: float | None = None) -> Any:
        return number(file, f"{architecture}.{key}", default)

    if architecture == "gpt2":
        return common | {
            "model_type": "gpt2",
            "n_layer": own("block_count"),
            "n_head": own("attention.head_count"),
            "n_embd": own("embedding_length"),
            "n_inner": own("feed_forward_length"),
            "n_positions": own("context_length"),
            "layer_norm_epsilon": shortest(own("attention.layer_norm_epsilon", 1e-5)),
        }
    heads, width = own("attention.head_count"), own("embedding_length")
    head_width = own("attention.key_length", width // max(heads, 1))
    theta = own("rope.freq_base", 10_000.0)
    return common | {
        "model_type": architecture,
        "num_hidden_layers": own("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own("attention.head_count_kv", heads),
        "head_dim": head_width,
        "hidden_size": width,
        "intermediate_size": own("feed_forward_length"),
        "max_position_embeddings": own("context_length"),
        "rms_norm_eps": shortest(own("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": float(theta),
        "rope_scaling": rope_scaling(file, architecture, theta, head_width),
    }


def shortest(value: float) -> float:
    """Return the shortest decimal of a 32-bit float: 1e-5, where a file keeps 9.99999975e-06."""
    return float(str(np.float32(value)))


def rope_scaling(
    file: GGUFFile, architecture: str, theta: float, head_width: int
) -> dict[str, Any] | None:
    """Return Llama 3's scaling, found again from the factors that the file keeps."""
    kept = file.tensors.get("rope_freqs.weight")
    if kept is None:
        kind = file.keys.get(f"{architecture}.rope.scaling.type", "none")
        if kind != "none":
            raise Refused(f"its rotary scaling {str(kind)[:40]!r} is not supported; llama3 is")
        return None
    factors = kept.dequantized()
    frequencies = theta ** -(np.arange(0, head_width, 2) / head_width)
    for factor in LLAMA3_FACTORS if factors.shape == frequencies.shape else ():
        turns = 8192 * frequencies / (2 * np.pi)
        share = np.clip((turns - 1) / 3, 0, 1)
        if np.allclose(1 / (share + (1 - share) / factor), factors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
    raise Refused("its rotary factors are not those of Llama 3")


Values = NDArray[np.float32]
Planned = tuple[str, tuple[int, ...], Callable[[], Values]]
"""The checkpoint's name of a tensor, its shape, and what reads it."""


def wanted(file: GGUFFile) -> Iterator[StoredTensor]:
    """Yield the tensors that are weights."""
    yield from (one for name, one in file.tensors.items() if name != "rope_freqs.weight")


def planned(tensor: StoredTensor, architecture: str, config: Mapping[str, Any]) -> Planned:
    """Return what becomes of a tensor in a Hugging Face checkpoint."""
    name = new_name(tensor.name, architecture)
    if architecture == "gpt2" and name.startswith("h.") and len(tensor.shape) == 2:
        return (
            name,
            tensor.shape[::-1],
            lambda: np.ascontiguousarray(tensor.dequantized().T),
        )
    if architecture == "llama" and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
        whose = "num_attention_heads" if "attn_q" in tensor.name else "num_key_value_heads"
        heads = config[whose]
        if len(tensor.shape) != 2 or heads < 1 or tensor.shape[0] % (2 * heads):
            raise Refused(
                f"its tensor {tensor.name[:80]!r} has the shape {tensor.shape}, which {heads} "
                "heads cannot share"
            )
        return name, tensor.shape, lambda: unpermuted(tensor.dequantized(), heads)
    return name, tensor.shape, tensor.dequantized


def unpermuted(weight: Values, heads: int) -> Values:
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


def write_tensors(out: BinaryIO, tensors: list[Planned]) -> None:
    """Write a safetensors file, one tensor in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in tensors:
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    out.write(struct.pack("<Q", len(written)) + written)
    for _, _, read in tensors:
        out.write(read().data)


def write_tokenizer(file: GGUFFile, target: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json from the vocabulary and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    kind = text(file, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise Refused(
            f"its tokenizer is of kind {str(kind)[:40]!r}; byte-level BPE ('gpt2') can be read: "
            "use the model's Hugging Face folder"
        )
    tokens = texts(file, "tokenizer.ggml.tokens")
    halves = [one.partition(" ") for one in texts(file, "tokenizer.ggml.merges")]
    merges = [(left, right) for left, _, right in halves]
    types = file.keys.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list | np.ndarray) or len(types) != len(tokens):
        raise Refused(f"its {len(tokens):,} tokens have another number of types")
    try:
        bpe = models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges)
    except Exception as error:  # the library raises Exception itself
        raise Refused(f"its vocabulary and merges do not belong together: {error}") from None
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer, tokenizer.pre_tokenizer = splitting(text(file, "tokenizer.ggml.pre"))
    tokenizer.decoder = decoders.ByteLevel()
    for type_, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, its in zip(tokens, types, strict=True)
            if its == type_
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    settings: dict[str, Any] = {}
    for name in ("bos", "eos", "unknown", "padding"):
        id = file.keys.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(id, int) and 0 <= id < len(tokens):
            short = {"unknown": "unk", "padding": "pad"}.get(name, name)
            settings[f"{short}_token"] = tokens[id]
    first = settings.get("bos_token") if file.keys.get("tokenizer.ggml.add_bos_token") else None
    if first is not None:
        id = tokenizer.token_to_id(first)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[first, "$A"], special_tokens=[(first, id)]
        )
    tokenizer.save(str(target / "tokenizer.json"))
    if template := text(file, "tokenizer.chat_template"):
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
    except OSError as error:
        sys.stderr.write(f"refused: its conversion could not be written: {error.strerror}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
