"""Tiny random checkpoints of every supported family, made and saved by ``transformers``."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 128, "vocab_size": 211}
LLAMA = {
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_size": 48,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "vocab_size": 211,
}
SHARD_BYTES = 30_000


@dataclass(frozen=True)
class Case:
    """A checkpoint's config, and whether it is saved in shards."""

    family: str
    fields: dict[str, Any] = field(hash=False)
    shards: bool = False

    @functools.cached_property
    def model(self) -> transformers.PreTrainedModel:
        """The reference, the same at every call; every weight is random, norms and biases too."""
        config = transformers.AutoConfig.for_model(
            self.family, **self.fields, eos_token_id=None, bos_token_id=None
        )
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # so that a forgotten bias or norm is seen
                    parameter.add_(torch.randn(parameter.shape, generator=random) * 0.3)
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.25)
        return model.eval()

    def save(self, folder: Path) -> Path:
        """Write the checkpoint as ``transformers`` does."""
        self.model.save_pretrained(folder, max_shard_size=SHARD_BYTES if self.shards else "1GB")
        return folder


CASES = {
    "gpt2": Case("gpt2", GPT2),
    "gpt2-untied-erf-sharded": Case(
        "gpt2", GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu"}, shards=True
    ),
    "gpt2-own-hidden-width": Case("gpt2", GPT2 | {"n_inner": 72, "layer_norm_epsilon": 1e-3}),
    "llama-untied": Case("llama", LLAMA | {"tie_word_embeddings": False}),
    "llama-tied-sharded": Case("llama", LLAMA | {"tie_word_embeddings": True}, shards=True),
    "llama3-rope": Case("llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama-all-heads-own-width": Case(
        "llama", LLAMA | {"num_key_value_heads": 6, "head_dim": 12, "rms_norm_eps": 1e-3}
    ),
    "qwen2-biases": Case("qwen2", LLAMA),
    "qwen2-tied-one-kv-head": Case(
        "qwen2", LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True}
    ),
    "qwen3-norms": Case("qwen3", LLAMA | {"head_dim": 16}),
    "qwen3-tied-theta-sharded": Case(
        "qwen3",
        LLAMA
        | {
            "head_dim": 8,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        shards=True,
    ),
}
