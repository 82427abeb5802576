"""Pruning: against the least squares optimum, by what it leaves, and what it says of itself."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from gptcore.device import Placement
from gptcore.errors import InvalidInput, NumericalError
from gptcore.linears import resident_bytes, stored_bytes
from gptcore.linears.sparse import SparseLinear
from gptcore.passes.base import PassContext
from gptcore.passes.calibrate import inverse_factor
from gptcore.passes.prune import Prune, kept, sparsegpt
from gptcore.spec import GPT2 as GPT2_SHAPES
from gptcore.spec import ModelSpec
from tests.passes.small import GPT2, LLAMA, SHAPES, UNTIED, applied, kl, logits, made, placed, text

every_shape = pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
every_method = pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])


def correlated(columns: int, seed: int = 0) -> torch.Tensor:
    """Return the mean of x·xᵀ of inputs that partly follow each other and differ in size."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(4 * columns, columns, generator=random)
    mix = (mix + mix.roll(1, 1)) * torch.logspace(-0.5, 0.5, columns)
    return mix.T @ mix / (4 * columns)


def normal(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def loss(weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each row's output, (R,)."""
    gap = (weight - pruned).double()
    return ((gap @ hessian.double()) * gap).sum(1)


def optimum(row: torch.Tensor, there: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return the least squares row that is zero outside ``there``."""
    exact, best = hessian.double(), torch.zeros_like(row, dtype=torch.float64)
    best[there] = torch.linalg.solve(exact[there][:, there], exact[there] @ row.double())
    return best


def column_by_column(
    weight: torch.Tensor, gone: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """Return SparseGPT's answer for given zeros by solving for all later columns at every step."""
    exact, first = hessian.double(), weight.double()
    now = first.clone()
    for i in range(weight.shape[1]):
        for row, zero in enumerate(gone[:, i].tolist()):
            if zero:
                now[row, i] = 0.0
                fixed = (now[row] - first[row])[: i + 1]
                right = exact[i + 1 :]
                later = torch.linalg.solve(right[:, i + 1 :], -right[:, : i + 1] @ fixed)
                now[row, i + 1 :] = first[row, i + 1 :] + later
    return now


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("columns", [4, 12, 136])
def test_sparsegpt_is_least_squares_for_all_later_columns_at_every_step(
    columns: int, group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """136 columns are two blocks, so what is put off between them is in it too."""
    hessian, weight = correlated(columns), normal(2, columns)
    given = weight.clone()
    damped = hessian + 1e-3 * hessian.diagonal().mean() * torch.eye(columns)
    pruned = sparsegpt(weight, inverse_factor(hessian, 1e-3), 0.5, group)
    expected = column_by_column(weight, pruned == 0, damped)
    assert torch.allclose(pruned.double(), expected, rtol=1e-3, atol=1e-3)
    assert (pruned == 0).float().mean() == 0.5
    assert weight.equal(given)


def test_a_single_row_is_not_written_to() -> None:
    """Its transpose is the same memory in another order."""
    weight = normal(1, 8)
    given = weight.clone()
    sparsegpt(weight, inverse_factor(correlated(8), 1e-2), 0.5, None)
    assert weight.equal(given)


def test_sparsegpt_finds_a_pattern_near_the_best_of_all() -> None:
    """Every pattern of 3 zeros in 6 columns is tried for each row."""
    columns = 6
    patterns = [
        torch.tensor([i in chosen for i in range(columns)])
        for chosen in itertools.combinations(range(columns), 3)
    ]
    ours = best = plain = 0.0
    for seed in range(10):
        hessian, weight = correlated(columns, seed), normal(1, columns, seed)
        every = [
            loss(weight, optimum(weight[0], there, hessian)[None], hessian).item()
            for there in patterns
        ]
        best += min(every)
        ours += loss(weight, sparsegpt(weight, inverse_factor(hessian, 1e-4), 0.5, None), hessian)
        plain += loss(weight, kept(weight, weight.abs(), 0.5, columns), hessian)
    assert best < ours < 2 * best
    assert plain > 2 * best


@every_shape
@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_every_projection_loses_its_share(spec: ModelSpec, method: str, pattern: str) -> None:
    model, ids = made(spec), text(spec)
    names = [name for name, _ in model.linears()]
    model, coverage = applied(Prune(method=method, pattern=pattern), model, ids)
    total = zeros = 0
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        total += layer.weight.numel()
        zeros += (layer.weight == 0).sum().item()
        if pattern == "2:4":
            assert ((layer.weight == 0).view(-1, 4).sum(1) == 2).all()
        if method == "wanda":
            assert ((layer.weight == 0).float().mean(1) == 0.5).all()
    assert zeros == total / 2
    assert coverage.converted_weights == total
    assert coverage.total_weights == spec.matmul_parameters
    assert [name for name, _ in coverage.skipped] == ["head"]
    assert logits(model, ids[:2]).isfinite().all()


@every_shape
def test_sparsegpt_hurts_the_text_to_come_least(spec: ModelSpec) -> None:
    """On another text than the one that was looked at."""
    exact, other = made(spec), text(spec, seed=8)[:8]
    found = {
        method: kl(exact, applied(Prune(method=method), made(spec), text(spec))[0], other)
        for method in ("magnitude", "wanda", "sparsegpt")
    }
    assert found["sparsegpt"] < 0.85 * found["wanda"]
    assert found["sparsegpt"] < 0.85 * found["magnitude"]


def test_wanda_keeps_what_large_inputs_meet() -> None:
    """Inputs from 0.3 to 3 in size: what magnitude drops costs 3 times as much and more."""
    hessian, weight = correlated(64), normal(32, 64)
    ours = kept(weight, weight.abs() * hessian.diagonal().sqrt(), 0.5, 64)
    plain = kept(weight, weight.abs(), 0.5, 64)
    assert loss(weight, ours, hessian).sum() < 0.5 * loss(weight, plain, hessian).sum()


@every_shape
@every_method
def test_sparsity_zero_changes_no_logit(spec: ModelSpec, method: str) -> None:
    exact, ids = made(spec), text(spec)[:2]
    pruned, coverage = applied(Prune(sparsity=0.0, method=method), made(spec))
    assert logits(pruned, ids).equal(logits(exact, ids))
    assert coverage.ratio > 0


def test_the_same_text_gives_the_same_weights_and_another_text_others() -> None:
    ids = text(LLAMA)
    one, same, other = (
        applied(Prune(), made(LLAMA), x)[0] for x in (ids, ids, text(LLAMA, seed=4))
    )
    first = one.blocks[1].mlp.down.weight
    assert first.equal(same.blocks[1].mlp.down.weight)
    assert not first.equal(other.blocks[1].mlp.down.weight)


@every_method
def test_no_tensor_that_came_in_is_written_to(method: str) -> None:
    model = made(UNTIED)
    given = dict(model.named_parameters())
    copies = {name: tensor.clone() for name, tensor in given.items()}
    applied(Prune(method=method), model, text(UNTIED))
    assert all(tensor.equal(copies[name]) for name, tensor in given.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_stored_form_is_a_bit_a_weight_and_what_is_left(precision: str) -> None:
    model = made(LLAMA, precision)
    model, coverage = applied(Prune(sparsity=0.75, method="magnitude"), model)
    size = 4 if precision == "fp32" else 2
    weights = LLAMA.matmul_parameters - 199 * 48
    assert coverage.converted_weights == weights
    assert coverage.stored_bytes == weights // 8 + weights // 4 * size
    assert coverage.effective_bits == 1 + 2 * size
    assert coverage.resident_bytes == weights * size  # dense in memory, and it says so
    whole = stored_bytes(model)
    assert whole == coverage.stored_bytes + size * (199 * 48 + 7 * 48)
    assert resident_bytes(model) == size * LLAMA.parameters


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 8), (7, 33)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_layer_comes_back_bit_for_bit(
    shape: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    weight = normal(*shape).to(dtype)
    weight[weight < 0.3] = 0.0
    layer = SparseLinear(weight, normal(1, shape[0])[0].to(dtype) if bias else None)
    settings = json.loads(json.dumps(layer.settings()))
    back = SparseLinear.restored(layer.stored(), settings)
    assert back.weight.equal(weight)
    assert back.weight.dtype == dtype
    assert (back.bias is None) is not bias
    assert not bias or back.bias.equal(layer.bias)


def test_all_zero_and_no_zero_are_stored_too() -> None:
    for weight in (torch.zeros(3, 10), torch.ones(3, 10)):
        layer = SparseLinear(weight, None)
        assert SparseLinear.restored(layer.stored(), layer.settings()).weight.equal(weight)


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_with_the_layer(method: str, value: float) -> None:
    model = made(LLAMA)
    model.blocks[0].mlp.up.weight[3, 5] = value
    with pytest.raises(NumericalError, match=r"^blocks\.0\.mlp\.up holds NaN or infinite weights"):
        applied(Prune(method=method), model, text(LLAMA))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_what_needs_a_text_says_so(method: str) -> None:
    one = Prune(method=method)
    assert one.needs_calibration
    with pytest.raises(InvalidInput, match="choose a calibration text"):
        one.apply(made(LLAMA), PassContext(placement=placed()))
    with pytest.raises(InvalidInput, match=r"has 96 tokens, and pruning needs 1,024 at least"):
        applied(one, made(LLAMA), text(LLAMA, sequences=2))
    assert not Prune(method="magnitude").needs_calibration


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"sparsity": float("nan")}, "finite number"),
        ({"pattern": "2:4", "sparsity": 0.6}, "the pattern 2:4 makes half of the weights zero"),
        ({"method": "luck"}, "'sparsegpt', 'wanda' or 'magnitude'"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Prune(**fields)


def test_columns_that_are_no_multiple_of_four_block_two_of_four() -> None:
    odd = LLAMA.model_copy(update={"hidden": 90})
    one = Prune(pattern="2:4")
    assert one.blocked_by(odd, Placement()) == "2:4 needs columns in fours, and layers have 90."
    assert one.blocked_by(LLAMA, Placement()) is None
    assert Prune().blocked_by(odd, Placement()) is None


def test_all_48_projections_of_gpt2_are_pruned() -> None:
    """On its own number of layers, narrow; query, key and value are three of ours each."""
    shape = GPT2_SHAPES["gpt2"]
    narrow = GPT2.model_copy(update={"layers": shape.layers})
    model = made(narrow)
    model, coverage = applied(Prune(), model, text(narrow))
    kinds = [type(one) for _, one in model.linears()]
    assert kinds == [SparseLinear] * (12 * 6)
    assert coverage.skipped == (("head", "passes on blocks leave the output head as it is"),)


def test_layers_of_an_earlier_pass_are_skipped_with_the_reason() -> None:
    from gptcore.passes.quantize import Int8

    model, _ = applied(Int8(), made(LLAMA))
    _, coverage = applied(Prune(method="magnitude"), model)
    assert coverage.ratio == 0.0
    assert len(coverage.skipped) == 1 + 7 * 3
    assert coverage.skipped[1][1].endswith("of an earlier pass is no plain linear layer")


def test_a_pruned_layer_can_be_quantized_after() -> None:
    from gptcore.passes.quantize import Int8

    model, _ = applied(Prune(), made(LLAMA), text(LLAMA))
    pruned = copy.deepcopy(model)
    model, coverage = applied(Int8(), model)
    assert coverage.ratio == 1.0
    assert not [one for one in model.modules() if isinstance(one, nn.Linear)]
    assert kl(pruned, model, text(LLAMA)[:2]) < 0.05
