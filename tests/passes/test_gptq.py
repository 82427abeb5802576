"""GPTQ, AWQ and ranges: against rounding, by the error that each is meant to make small."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.errors import NumericalError
from gptcore.linears.grid import Grid
from gptcore.passes import gptq
from gptcore.passes.awq import channel_scales, output_change
from gptcore.passes.folding import Folding, shared, sites
from gptcore.passes.gptq import Inputs, solve
from gptcore.passes.quantize import Int3, Int4, Int8, Quantizer
from gptcore.passes.ranges import fitted, rounded
from gptcore.spec import ModelSpec, gpt
from tests.passes.small import applied, kl, logits, made, text, with_outliers

LLAMA = ModelSpec(
    family="llama",
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=16,
    width=64,
    hidden=128,
    context=128,
    vocabulary=199,
    norm="rmsnorm",
    position="rotary",
    mlp="swiglu",
    bias=False,
    qkv_bias=False,
)
UNTIED = LLAMA.model_copy(update={"tied_head": False, "qkv_bias": True, "bias": True})
NORMED = UNTIED.model_copy(update={"qk_norm": True})
GPT2 = gpt(2, 64, 4, context=64, vocabulary=199)
SPECS = {"llama": LLAMA, "untied": UNTIED, "normed": NORMED, "gpt2": GPT2}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
GRIDS = [Grid(4, 32), Grid(3, 64), Grid(8, symmetric=True, dtype=torch.float32), Grid(4)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(columns: int, seed: int = 0, tokens: int = 600) -> torch.Tensor:
    """Return inputs that follow one another and differ in size, as those of a layer do."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns // 3, generator=random) @ torch.randn(
        columns // 3, columns, generator=random
    )
    noise = torch.randn(tokens, columns, generator=random)
    return (mixed / (columns // 3) ** 0.5 + 0.3 * noise) * torch.logspace(-1, 1, columns)


def weights(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def hessian(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def change(weight: torch.Tensor, other: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the mean squared change of each output: by running the layer, not by the Hessian."""
    return ((x @ other.T - x @ weight.T) ** 2).mean(0)


@every_grid
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000))
def test_gptq_changes_the_outputs_less_than_rounding(grid: Grid, seed: int) -> None:
    """On whole layers of any seed; of a single row it is not promised."""
    x, weight = inputs(128, seed), weights(24, 128, seed + 1)
    plain = change(weight, grid.quantize(weight).dequantized(), x).sum()
    solved = change(weight, solve(weight, Inputs.of(hessian(x)), grid).dequantized(), x).sum()
    assert solved < 0.8 * plain


@every_grid
def test_without_correlation_there_is_nothing_to_make_up_for(grid: Grid) -> None:
    """With a diagonal Hessian the loop is rounding in the fitted ranges, whatever the order."""
    weight, importance = weights(24, 128), torch.rand(128) + 0.1
    solved = solve(weight, Inputs.of(torch.diag(importance), damping=0.0), grid)
    direct = rounded(weight, importance, grid)
    assert torch.equal(solved.codes, direct.codes)
    assert torch.equal(solved.scale, direct.scale)


def test_the_loop_is_the_one_of_the_definition() -> None:
    """Written out without blocks and factors: after each column the rest is solved anew."""
    grid, columns = Grid(4, 32), 64
    x, weight = inputs(columns), weights(5, columns)
    ready = Inputs.of(hessian(x), damping=0.01)
    damped = hessian(x).double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    scale, zero = fitted(weight.view(5, -1, 32), ready.importance.view(-1, 32), grid)
    left = weight.double().clone()
    found = torch.zeros(5, columns, dtype=torch.double)
    order = ready.order.tolist()
    for place, column in enumerate(order):
        group = column // 32
        s, z = scale[:, group].double(), zero[:, group].double()
        code = ((left[:, column] - z) / s).round().clamp(-8, 7)
        found[:, column] = code * s + z
        rest = order[place + 1 :]
        if rest:
            error = left[:, column] - found[:, column]
            # The change of the rest that makes up for a given change of one column.
            answer = torch.linalg.solve(damped[rest][:, rest], damped[rest, column])
            left[:, rest] += error[:, None] * answer
    got = solve(weight, ready, grid).dequantized()
    same = (got - found).abs() < 1e-5
    # A number at the middle of two steps may fall either way, and all after it follow.
    assert same.float().mean() > 0.97


def test_rows_and_columns_in_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(160), weights(40, 160)
    ready, grid = Inputs.of(hessian(x)), Grid(4, 32)
    whole = solve(weight, ready, grid)
    monkeypatch.setattr(gptq, "ROWS_AT_ONCE", 7)
    pieces = solve(weight, ready, grid)
    assert torch.equal(whole.codes, pieces.codes)
    monkeypatch.setattr(gptq, "BLOCK", 31)
    other = solve(weight, ready, grid)
    assert (whole.codes == other.codes).float().mean() > 0.97  # sums in another order


def test_inputs_that_never_come_do_no_harm() -> None:
    """A channel that is always zero makes a Hessian that cannot be inverted without damping."""
    x, weight = inputs(64), weights(8, 64)
    x[:, 10:20] = 0
    numbers = solve(weight, Inputs.of(hessian(x)), Grid(4, 32))
    assert numbers.dequantized().isfinite().all()
    assert change(weight, numbers.dequantized(), x).sum() < (
        change(weight, Grid(4, 32).quantize(weight).dequantized(), x).sum()
    )
    nothing = solve(weight, Inputs.of(torch.zeros(64, 64)), Grid(4, 32))
    assert nothing.dequantized().isfinite().all()
    with pytest.raises(NumericalError, match="cannot be inverted"):
        Inputs.of(torch.full((64, 64), float("nan")))


def test_what_a_solver_is_given_is_not_written_to() -> None:
    x, weight = inputs(64), weights(8, 64)
    mean = hessian(x)
    kept = weight.clone(), mean.clone()
    solve(weight, Inputs.of(mean), Grid(4, 32))
    channel_scales([(weight, Grid(4, 32))], mean, x.abs().mean(0))
    rounded(weight, mean.diagonal(), Grid(4, 32))
    assert torch.equal(weight, kept[0])
    assert torch.equal(mean, kept[1])


@every_grid
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_fitted_range_is_never_worse_than_the_whole(grid: Grid, seed: int) -> None:
    """In the weighted error that it is fitted for; the whole range is among those tried."""
    weight = weights(9, 64, seed)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(seed))
    plain = grid.quantize(weight).dequantized() - weight
    fit = rounded(weight, importance, grid).dequantized() - weight
    assert ((fit**2) @ importance <= (plain**2) @ importance * (1 + 1e-6)).all()


def test_the_change_of_outputs_is_that_of_running_the_layer() -> None:
    x, weight, grid = inputs(64), weights(12, 64), Grid(4, 32)
    scale = torch.rand(64) + 0.5
    other = grid.quantize(weight * scale).dequantized() / scale
    want = change(weight, other, x).sum().item()
    assert output_change(weight, scale, grid, hessian(x)) == pytest.approx(want, rel=1e-3)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_scaled_channels_are_never_worse_than_plain_ones(seed: int) -> None:
    """Not scaling is among what is tried. Two layers share the scales, as q, k and v do."""
    x = inputs(64, seed)
    layers = [(weights(12, 64, seed + i), Grid(4, 32)) for i in (1, 2)]
    scale = channel_scales(layers, hessian(x), x.abs().mean(0))
    plain, now = (
        sum(output_change(weight, one, grid, hessian(x)) for weight, grid in layers)
        for one in (torch.ones(64), scale)
    )
    assert now <= plain
    assert scale.shape == (64,)
    assert (scale > 0).all()


def test_inputs_of_very_different_size_are_scaled() -> None:
    """A few channels a hundred times larger: finer steps for them pay, or nothing is done."""
    x, weight = inputs(64), weights(12, 64)
    x[:, [3, 40]] *= 100
    scale = channel_scales([(weight, Grid(3, 32))], hessian(x), x.abs().mean(0))
    assert scale[[3, 40]].min() > 2 * scale.median()


@every_spec
def test_folding_changes_no_logit(spec: ModelSpec) -> None:
    """Dividing by s and multiplying by s, at every site, in float: only rounding is left."""
    plain, model = made(spec), made(spec)
    random = torch.Generator().manual_seed(2)
    folded = 0
    for block in model.blocks:
        folding = Folding(block, spec)
        for site in sites(spec):
            if folding.can(site):
                columns = folding.layer(site.layers[0]).in_features
                scale = torch.rand(columns, generator=random) * 4 + 0.25
                folding.add(site, shared(scale, spec, site))
                folded += 1
        folding.settle(keep=set())
    assert folded == spec.layers * (4 if spec.mlp == "swiglu" else 3)
    ids = text(spec)[:2]
    want = logits(plain, ids)
    assert (logits(model, ids) - want).abs().max() < 1e-4 * want.abs().max()
    first = model.blocks[0].attention.out.weight
    assert not torch.equal(first, plain.blocks[0].attention.out.weight)


def test_folding_into_a_norm_of_16_bits_follows_its_rounding() -> None:
    """The norm's weights can only be some numbers; the scale in force is what they became."""
    model = made(LLAMA, "bf16")
    folding = Folding(model.blocks[0], LLAMA)
    site = sites(LLAMA)[0]
    before = model.blocks[0].attention_norm.weight.float()
    asked = torch.rand(64) + 0.5
    scale = folding.add(site, asked)
    after = model.blocks[0].attention_norm.weight.float()
    assert not torch.equal(scale, asked)
    assert torch.allclose(after * scale, before, rtol=1e-6)


@pytest.mark.parametrize("one", [Int4(group=32), Int3(group=32), Int8()], ids=repr)
@pytest.mark.parametrize("method", ["gptq", "awq"])
@every_spec
def test_a_calibrated_model_is_closer_than_a_rounded_one(
    one: Quantizer, method: str, spec: ModelSpec
) -> None:
    """On the text that it was calibrated with, where both have to be better.

    AWQ is for channels that stand out, and GPTQ for inputs that go together: without the former, or
    where errors are those of the activations, neither has much to gain.
    """
    ids = text(spec, seed=11)
    precision = "fp32" if isinstance(one, Int8) else "bf16"
    exact = made(spec, precision, std=0.1)
    if method == "awq":
        exact = with_outliers(exact)
    plain, _ = applied(one, copy.deepcopy(exact))
    better, _ = applied(one.model_copy(update={"method": method}), copy.deepcopy(exact), ids)
    limit = 1.0 if isinstance(one, Int8) and method == "gptq" else 0.75
    assert kl(exact, better, ids[:8]) < limit * kl(exact, plain, ids[:8])
