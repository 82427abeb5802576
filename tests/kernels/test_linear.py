"""Packed matrices alone: exact numbers in and out, products against float64, odd sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gptcore import kernels
from gptcore.device import Placement
from gptcore.kernels.library import library
from gptcore.kernels.linear import Arena, Matrix, NativeEmbedding, NativeLinear, fits, take_over
from gptcore.linears import resident_bytes, stored_bytes
from gptcore.linears.embedding import PackedEmbedding
from gptcore.linears.grid import Grid, Quantized
from gptcore.linears.quantized import Int8Linear, SmallLinear
from gptcore.measure.memory import weight_bytes
from gptcore.model import GPT
from gptcore.passes.base import PassContext
from gptcore.passes.quantize import Int3, Int4, Int8, Int8Weights, Quantizer
from gptcore.spec import Precision
from tests.kernels.shapes import SPECS, full_logits, random_model, some_ids

pytestmark = pytest.mark.skipif(bool(kernels.unavailable()), reason=str(kernels.unavailable()))

SHAPES = [(1, 1), (16, 64), (17, 65), (50, 70), (3, 31), (129, 200), (32, 33), (40, 640)]
"""(N, K): one block exactly, one more than that, less than a group, less than a register."""
KINDS = ["rows", "int8", "int4"]


def numbers(
    kind: str, rows: int, columns: int, group: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return codes, scale and zero of a random matrix, and what they stand for, in float64."""
    random = torch.Generator().manual_seed(rows * 1000 + columns)
    low, high = (0, 16) if kind == "int4" else (-127, 128)
    codes = torch.randint(low, high, (rows, columns), generator=random, dtype=torch.int8)
    groups = -(-columns // group)
    of_column = torch.arange(columns) // group
    if kind == "rows":
        scale = torch.rand(rows, generator=random) + 0.1
        return codes, scale, None, codes.double() * scale.double()[:, None]
    scale = (torch.rand(rows, groups, generator=random) + 0.1).bfloat16()
    wide = scale.double()[:, of_column]
    if kind == "int8":
        return codes, scale, None, codes.double() * wide
    zero = torch.randn(rows, groups, generator=random).bfloat16()
    return codes, scale, zero, (codes.double() - 8) * wide + zero.double()[:, of_column]


BITS = [*((kind, 16) for kind in KINDS), ("rows", 8)]
"""Kinds, with the bits of activations that they may have."""


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize(("kind", "activation_bits"), BITS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_products_agree_with_float64(
    rows: int, columns: int, kind: str, group: int, activation_bits: int
) -> None:
    # x is off by half a step of its group's peak at most; w · x adds up no more than |w| · that.
    codes, scale, zero, weight = numbers(kind, rows, columns, group)
    matrix = Matrix.of(codes, scale, zero, group=group)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(19, columns, generator=random) * torch.logspace(-3, 3, 19)[:, None]
    bias = torch.randn(rows, generator=random)
    found = matrix.times(x, bias, activation_bits=activation_bits).double()
    wanted = x.double() @ weight.T + bias.double()
    half_step = 1 / (2 * 127 * (256 if activation_bits == 16 else 1))
    bound = x.abs().amax(1).double()[:, None] * weight.abs().sum(1) * (half_step + 1e-6) + 1e-6
    assert ((found - wanted).abs() <= bound).all()


def test_eight_bits_of_activations_are_rounded_with_a_scale_a_group() -> None:
    codes, scale, zero, weight = numbers("rows", 40, 640, 64)
    x = torch.randn(21, 640, generator=torch.Generator().manual_seed(3))
    parts = x.double().view(21, -1, 64)
    step = parts.abs().amax(-1, keepdim=True) / 127
    wanted = ((parts / step).round() * step).flatten(1) @ weight.T
    found = Matrix.of(codes, scale, zero, group=64).times(x, None, activation_bits=8)
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-3 * wanted.abs().mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_numbers_come_back_as_they_were(rows: int, columns: int, kind: str) -> None:
    codes, scale, zero, weight = numbers(kind, rows, columns, 32)
    matrix = Matrix.of(codes, scale, zero, group=32)
    found = matrix.unpacked()
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1], scale)
    assert (found[2] is None) == (zero is None)
    assert found[2] is None or zero is None or torch.equal(found[2], zero)
    picked = matrix.pick(torch.arange(rows))
    assert torch.allclose(picked.double(), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "activation_bits"), BITS)
