"""8-bit floating point: the layer by the operation's form for CPUs, and where the pass may run."""

from __future__ import annotations

import pytest
import torch

from gptcore.device import Placement
from gptcore.errors import NumericalError
from gptcore.linears import Stored, resident_bytes, stored_bytes
from gptcore.linears.fp8 import LARGEST, Fp8Linear, rounded
from gptcore.measure.memory import weight_bytes
from gptcore.passes import fp8
from gptcore.passes.fp8 import Fp8
from gptcore.spec import GPT2, gpt
from tests.passes.small import applied, kl, made, text

SPEC = gpt(2, 64, 4, context=64, vocabulary=199)
"""Rows of the head are no multiple of 16."""


def weight(rows: int = 48, columns: int = 64) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=random) * torch.logspace(-3, 1, rows)[:, None]


def test_weights_are_off_by_a_sixteenth_at_most() -> None:
    """Three bits behind the leading one; below the least normal number steps are 2⁻⁹ · scale."""
    given = weight()
    codes, scale = rounded(given)
    gap = (codes.float() * scale[:, None] - given).abs()
    assert (gap <= torch.maximum(given.abs() * 2**-4, 2**-10 * scale[:, None]) * 1.001).all()
    assert codes.float().abs().amax(1).min() == LARGEST
    assert rounded(torch.zeros(2, 16))[0].float().abs().max() == 0


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_the_layer_is_a_float_product_of_its_own_numbers(tokens: int) -> None:
    """Activations are rounded to a sixteenth, which leaves about 2.5 % of the output."""
    given = weight()
    bias = torch.randn(48, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer = Fp8Linear(*rounded(given), bias)
    x = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    y = layer(x)
    want = x.float() @ layer.dequantized().T + bias.float()
    assert y.dtype == torch.bfloat16
    assert y.shape == (2, tokens, 48)
    assert (y.float() - want).norm() < 0.05 * want.norm()


def test_a_layer_from_a_file_computes_the_same() -> None:
    layer = Fp8Linear(*rounded(weight()), None)
    assert isinstance(layer, Stored)
    again = Fp8Linear.restored(layer.stored(), layer.settings())
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(layer(x), again(x))
    assert stored_bytes(layer) == resident_bytes(layer) == 48 * (64 + 4)


def test_a_model_stays_close_and_says_what_it_skipped() -> None:
    exact = made(SPEC, "bf16")
    before = weight_bytes(exact)[0]
    model, coverage = applied(Fp8(), made(SPEC, "bf16"))
    assert coverage.skipped == (("head", "199 × 64 are no multiples of 16"),)
    assert weight_bytes(model)[0] == Fp8().weights_bytes_after(
        SPEC, Placement(precision="bf16"), before
    )
    assert 0 < kl(exact, model, text(SPEC)[:2]) < 0.1


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = made(SPEC, "bf16")
    model.blocks[1].mlp.up.weight[3, 5] = float("inf")
    with pytest.raises(NumericalError, match=r"^blocks\.1\.mlp\.up holds NaN"):
        applied(Fp8(), model)


@pytest.mark.parametrize(
    ("device", "precision", "capability", "sentence"),
    [
        ("cpu", "bf16", None, "only NVIDIA GPUs from Ada on have it, not cpu; choose int8."),
        ("mps", "bf16", None, "only NVIDIA GPUs from Ada on have it, not mps; choose int8."),
        ("cuda:0", "bf16", None, "what cuda:0 can do is unknown here; choose int8."),
        (
            "cuda:0",
            "bf16",
            (8, 0),
            "cuda:0 has no 8-bit floating point (compute capability 8.0, 8.9 is needed); choose "
            "int8.",
        ),
        (
            "cuda:0",
            "fp32",
            (9, 0),
            "its operation puts out bf16, not fp32; choose bf16 under it.",
        ),
        ("cuda:0", "bf16", (9, 0), None),
    ],
)
def test_only_gpus_that_have_it_run_it(
    device: str,
    precision: str,
    capability: tuple[int, int] | None,
    sentence: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fp8, "compute_capability", lambda device: capability)
    placement = Placement.model_validate({"device": device, "precision": precision})
    assert Fp8().blocked_by(GPT2["gpt2"], placement) == sentence
