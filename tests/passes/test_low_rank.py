"""Low rank: against the best that there is, by its bytes, and through a stored form."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

from gptcore.errors import InvalidInput, NumericalError
from gptcore.linears import stored_bytes
from gptcore.linears.low_rank import LowRankLinear
from gptcore.measure.memory import weight_bytes
from gptcore.passes.low_rank import (
    LowRank,
    break_even_rank,
    factors,
    rank_for,
    weights_of,
)
from gptcore.passes.prune import Prune
from gptcore.spec import SMOLLM2_135M, ModelSpec
from tests.passes.small import GPT2, LLAMA, SHAPES, UNTIED, applied, kl, logits, made, placed, text

every_shape = pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
SIZES = [(12, 8), (8, 12), (10, 10)]


def inputs(columns: int, tokens: int = 60, seed: int = 0) -> torch.Tensor:
    """Return inputs (tokens, C) of very different size that partly follow each other."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=random, dtype=torch.float64)
    return (x + x.roll(1, 1) / 2) * torch.logspace(-1, 1, columns, dtype=torch.float64)


def normal(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_whitened_outputs_are_the_best_of_that_rank(rows: int, columns: int, rank: int) -> None:
    """Against the singular values of the outputs themselves (Eckart and Young)."""
    x, weight = inputs(columns), normal(rows, columns)
    outer, inner = factors(weight, rank, x.T @ x / len(x))
    error = (x @ (weight.double() - outer @ inner).T).square().sum()
    best = torch.linalg.svdvals(x @ weight.double().T)[rank:].square().sum()
    # The damping of 1e-6 is all that lies between them.
    assert best <= error * (1 + 1e-9)
    assert error <= best * 1.001
    plain_outer, plain_inner = factors(weight, rank, None)
    worse = (x @ (weight.double() - plain_outer @ plain_inner).T).square().sum()
    assert worse > 1.3 * error


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_plain_weights_are_the_best_of_that_rank(rows: int, columns: int) -> None:
    weight = normal(rows, columns)
    outer, inner = factors(weight, 4, None)
    error = (weight.double() - outer @ inner).square().sum()
    best = torch.linalg.svdvals(weight.double())[4:].square().sum()
    assert error.item() == pytest.approx(best.item(), rel=1e-9)


@pytest.mark.parametrize("pivoted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_two_layers_compute_the_product(rows: int, columns: int, bias: bool, pivoted: bool) -> None:
    """In any order of outputs but the right one it would be off by the outputs themselves."""
    outer, inner = factors(normal(rows, columns), 5, None)
    shift = normal(1, rows, seed=4)[0] if bias else None
    layer = LowRankLinear.of(outer, inner, shift, torch.float32, pivoted=pivoted)
    x = normal(7, columns, seed=2).view(1, 7, columns)
    expected = F.linear(x, (outer @ inner).float(), shift)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert torch.allclose(layer.dense(), (outer @ inner).float(), atol=1e-5)
    weights = sum(one.weight.numel() for one in (layer.inner, layer.outer))
    assert weights == weights_of(rows, columns, 5, pivoted=pivoted)


@pytest.mark.parametrize("pivoted", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(576, 576), (1536, 576), (192, 576), (7, 5)])
def test_the_rank_for_a_share_is_the_largest_that_fits(
    rows: int, columns: int, pivoted: bool
) -> None:
    for share in (0.1, 0.25, 0.5, 0.8, 0.95):
        rank = rank_for(rows, columns, share * rows * columns, pivoted=pivoted)
        fits = weights_of(rows, columns, rank, pivoted=pivoted) <= share * rows * columns
        assert fits or rank == 1
        if rank < min(rows, columns):
            larger = weights_of(rows, columns, rank + 1, pivoted=pivoted)
            assert larger > share * rows * columns


@pytest.mark.parametrize("pivoted", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(576, 576), (1536, 576), (192, 576), (7, 5)])
def test_break_even_is_where_two_layers_take_as_much_as_one(
    rows: int, columns: int, pivoted: bool
) -> None:
    even = break_even_rank(rows, columns, pivoted=pivoted)
    assert weights_of(rows, columns, even, pivoted=pivoted) >= rows * columns
    assert weights_of(rows, columns, even - 1, pivoted=pivoted) < rows * columns


def test_break_even_of_smollm2_is_known() -> None:
    assert break_even_rank(576, 576, pivoted=False) == 288
    assert break_even_rank(1536, 576, pivoted=False) == 419
    assert break_even_rank(576, 576, pivoted=True) == 576
    one = LowRank(rank=300, pivoted=False)
    assert one.caution(SMOLLM2_135M, placed()) == (
        "Rank 300 saves nothing for q, k, v, out, which stay as they are: below 144 it would for "
        "every layer."
    )
    assert LowRank(rank=100, pivoted=False).caution(SMOLLM2_135M, placed()) is None
    assert LowRank().caution(SMOLLM2_135M, placed()) is None


@every_shape
@pytest.mark.parametrize("pivoted", [True, False])
def test_a_model_has_the_share_of_weights_that_was_asked_for(
    spec: ModelSpec, pivoted: bool
) -> None:
    one = LowRank(share=0.6, pivoted=pivoted)
    model, coverage = applied(one, made(spec), text(spec))
    before = spec.weights_bytes("fp32")
    predicted = one.weights_bytes_after(spec, placed(), before)
    assert predicted == weight_bytes(model)[0] == stored_bytes(model)
    assert coverage.converted_weights == spec.matmul_parameters - 199 * 48
    assert 0.5 < coverage.effective_bits / 32 < 0.63  # order of outputs and biases on top
    assert logits(model, text(spec)[:2]).isfinite().all()


