"""Small random models of both shapes, and texts for them: what the tests of passes share."""

from __future__ import annotations

import torch
from torch import nn

from gptcore.device import Placement
from gptcore.model import GPT
from gptcore.passes.base import Coverage, Pass, PassContext
from gptcore.passes.calibrate import text_hash
from gptcore.spec import ModelSpec, Precision, gpt
from gptcore.weights import build_random

LLAMA = ModelSpec(
    family="llama",
    layers=3,
    heads=6,
    kv_heads=2,
    head_width=8,
    width=48,
    hidden=96,
    context=128,
    vocabulary=199,
    norm="rmsnorm",
    position="rotary",
    mlp="swiglu",
    bias=False,
    qkv_bias=False,
)
UNTIED = LLAMA.model_copy(update={"tied_head": False, "qkv_bias": True, "bias": True})
GPT2 = gpt(3, 48, 4, context=64, vocabulary=199)
SHAPES = {"llama": LLAMA, "untied": UNTIED, "gpt2": GPT2}


def placed(precision: Precision = "fp32") -> Placement:
    return Placement(precision=precision, threads=1)


def made(spec: ModelSpec, precision: Precision = "fp32", seed: int = 0, std: float = 0.15) -> GPT:
    """Return a random model that does something: its biases and norms are random too."""
    model = build_random(spec, placed(precision), seed)
    random = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=random) * 0.1
            parameter.add_(noise.to(parameter.dtype))
        else:
            parameter.mul_(std / 0.02)
    return model


def with_outliers(model: GPT) -> GPT:
    """Return the model with some channels of its norms twenty times larger, as real ones have."""
    for block in model.blocks:
        for norm in (block.attention_norm, block.mlp_norm):
            weight = norm.weight.clone()
            weight[[2, 17]] *= 20
            norm.weight = nn.Parameter(weight, requires_grad=False)
    return model


def text(spec: ModelSpec, sequences: int = 32, tokens: int = 48, seed: int = 3) -> torch.Tensor:
    """Return (N, T) token ids that have some order, so that inputs of layers are correlated."""
    random = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 7, (sequences, tokens), generator=random)
    return (steps.cumsum(1) * 5) % spec.vocabulary


def applied(
    one: Pass, model: GPT, ids: torch.Tensor | None = None, seed: int = 0
) -> tuple[GPT, Coverage]:
    half = model.norm.weight.dtype == torch.bfloat16
    context = PassContext(
        placement=placed("bf16" if half else "fp32"),
        seed=seed,
        calibration_ids=ids,
        calibration_hash="" if ids is None else text_hash(ids),
    )
    return one.apply(model, context), context.coverage[one.name]


def logits(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).float()


def kl(model: GPT, other: GPT, ids: torch.Tensor) -> float:
    """Return the mean KL divergence of the next token's distribution, in nats."""
    left, right = logits(model, ids).log_softmax(-1), logits(other, ids).log_softmax(-1)
    return (left.exp() * (left - right)).sum(-1).mean().item()
