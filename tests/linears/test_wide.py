"""Products in fp32 for 16-bit layers: the same numbers, for as long as asked."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gptcore.linears import quantized
from gptcore.linears.wide import wide_products
from tests.passes.small import GPT2, made


@pytest.mark.parametrize("flags", [set(), {"avx512_bf16"}])
def test_products_are_rounded_once_where_bf16_is_emulated(
    flags: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "cpu_flags", lambda: frozenset(flags))
    layer = nn.Linear(48, 20).bfloat16().requires_grad_(False)
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with wide_products(layer):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    # fp32 leaves the rounding to bf16 alone, half of 2⁻⁷ of the value.
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all() or flags
    assert (got.double() - exact).norm() < 0.01 * exact.norm()


def test_layers_are_as_before_afterwards() -> None:
    model, ids = made(GPT2, "bf16"), torch.arange(20)[None]
    with torch.inference_mode():
        before = model(ids)
        with pytest.raises(KeyError), wide_products(model):
            raise KeyError
        assert torch.equal(model(ids), before)
    assert not [one for one in model.modules() if "forward" in vars(one)]


def test_a_layer_that_was_replaced_is_let_go() -> None:
    model = made(GPT2, "bf16")
    gone = weakref.ref(model.head)
    gc.disable()
    try:
        with wide_products(model):
            model.head = nn.Identity()
            assert gone() is None
    finally:
        gc.enable()
