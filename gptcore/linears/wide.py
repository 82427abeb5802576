"""Let 16-bit layers compute in fp32 while a text runs through them, where that is faster.

Most CPUs have no instructions for bf16, and multiply several times slower in it than in fp32: a
prompt would wait, and a calibration text of many tokens take minutes. The sums are fp32's own, the
results are rounded to the layer's type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import proxy, ref

from torch import Tensor, nn
from torch.nn import functional as F

from gptcore.linears.quantized import PIECE_WEIGHTS, float_type


@contextmanager
def wide_products(model: nn.Module) -> Iterator[None]:
    """Give the model's linear layers another forward function while a ``with`` block lasts.

    Source of the measure: fp32 was five times faster for 512 tokens on a CPU with AVX-512 alone.
    """
    # A layer that is replaced meanwhile must be let go, so nothing here holds one.
    layers = [ref(one) for one in model.modules() if isinstance(one, nn.Linear)]
    for layer in layers:
        _set(layer())
    try:
        yield
    finally:
        for layer in layers:
            if (one := layer()) is not None:
                del one.forward


def _set(layer: nn.Linear | None) -> None:
    if layer is not None:
        layer.forward = partial(_product, proxy(layer))  # type: ignore[arg-type,method-assign]


def _product(linear: nn.Linear, x: Tensor) -> Tensor:
    """Multiply some rows at a time, so that no layer is there wide as a whole."""
    dtype = float_type(x)
    if dtype == x.dtype:
        return F.linear(x, linear.weight, linear.bias)
    rows = max(1, PIECE_WEIGHTS // linear.in_features)
    wide = x.to(dtype)
    y = x.new_empty(*x.shape[:-1], linear.out_features)
    for begin in range(0, linear.out_features, rows):
        some = slice(begin, begin + rows)
        bias = None if linear.bias is None else linear.bias[some].to(dtype)
        y[..., some] = F.linear(wide, linear.weight[some].to(dtype), bias)
    return y
