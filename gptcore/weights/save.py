"""A model as a Hugging Face directory: config.json and model.safetensors, as the families have it.

The inverse of ``huggingface``: what is written here, ``describe`` and ``build`` read, and so does
transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import InvalidSpec
from gptcore.spec import ModelSpec
from gptcore.weights.huggingface import TORCH_DTYPES, names_of, spec_of

if TYPE_CHECKING:
    import torch

    from gptcore.model import GPT

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def config_of(
    spec: ModelSpec, *, end_id: int | None = None, precision: str = "fp32"
) -> dict[str, Any]:
    """Return the config.json of a shape.

    Args:
        spec: of any family.
        end_id: the end of text, if the tokenizer has one.
        precision: of the weights beside it.

    Raises:
        InvalidSpec: the family's configs cannot say this shape.
    """
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "vocab_size": spec.vocabulary,
        "tie_word_embeddings": spec.tied_head,
        "torch_dtype": TORCH_DTYPES[precision],
        "bos_token_id": end_id,
        "eos_token_id": end_id,
    }
    if spec.family == "gpt2":
        config |= {
            "n_layer": spec.layers,
            "n_head": spec.heads,
            "n_embd": spec.width,
            "n_inner": spec.hidden,
            "n_positions": spec.context,
            "layer_norm_epsilon": spec.norm_eps,
            "activation_function": "gelu_new" if spec.gelu == "tanh" else "gelu",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    else:
        config |= {
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "num_key_value_heads": spec.kv_heads,
            "head_dim": spec.head_width,
            "hidden_size": spec.width,
            "intermediate_size": spec.hidden,
            "max_position_embeddings": spec.context,
            "rms_norm_eps": spec.norm_eps,
            "rope_theta": spec.rope_theta,
            "hidden_act": "silu",
        }
        if (scaling := spec.rope_scaling) is not None:
            config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            }
    if spec_of(config) != spec.model_copy(update={"note": ""}):
        raise InvalidSpec(f"A config of family {spec.family} cannot say this shape: {spec}.")
    return config


def save(model: GPT, directory: Path, *, end_id: int | None = None) -> None:
    """Write a model of plain float weights into ``directory``; its precision is kept.

    Raises:
        InvalidSpec: as ``config_of``.
        OSError: the disk is full or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    precision = next(name for name, one in TORCH_DTYPES.items() if one == dtype)
    config = config_of(model.spec, end_id=end_id, precision=precision)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    try:
        save_file(
            checkpoint_tensors(model), directory / "model.safetensors", metadata={"format": "pt"}
        )
    except SafetensorError as error:
        raise OSError(f"the weights could not be written: {error}") from None


def checkpoint_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """Return the model's weights under the family's names and in its layout, on the CPU."""
    import torch

    own = {name: one.detach().cpu() for name, one in model.named_parameters()}
    parts: dict[str, list[torch.Tensor]] = {}
    for ours, theirs, _ in names_of(model.spec):
        parts.setdefault(theirs, []).append(own[ours])
    found = {}
    for theirs, tensors in parts.items():
        tensor = torch.cat(tensors)
        matrix = tensor.ndim == 2 and theirs.startswith("h.")
        if model.spec.family == "gpt2" and matrix:
            tensor = tensor.T  # Conv1D keeps (in, out)
        found[theirs] = tensor.contiguous()
    return found