def test_many_vectors_at_once_give_the_bits_of_each_alone(kind: str, activation_bits: int) -> None:
    # Tiles of 8, 4, 2 and 1 vectors are all met with 1 to 23.
    codes, scale, zero, _ = numbers(kind, 50, 200, 64)
    matrix = Matrix.of(codes, scale, zero, group=64)
    x = torch.randn(23, 200, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([matrix.times(row[None], None, activation_bits=activation_bits) for row in x])
    for count in range(1, 24):
        found = matrix.times(x[:count], None, activation_bits=activation_bits)
        assert torch.equal(found, alone[:count])


def test_zeros_and_tiny_numbers_are_multiplied() -> None:
    codes, scale, zero, weight = numbers("rows", 16, 64, 64)
    matrix = Matrix.of(codes, scale, zero, group=64)
    x = torch.stack((torch.zeros(64), torch.full((64,), 1e-20), torch.full((64,), 1e-39)))
    found = matrix.times(x, None)
    assert torch.equal(found[0], torch.zeros(16))
    assert torch.allclose(found[1].double(), 1e-20 * weight.sum(1), rtol=1e-3)
    assert found[2].abs().max() < 1e-30


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_makes_its_own_vector_none(bad: float) -> None:
    codes, scale, zero, _ = numbers("int8", 16, 128, 64)
    matrix = Matrix.of(codes, scale, zero, group=64)
    x = torch.ones(3, 128)
    x[1, 70] = bad
    found = matrix.times(x, None)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_bfloat16_activations_are_those_floats() -> None:
    codes, scale, zero, _ = numbers("int4", 33, 96, 32)
    matrix = Matrix.of(codes, scale, zero, group=32)
    x = torch.randn(5, 96).bfloat16()
    assert torch.equal(matrix.times(x, None), matrix.times(x.float(), None))


def test_the_largest_sums_fit() -> None:
    # 64 products of the largest integers are just below 2^29, see native/linear.hpp.
    codes = torch.full((16, 64), 127, dtype=torch.int8)
    matrix = Matrix.of(codes, torch.ones(16), None, group=64)
    assert torch.allclose(matrix.times(torch.ones(1, 64), None), torch.full((16,), 127.0 * 64))
    assert torch.allclose(matrix.times(-torch.ones(1, 64), None), torch.full((16,), -127.0 * 64))


def test_a_row_that_is_not_there_is_refused() -> None:
    codes, scale, zero, _ = numbers("rows", 16, 64, 64)
    matrix = Matrix.of(codes, scale, zero, group=64)
    with pytest.raises(IndexError):
        matrix.pick(torch.tensor([16]))


def test_an_arena_gives_every_layer_bytes_of_its_own() -> None:
    arena = Arena()
    parts = [arena.take(size) for size in (1, 64, 100, Arena.SLAB, 5)]
    for value, part in enumerate(parts):
        assert part.data_ptr() % 64 == 0
        part.fill_(value)
    assert [int(part.unique()) for part in parts] == [0, 1, 2, 3, 4]


PASSES: dict[str, tuple[Quantizer, Precision]] = {
    "int8": (Int8(), "fp32"),
    "int8, 8-bit activations": (Int8(activation_bits=8), "fp32"),
    "int8 weights": (Int8Weights(), "bf16"),
    "int4": (Int4(group=32), "bf16"),
    "int4, wide groups": (Int4(group=64, head=False), "bf16"),
    "int3": (Int3(group=32), "bf16"),
}


def packed(one: Quantizer, precision: Precision, spec: str) -> GPT:
    placement = Placement(precision=precision)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return one.apply(random_model(SPECS[spec]).to(dtype), PassContext(placement=placement))


@pytest.mark.parametrize(
    ("name", "spec"),
    [(name, "llama") for name in PASSES]
    + [(name, "qwen2") for name in PASSES if "wide" not in name],
)
def test_what_a_pass_packed_is_taken_over_with_the_same_numbers(name: str, spec: str) -> None:
    model = packed(*PASSES[name], spec)
    before = {
        where: (one.kind, one.settings(), one.stored())
        for where, one in model.named_modules()
        if hasattr(one, "stored")
    }
    assert take_over(model) > 0
    for where, (kind, settings, stored) in before.items():
        after = model.get_submodule(where)
        assert isinstance(after, NativeLinear | NativeEmbedding), where
        assert after.kind == kind
        assert after.settings() == settings
        assert after.stored().keys() == stored.keys()
        for key, tensor in after.stored().items():
            assert tensor.dtype == stored[key].dtype
            assert torch.equal(tensor, stored[key]), (where, key)


def test_a_model_that_was_taken_over_computes_what_its_numbers_say() -> None:
    model = packed(Int8(), "fp32", "qwen2")
    twin = packed(Int8(), "fp32", "qwen2")
    for where, layer in tuple(twin.named_modules()):
        if isinstance(layer, Int8Linear):
            plain = nn.Linear(layer.columns, layer.rows, bias=layer.bias is not None)
            plain.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias, requires_grad=False)
            twin.set_submodule(where, plain)
    take_over(model)
    ids = some_ids(model.spec, 100)
    found, wanted = full_logits(model, ids), full_logits(twin, ids)
    assert (found - wanted).abs().max() < 1e-3 * wanted.std()


