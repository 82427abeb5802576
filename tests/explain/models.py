"""Tiny models whose heads really differ, one of each kind of attention."""

import torch

from gptcore import weights
from gptcore.device import Placement
from gptcore.engine import Engine
from gptcore.model import GPT
from gptcore.spec import ModelSpec, gpt
from gptcore.tokenizer import byte_tokenizer

GPT2_SHAPE = gpt(2, 32, 4, context=128, vocabulary=300)
LLAMA_SHAPE = ModelSpec(
    family="llama",
    layers=3,
    heads=4,
    kv_heads=2,
    head_width=8,
    width=32,
    hidden=48,
    context=128,
    vocabulary=300,
    norm="rmsnorm",
    position="rotary",
    mlp="swiglu",
    bias=False,
    qkv_bias=False,
)
QWEN3_SHAPE = LLAMA_SHAPE.model_copy(update={"family": "qwen3", "head_width": 16, "qk_norm": True})
SHAPES = {"gpt2": GPT2_SHAPE, "llama": LLAMA_SHAPE, "qwen3": QWEN3_SHAPE}
TEXT = "Once upon a time there was a fox."
IDS = list(TEXT.encode())


def model_of(spec: ModelSpec = LLAMA_SHAPE, seed: int = 1, scale: float = 10.0) -> GPT:
    """Return a model whose random weights are large enough that attention is far from even."""
    model = weights.build_random(spec, Placement(), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


def engine_of(spec: ModelSpec = LLAMA_SHAPE) -> Engine:
    return Engine(model_of(spec), byte_tokenizer(spec.vocabulary))
