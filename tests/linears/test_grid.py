"""The numbers of a grid: how far weights are from them, and what they take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.linears import grid as module
from gptcore.linears.grid import Grid, Quantized


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Return rows of very different size, as trained ones have."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 0, rows)[:, None]
    return torch.randn(rows, columns, generator=random) * sizes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_weights_are_off_by_half_a_step_and_the_rounding_of_scale_and_zero(
    bits: int, group: int
) -> None:
    weight = weights(50, 2 * group)
    grouped = weight.view(50, -1, group)
    levels = 2**bits - 1
    step = (grouped.amax(2) - grouped.amin(2)) / levels
    # bf16 keeps 8 bits: scale off by 2⁻⁹ of itself over the steps, zero by 2⁻⁹ of its size.
    bound = step / 2 + (levels / 2 * step + grouped.abs().amax(2)) * 2**-8
    numbers = Grid(bits, group).quantize(weight)
    gap = (numbers.dequantized().view_as(grouped) - grouped).abs().amax(2)
    assert (gap <= bound).all()
    assert (numbers.codes.min(), numbers.codes.max()) == (0, levels)
    assert numbers.group == group


def test_a_symmetric_grid_is_off_by_half_a_step() -> None:
    weight = weights(19, 40)
    numbers = Grid(8, symmetric=True, dtype=torch.float32).quantize(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    expected = (weight / step).round().clamp(-127, 127) * step
    assert torch.allclose(numbers.dequantized(), expected, rtol=1e-5, atol=1e-7)
    assert ((numbers.dequantized() - weight).abs() <= step / 2 * 1.001).all()
    assert numbers.codes.min() >= 1  # no code stands for −128, which has no opposite
    assert numbers.zero is None
    assert numbers.group == 40


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=8),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
)
@settings(max_examples=60)
def test_numbers_of_the_grid_stay_where_they_are(
    values: list[float], bits: int, symmetric: bool
) -> None:
    """Rounding to the nearest must find a number that is on the grid already."""
    grid = Grid(bits, 8, symmetric)
    grouped = torch.tensor(values).view(1, 1, 8)
    scale, zero = grid.fit(grouped)
    once = grid.nearest(grouped, scale, zero)
    assert torch.equal(grid.nearest(once.clone(), scale, zero), once)
    codes = grid.encode(grouped, scale, zero)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits


def test_a_shrunk_range_clips_what_lies_outside() -> None:
    grid = Grid(4, 8)
    grouped = torch.tensor([-4.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 4.0]).view(1, 1, 8)
    scale, zero = grid.fit(grouped, 0.5)
    near = grid.nearest(grouped, scale, zero)
    assert near.min() == pytest.approx(-2, abs=0.05)
    assert near.max() == pytest.approx(2, abs=0.05)
    whole = grid.nearest(grouped, *grid.fit(grouped))
    assert (near - grouped)[..., 1:-1].abs().max() < (whole - grouped)[..., 1:-1].abs().max()


@pytest.mark.parametrize(("bits", "group", "effective"), [
    (4, 32, 5.0), (4, 64, 4.5), (4, 128, 4.25), (3, 32, 4.0), (3, 64, 3.5), (3, 128, 3.25),
    (8, 0, 8 + 16 / 256),
])  # fmt: skip
def test_effective_bits_count_scales_and_zeros(bits: int, group: int, effective: float) -> None:
    numbers = Grid(bits, group, symmetric=not group).quantize(weights(256, 256))
    assert numbers.stored_bytes * 8 / 256**2 == effective
    assert sum(one.nbytes for one in numbers.stored().values()) == numbers.stored_bytes


@pytest.mark.parametrize("grid", [Grid(3, 32), Grid(4, 32), Grid(8, symmetric=True)], ids=str)
def test_a_file_gives_the_numbers_back(grid: Grid) -> None:
    numbers = grid.quantize(weights(13, 96))
    again = Quantized.from_stored(numbers.stored(), numbers.bits, 96)
    assert torch.equal(again.codes, numbers.codes)
    assert torch.equal(again.dequantized(), numbers.dequantized())


def test_pieces_of_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(100, 64)
    whole = Grid(4, 32).quantize(weight)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    pieces = Grid(4, 32).quantize(weight)
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.scale, pieces.scale)
    assert torch.equal(whole.dequantized(), pieces.dequantized())