def test_a_model_has_the_activations_that_its_pass_chose() -> None:
    fine, coarse = (packed(Int8(activation_bits=bits), "fp32", "qwen2") for bits in (16, 8))
    ids = some_ids(fine.spec, 40)
    assert torch.equal(full_logits(fine, ids), full_logits(coarse, ids))  # torch's have 8 bits
    for model in (fine, coarse):
        take_over(model)
    chosen = {
        where: one.activation_bits
        for where, one in coarse.named_modules()
        if isinstance(one, NativeLinear)
    }
    assert chosen.pop("head") == 16
    assert set(chosen.values()) == {8}
    one, other = full_logits(fine, ids), full_logits(coarse, ids)
    assert 1e-4 < (one - other).abs().max() / one.std() < 0.25


def test_a_tied_embedding_lets_go_of_its_copy() -> None:
    model = packed(Int8(), "fp32", "qwen2")
    assert isinstance(model.embedding, PackedEmbedding)
    resident, step = weight_bytes(model)
    take_over(model)
    head = model.head
    assert isinstance(head, NativeLinear)
    assert isinstance(model.embedding, NativeEmbedding)
    assert model.embedding.weight.data_ptr() == head.matrix.packed.data_ptr()
    assert resident_bytes(model.embedding) == 0
    after, step_after = weight_bytes(model)
    assert after < resident
    assert abs(step_after - step) < 0.2 * step  # whole blocks of 16 rows and groups of 64 columns


def test_layers_chosen_for_how_they_compute_are_left_alone() -> None:
    model = packed(Int3(group=32, small=True), "bf16", "qwen2")
    before = stored_bytes(model)
    assert take_over(model) == 0
    assert isinstance(model.blocks[0].mlp.up, SmallLinear)
    assert stored_bytes(model) == before


def test_numbers_that_do_not_fit_are_refused() -> None:
    weight = torch.randn(16, 96)
    assert fits(Grid(8, symmetric=True).quantize(weight))
    assert fits(Grid(4, 96).quantize(weight))
    assert not fits(Grid(4, 16).quantize(weight))
    assert not fits(Grid(4, 32, dtype=torch.float32).quantize(weight))
    assert not fits(Grid(8, 32).quantize(weight))
    assert not fits(Grid(5, 32).quantize(weight))
    lowest = Quantized(8, torch.zeros(16, 96, dtype=torch.uint8), torch.ones(16, 1))
    assert not fits(lowest)


def test_rows_may_be_every_second_of_many() -> None:
    """Their copy must live until the call is over: so large a one is unmapped when it is freed."""
    codes, scale, zero, weight = numbers("rows", 16, 64, 64)
    matrix = Matrix.of(codes, scale, zero, group=64)
    strided = (torch.arange(80_000) % 16)[::2]
    picked = matrix.pick(strided)
    assert torch.allclose(picked.double(), weight[strided], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lines", [1, 3, 4, 5, 1000, 4097])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_memory_that_is_read_for_its_speed_is_read_whole(lines: int, threads: int) -> None:
    random = torch.Generator().manual_seed(lines)
    memory = torch.randint(-(2**31), 2**31, (lines * 16,), generator=random).int()
    found = library().gpt_added_up(memory.data_ptr(), 64 * lines, threads)
    assert found == int(memory.long().sum()) % 2**32
