"""Models for the kernels' tests: every family, sizes that fill no register, every format."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gptcore.kernels.linear import NativeLinear
from gptcore.linears.grid import Grid
from gptcore.model import GPT
from gptcore.spec import ModelSpec, RopeScaling

TOKENS = 256

_LLAMA = ModelSpec(
    family="llama",
    layers=2,
    heads=6,
    kv_heads=2,
    head_width=18,
    width=44,
    hidden=70,
    context=TOKENS,
    vocabulary=211,
    norm="rmsnorm",
    position="rotary",
    mlp="swiglu",
    bias=False,
    qkv_bias=False,
    rope_scaling=RopeScaling(original_context=64),
    tied_head=False,
)
_GPT2 = ModelSpec(
    family="gpt2",
    layers=2,
    heads=3,
    kv_heads=3,
    head_width=20,
    width=60,
    hidden=132,
    context=TOKENS,
    vocabulary=211,
)
SPECS = {
    "llama, odd sizes": _LLAMA,
    "llama": _LLAMA.model_copy(
        update={"heads": 4, "kv_heads": 1, "head_width": 64, "width": 192, "hidden": 320}
    ),
    "gpt2, odd sizes": _GPT2,
    "gpt2, erf": _GPT2.model_copy(
        update={"gelu": "erf", "heads": 5, "kv_heads": 5, "head_width": 7, "width": 35}
    ),
    "gpt2": _GPT2.model_copy(update={"heads": 4, "kv_heads": 4, "head_width": 32}).model_copy(
        update={"width": 128, "hidden": 512}
    ),
    "qwen2": _LLAMA.model_copy(
        update={"family": "qwen2", "qkv_bias": True, "tied_head": True, "rope_scaling": None}
        | {"heads": 14, "kv_heads": 2, "head_width": 16, "width": 96, "hidden": 160}
    ),
    "qwen3": _LLAMA.model_copy(
        update={"family": "qwen3", "qk_norm": True, "rope_scaling": None}
        | {"heads": 5, "kv_heads": 5, "head_width": 24, "width": 64, "hidden": 128}
    ),
}
COARSE = "int8, rows, 8-bit activations"
FORMATS: dict[str, Grid | torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8, rows": Grid(8, symmetric=True, dtype=torch.float32),
    COARSE: Grid(8, symmetric=True, dtype=torch.float32),
    "int8, groups of 64": Grid(8, 64, symmetric=True),
    "int8, groups of 32": Grid(8, 32, symmetric=True),
    "int4, groups of 64": Grid(4, 64),
    "int4, groups of 32": Grid(4, 32),
    "int3, groups of 32": Grid(3, 32),
}


def suits(spec: ModelSpec, form: Grid | torch.dtype) -> bool:
    """Return whether the groups of a format divide all columns of a shape."""
    columns = (spec.width, spec.q_width, spec.hidden)
    return not isinstance(form, Grid) or not any(one % (form.group or 1) for one in columns)


CASES = [(spec, form) for spec in SPECS for form in FORMATS if suits(SPECS[spec], FORMATS[form])]


def random_model(spec: ModelSpec, seed: int = 0) -> GPT:
    """Return a model of which every number matters: norms and biases are random too."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)  # which q, k and v draw their biases from
        model = GPT(spec).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.ndim == 1:
            parameter.add_(noise * 0.2)
        else:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
    model.embedding.weight.mul_(spec.width**0.5)
    return model


def native(model: GPT, form: str) -> GPT:
    """Return a copy whose linear layers are of a format."""
    made, grid = copy.deepcopy(model), FORMATS[form]
    if isinstance(grid, torch.dtype):
        return made.to(grid)
    for name, layer in tuple(made.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            packed = NativeLinear.of(grid.quantize(layer.weight), layer.bias)
            packed.activation_bits = 8 if form == COARSE else 16
            setattr(made.get_submodule(parent), child, packed)
    return made


def plain(model: GPT) -> GPT:
    """Return what a native model stands for: float32 layers of the very same weights."""
    made = copy.deepcopy(model)
    for name, layer in tuple(made.named_modules()):
        if isinstance(layer, NativeLinear):
            parent, _, child = name.rpartition(".")
            float_layer = nn.Linear(layer.columns, layer.rows, bias=layer.bias is not None)
            float_layer.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
            if layer.bias is not None:
                float_layer.bias = nn.Parameter(layer.bias.clone(), requires_grad=False)
            setattr(made.get_submodule(parent), child, float_layer)
    return made.float()


def some_ids(spec: ModelSpec, count: int = TOKENS) -> list[int]:
    """Return random token ids."""
    random = torch.Generator().manual_seed(5)
    return torch.randint(0, spec.vocabulary, (count,), generator=random).tolist()


def full_logits(model: GPT, ids: list[int]) -> Tensor:
    """Return what torch computes in one pass without a cache: (T, V) float32."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids]))[0]
        return logits.float()
