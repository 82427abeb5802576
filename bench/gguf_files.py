"""GGUF files of the weights that our side has, so that llama.cpp computes with the same."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requantized(source: Path, target: Path, form: str) -> Path:
    """Return a copy of a GGUF file in another form (``Q8_0``), made by llama.cpp itself."""
    import llama_cpp

    if not target.exists():
        options = llama_cpp.llama_model_quantize_default_params()
        options.allow_requantize = True
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
        fresh = target.with_suffix(".part")
        arguments = str(source).encode(), str(fresh).encode(), ctypes.byref(options)
        if llama_cpp.llama_model_quantize(*arguments):
            raise SystemExit(f"llama.cpp could not make {form} of {source.name}.")
        fresh.replace(target)
    return target


def random_gpt2(name: str, target: Path, form: str) -> Path:
    """Write the random model that ``build_random`` makes of a GPT-2 shape, its matrices in a form.

    Args:
        name: of the preset.
        target: the file.
        form: ``Q8_0`` or ``Q4_1``.
    """
    sys.path.insert(0, str(ROOT))
    import gguf
    import numpy as np
    from gguf import quants

    from gptcore.device import Placement
    from gptcore.spec import PRESETS
    from gptcore.weights import build_random

    if target.exists():
        return target
    spec = PRESETS[name]
    state = build_random(spec, Placement()).state_dict()
    fresh = target.with_suffix(".part")
    writer = gguf.GGUFWriter(fresh, "gpt2")
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.width)
    writer.add_feed_forward_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_head_count(spec.heads)
    writer.add_layer_norm_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[form]

    def add(theirs: str, *ours: str) -> None:
        part = np.concatenate([state.pop(one).numpy() for one in ours])
        if part.ndim == 1 or theirs == "position_embd.weight":
            writer.add_tensor(theirs, part)
        else:
            writer.add_tensor(theirs, quants.quantize(part, kind), raw_dtype=kind)

    add("token_embd.weight", "embedding.weight")
    add("position_embd.weight", "positions.weight")
    for end in ("weight", "bias"):
        add(f"output_norm.{end}", f"norm.{end}")
        for layer in range(spec.layers):
            ours, theirs = f"blocks.{layer}", f"blk.{layer}"
            add(f"{theirs}.attn_norm.{end}", f"{ours}.attention_norm.{end}")
            add(f"{theirs}.attn_qkv.{end}", *(f"{ours}.attention.{one}.{end}" for one in "qkv"))
            add(f"{theirs}.attn_output.{end}", f"{ours}.attention.out.{end}")
            add(f"{theirs}.ffn_norm.{end}", f"{ours}.mlp_norm.{end}")
            add(f"{theirs}.ffn_up.{end}", f"{ours}.mlp.up.{end}")
            add(f"{theirs}.ffn_down.{end}", f"{ours}.mlp.down.{end}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fresh.replace(target)
    return target