@every_shape
def test_whitened_beats_plain_and_pivoted_beats_both(spec: ModelSpec) -> None:
    """On another text; pivoted has a higher rank for the same weights."""
    exact, other = made(spec), text(spec, seed=8)[:8]

    def damage(**fields: object) -> float:
        one = LowRank(share=0.7, **fields)
        return kl(exact, applied(one, made(spec), text(spec))[0], other)

    whitened = damage(pivoted=False)
    assert damage() < 0.9 * whitened
    assert whitened < 0.95 * damage(pivoted=False, method="plain")


@every_shape
def test_keeping_all_changes_no_logit(spec: ModelSpec) -> None:
    exact, ids = made(spec), text(spec)[:2]
    one = LowRank(share=1.0)
    model, coverage = applied(one, made(spec))
    assert logits(model, ids).equal(logits(exact, ids))
    assert coverage.ratio == 0.0
    assert ("blocks.0.mlp.up", "all of its weights are to be kept") in coverage.skipped
    assert not one.needs_calibration


def test_a_rank_above_break_even_leaves_the_layer_with_the_reason() -> None:
    model, coverage = applied(LowRank(rank=30, pivoted=False, method="plain"), made(LLAMA))
    kinds = {name: type(one).__name__ for name, one in model.blocks[0].named_modules()}
    assert kinds["attention.q"] == "Linear"
    assert kinds["mlp.up"] == "LowRankLinear"
    reason = "rank 30 is not below 24, where two layers take as much as one"
    assert ("blocks.0.attention.q", reason) in coverage.skipped
    assert 0 < coverage.ratio < 1


def test_the_same_text_gives_the_same_weights() -> None:
    one, two = (applied(LowRank(), made(LLAMA), text(LLAMA))[0] for _ in range(2))
    assert one.blocks[2].mlp.up.inner.weight.equal(two.blocks[2].mlp.up.inner.weight)
    assert one.blocks[2].mlp.up.order.equal(two.blocks[2].mlp.up.order)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", [LLAMA, UNTIED], ids=["llama", "untied"])
def test_no_tensor_that_came_in_is_written_to(spec: ModelSpec, precision: str) -> None:
    model = made(spec, precision)
    given = dict(model.named_parameters())
    copies = {name: tensor.clone() for name, tensor in given.items()}
    model, _ = applied(LowRank(), model, text(spec))
    assert all(tensor.equal(copies[name]) for name, tensor in given.items())
    assert {p.dtype for p in model.parameters()} == {model.norm.weight.dtype}


@pytest.mark.parametrize("pivoted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_stored_layer_comes_back_bit_for_bit(pivoted: bool, bias: bool) -> None:
    outer, inner = factors(normal(12, 9), 4, None)
    shift = normal(1, 12)[0] if bias else None
    layer = LowRankLinear.of(outer, inner, shift, torch.float32, pivoted=pivoted)
    settings = json.loads(json.dumps(layer.settings()))
    back = LowRankLinear.restored(layer.stored(), settings)
    back.load_state_dict(layer.state_dict(), assign=True)
    x = normal(3, 9)
    assert back(x).equal(layer(x))
    assert back.settings() == layer.settings()


def test_the_two_layers_can_be_pruned_after() -> None:
    model, _ = applied(LowRank(share=0.8), made(GPT2), text(GPT2))
    model, coverage = applied(Prune(), model, text(GPT2))
    assert type(model.blocks[0].mlp.up.inner).__name__ == "SparseLinear"
    assert coverage.converted_weights == coverage.total_weights - 199 * 48
    assert [name for name, _ in coverage.skipped] == ["head"]


@pytest.mark.parametrize("method", ["whitened", "plain"])
def test_nan_and_a_missing_text_are_refused_in_a_sentence(method: str) -> None:
    model = made(LLAMA)
    model.blocks[0].mlp.up.weight[3, 5] = float("nan")
    with pytest.raises(NumericalError, match=r"^blocks\.0\.mlp\.up holds NaN"):
        applied(LowRank(method=method), model, text(LLAMA))
    if method == "whitened":
        with pytest.raises(InvalidInput, match="choose a calibration text"):
            applied(LowRank(), made(LLAMA))


def test_inputs_that_fill_few_directions_are_damped_until_they_can_be_inverted() -> None:
    """As many tokens as a short text gives a wide layer, summed up in fp32."""
    torch.manual_seed(0)
    x = torch.randn(40, 256) * torch.logspace(0, 4, 256)
    hessian = x.T @ x / len(x)
    hessian -= 3e-6 * hessian.diagonal().mean() * torch.eye(256)  # what rounding can do
    assert torch.linalg.cholesky_ex(hessian.double()).info.item() > 0
    outer, inner = factors(torch.randn(64, 256), 16, hessian)
    assert outer.isfinite().all()
    assert inner.isfinite().all()
    with pytest.raises(NumericalError, match="cannot be inverted"):
        factors(torch.randn(64, 256), 16, torch.full((256, 256), math.nan))
