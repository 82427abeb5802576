"""A model as one float matrix for every layer, whatever passes made of it.

Packed numbers become the floats that they stand for, in fp32, in which each of them is exact; the
two layers of a low-rank one become their product. A head that shared the embedding's weights and
no longer has the same ones becomes a head of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptcore.model import GPT
    from gptcore.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Plain:
    """The weights of a model as float tensors under our names."""

    spec: ModelSpec
    tensors: dict[str, Tensor]
    """Of one type; a tied head is left out."""
    notes: tuple[str, ...]
    """What was changed, in sentences."""

    def model(self) -> GPT:
        """Return a model that computes with these tensors, without a copy."""
        from gptcore.weights import empty

        model = empty(self.spec)
        state = dict(self.tensors)
        if self.spec.tied_head:
            state["head.weight"] = state["embedding.weight"]
        model.load_state_dict(state, strict=True, assign=True)
        if self.spec.tied_head:
            model.head.weight = model.embedding.weight
        return model.requires_grad_(False).eval()


def plain_of(model: GPT, progress: Callable[[float], None] = lambda share: None) -> Plain:
    """Return a model's weights as float tensors on the CPU; the model is not changed.

    They keep the model's own type if nothing had to be computed, else all are fp32.
    """
    import torch
    from torch import nn

    from gptcore.weights import empty

    weights: dict[str, Tensor] = {}
    made: Counter[str] = Counter()
    wanted = [
        name
        for name, module in empty(model.spec).named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    with torch.no_grad():
        for done, name in enumerate(wanted):
            progress(done / len(wanted))
            module = model.get_submodule(name)
            weight, bias, how = dense_of(module)
            made.update([how] if how else [])
            weights[f"{name}.weight"] = weight.detach().cpu()
            if bias is not None:
                weights[f"{name}.bias"] = bias.detach().cpu()
        for name, parameter in model.named_parameters():
            if "norm" in name and name not in weights:
                weights[name] = parameter.detach().cpu()
        spec, notes = model.spec, [f"{count} {how}." for how, count in made.items()]
        if spec.tied_head and _differ(weights["head.weight"], weights["embedding.weight"]):
            spec = spec.model_copy(update={"tied_head": False})
            notes.append("The head is written beside the embedding, whose numbers it has no more.")
        elif spec.tied_head:
            del weights["head.weight"]
        if made:
            weights = {name: one.float() for name, one in weights.items()}
        weights = {name: one.contiguous() for name, one in weights.items()}
    progress(1.0)
    return Plain(spec, weights, tuple(notes))


def dense_of(module: nn.Module) -> tuple[Tensor, Tensor | None, str | None]:
    """Return weight and bias of a layer or an embedding, and what was done to have them."""
    from torch import nn

    from gptcore.kernels.linear import NativeLinear
    from gptcore.linears.clustered import PackedClusteredLinear
    from gptcore.linears.embedding import PackedEmbedding
    from gptcore.linears.fp8 import Fp8Linear
    from gptcore.linears.low_rank import LowRankLinear
    from gptcore.linears.quantized import (
        Int8Linear,
        Int8MatmulLinear,
        PackedLinear,
        StaticInt8Linear,
    )

    float_layers = "layers of packed numbers were made float"
    if isinstance(module, nn.Linear):
        return module.weight, module.bias, None
    if isinstance(module, nn.Embedding):
        return module.weight, None, None
    if isinstance(module, LowRankLinear):
        return module.dense(), module.dense_bias(), "pairs of low-rank layers were multiplied out"
    if isinstance(module, PackedEmbedding):
        return module.numbers().dequantized(), None, "embedding of packed numbers was made float"
    if isinstance(module, PackedClusteredLinear):
        return module.dense(), module.bias, float_layers
    assert isinstance(module, PackedLinear | Fp8Linear), type(module)
    eight = Int8Linear | Int8MatmulLinear | StaticInt8Linear | NativeLinear | Fp8Linear
    if isinstance(module, eight):
        return (
            module.dequantized(),
            module.bias,
            f"{float_layers}, and their activations are no longer rounded to 8 bits",
        )
    return module.dequantized(), module.bias, float_layers


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.data_ptr() == other.data_ptr():
        return False
    return not one.float().equal(other.float())
