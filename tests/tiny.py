"""A tiny model on disk, as a person would have one: made in a second, read by the real loader."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = [
    "Once upon a time there was a small fox who lived by the river and read books.",
    "The fox said: how do you do, and the river said nothing at all.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_checkpoint(
    folder: Path, *, context: int = 512, scale: float = 0.5, layers: int = 2
) -> Path:
    """Write a Llama-shaped Hugging Face directory with a tokenizer and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"})
    )
    vocabulary, width, hidden, kv = 320, 32, 64, 16
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * scale

    tensors = {"model.embed_tokens.weight": normal(vocabulary, width)}
    tensors["model.norm.weight"] = torch.ones(width)
    for layer in range(layers):
        name = f"model.layers.{layer}."
        tensors[name + "input_layernorm.weight"] = torch.ones(width)
        tensors[name + "post_attention_layernorm.weight"] = torch.ones(width)
        tensors[name + "self_attn.q_proj.weight"] = normal(width, width)
        tensors[name + "self_attn.k_proj.weight"] = normal(kv, width)
        tensors[name + "self_attn.v_proj.weight"] = normal(kv, width)
        tensors[name + "self_attn.o_proj.weight"] = normal(width, width)
        tensors[name + "mlp.gate_proj.weight"] = normal(hidden, width)
        tensors[name + "mlp.up_proj.weight"] = normal(hidden, width)
        tensors[name + "mlp.down_proj.weight"] = normal(width, hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
