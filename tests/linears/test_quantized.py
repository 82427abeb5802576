"""Packed layers: against a float product of their own numbers, in bytes, and back from a file."""

from __future__ import annotations

import copy
import json
import warnings

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gptcore.device import trim_heap
from gptcore.errors import InvalidInput
from gptcore.linears import Stored, quantized, resident_bytes, stored_bytes
from gptcore.linears.embedding import PackedEmbedding
from gptcore.linears.grid import Grid, Quantized
from gptcore.linears.quantized import (
    Int4Linear,
    Int8Linear,
    Int8MatmulLinear,
    Int8WeightLinear,
    PackedLinear,
    SmallLinear,
    StaticInt8Linear,
    TiledInt4Linear,
    int8_bytes,
)

ROWS = Grid(8, symmetric=True, dtype=torch.float32)
HALF_ROWS = Grid(8, symmetric=True)
pytestmark = pytest.mark.usefixtures("one_thread")


def linear(rows: int, columns: int, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    """Return a float layer with rows of very different size, as trained ones have."""
    random = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    sizes = torch.logspace(-3, 0, rows)[:, None]
    layer.weight.copy_(torch.randn(rows, columns, generator=random) * sizes)
    if bias:
        layer.bias.copy_(torch.randn(rows, generator=random))
    return layer


def eight(layer: nn.Linear) -> Int8Linear:
    return Int8Linear(ROWS.quantize(layer.weight), layer.bias)


def four(layer: nn.Linear, group: int) -> Int4Linear:
    return Int4Linear(Grid(4, group).quantize(layer.weight), layer.bias)


KINDS = {
    "dynamic": (Int8Linear, ROWS, {}),
    "static": (StaticInt8Linear, ROWS, {"low": -5.0, "high": 5.0}),
    "matmul": (Int8MatmulLinear, ROWS, {}),
    "int8": (Int8WeightLinear, HALF_ROWS, {}),
    "int4": (Int4Linear, Grid(4, 32), {}),
    "3 bits in 4": (Int4Linear, Grid(3, 32), {}),
    "small 3": (SmallLinear, Grid(3, 32), {}),
    "small 4": (SmallLinear, Grid(4, 32), {}),
}
INTEGER = ("dynamic", "static", "matmul")
every_kind = pytest.mark.parametrize("kind", KINDS)


def packed(kind: str, layer: nn.Linear) -> PackedLinear:
    """Return a layer of that kind, its bias in the type in which the kind computes."""
    made, grid, more = KINDS[kind]
    bias = layer.bias
    if bias is not None and kind not in INTEGER:
        bias = bias.bfloat16()
    return made(grid.quantize(layer.weight), bias, **more)


def given(kind: str, *shape: int, seed: int = 4) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x if kind in INTEGER else x.bfloat16()


@every_kind
@pytest.mark.parametrize("rows", [1, 16, 47, 64, 65, 331])
def test_the_numbers_come_back_as_they_went_in(kind: str, rows: int) -> None:
    """Rows that are no multiple of 16 or 64 would show a wrong block order or padding."""
    layer = linear(rows, 96, seed=rows)
    _, grid, _ = KINDS[kind]
    numbers = grid.quantize(layer.weight)
    back = packed(kind, layer).numbers()
    assert back.bits == numbers.bits
    assert torch.equal(back.codes, numbers.codes)
    assert torch.equal(back.scale, numbers.scale)
    assert (back.zero is None) == (numbers.zero is None)
    if numbers.zero is not None:
        assert torch.equal(back.zero, numbers.zero)


@every_kind
def test_a_layer_from_a_file_computes_the_same_to_the_last_bit(kind: str) -> None:
    layer = packed(kind, linear(83, 64))
    assert isinstance(layer, Stored)
    tensors = {name: one.clone() for name, one in layer.stored().items()}
    assert layer.stored_bytes == sum(one.nbytes for one in tensors.values())
    settings = json.loads(json.dumps(layer.settings()))
    again = type(layer).restored(tensors, settings)
    for tokens in (1, 5, 100):
        x = given(kind, tokens, 64)
        assert torch.equal(layer(x), again(x))


@every_kind
def test_what_is_stored_takes_the_bits_that_it_should(kind: str) -> None:
    layer = packed(kind, linear(64, 96, bias=False))
    scales = {8: 32 if kind in INTEGER else 16}.get(layer.bits, 3 * 32)  # bits a row
    assert stored_bytes(layer) * 8 == 64 * (96 * layer.bits + scales)
    held = sum(one.nbytes for one in layer.buffers())
    if kind not in ("dynamic", "static"):
        assert resident_bytes(layer) == held
    if kind.startswith("small"):
        assert held == stored_bytes(layer)


@every_kind
@pytest.mark.parametrize("tokens", [1, 7, 95, 96, 200])
def test_a_layer_is_a_float_product_of_its_own_numbers(kind: str, tokens: int) -> None:
    """On both sides of the number of tokens from which weights are made float.

    bf16 products are rounded to 8 bits, 8-bit activations to steps of 1/255 of their range: less
    than 2 % of the output is left of either; a wrong scale or order leaves 100 %.
    """
    layer = linear(77, 64)
    made = packed(kind, layer)
    x = given(kind, 2, tokens, 64)
    y = made(x)
    assert y.shape == (2, tokens, 77)
    assert y.dtype == x.dtype
    want = F.linear(x.float(), made.dequantized(), layer.bias)
    assert (y.float() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in INTEGER])
def test_few_and_many_tokens_give_the_same(kind: str) -> None:
    """Two ways to one product: the packed operation, and weights made float. bf16 rounds to 2⁻⁸."""
    layer = packed(kind, linear(331, 96, bias=False))
    x = given(kind, 9, 96)
    few, many = layer.few(x).float(), layer.many(x).float()
    assert (few - many).abs().max() <= 2**-7 * many.abs().max()


def test_float_weights_in_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("int8", "int4", "small 3"):
        layer, x = packed(kind, linear(331, 96)), given(kind, 100, 96)
        whole = layer(x)
        monkeypatch.setattr(quantized, "PIECE_WEIGHTS", 96 * 64)
        assert len(list(layer.pieces(torch.float32))) == 6
        # Another shape of product may add in another order, which bf16 shows in its last bit.
        assert (layer(x) - whole).abs().max() <= 2**-7 * whole.abs().max()
        monkeypatch.undo()


@pytest.mark.parametrize("flags", [set(), {"avx512_bf16"}])
def test_many_tokens_are_multiplied_in_bf16_where_the_processor_can(
    flags: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "cpu_flags", lambda: frozenset(flags))
    x = torch.zeros(1, dtype=torch.bfloat16)
    assert quantized.float_type(x) == (torch.bfloat16 if flags else torch.float32)
    assert quantized.float_type(x.half()) == torch.float32
    layer, x = packed("int4", linear(50, 64)), given("int4", 128, 64)
    want = F.linear(x.float(), layer.dequantized(), layer.bias.float())
    assert (layer(x).float() - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("kind", ["dynamic", "matmul"])
def test_what_stands_beside_a_token_does_not_change_it(kind: str) -> None:
    """A token a thousand times larger would leave the others no steps, with one scale a call."""
    layer = packed(kind, linear(50, 64))
    x = given(kind, 5, 64)
    x[2] *= 1000
    together, alone = layer(x), torch.cat([layer(row[None]) for row in x])
    assert ((together - alone).norm(dim=1) < 0.015 * alone.norm(dim=1)).all()


def test_a_static_range_clips_what_lies_outside() -> None:
    layer = StaticInt8Linear(ROWS.quantize(torch.eye(8)), None, low=-1.0, high=2.0)
    x = torch.tensor([[-5.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 9.0]])
    assert torch.allclose(layer(x), x.clamp(-1, 2), atol=3 / 255)


@every_kind
def test_no_token_at_all_gives_none(kind: str) -> None:
    layer = packed(kind, linear(20, 64))
    assert layer(given(kind, 1, 0, 64)).shape == (1, 0, 20)


@every_kind
def test_a_copy_computes_the_same(kind: str) -> None:
    layer, x = packed(kind, linear(20, 64)), given(kind, 3, 64)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@every_kind
def test_packing_warns_of_nothing(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed(kind, linear(16, 32)).numbers()


@every_kind
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-12])
def test_rows_of_one_value_stay_that_value(kind: str, value: float) -> None:
    layer = nn.Linear(64, 32, bias=False).requires_grad_(False)
    layer.weight.fill_(value)
    x = torch.ones(1, 64) if kind in INTEGER else torch.ones(1, 64).bfloat16()
    got = packed(kind, layer)(x).float()
    assert torch.allclose(got, torch.full_like(got, 64 * value), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("grid", [HALF_ROWS, Grid(4, 32), Grid(3, 32)], ids=str)
def test_an_embedding_gives_the_rows_of_its_numbers(grid: Grid) -> None:
    numbers = grid.quantize(linear(331, 96, bias=False).weight)
    ids = torch.tensor([[5, 330], [0, 5]])
    own = PackedEmbedding(numbers, torch.bfloat16, tied=False)
    assert torch.equal(own(ids), numbers.dequantized()[ids].bfloat16())
    assert own.packed_bytes == own.looked_up_bytes == numbers.stored_bytes == stored_bytes(own)
    again = PackedEmbedding.restored(own.stored(), json.loads(json.dumps(own.settings())))
    assert torch.equal(again(ids), own(ids))
    assert own(ids[:0]).shape == (0, 2, 96)


@every_kind
def test_a_tied_embedding_is_stored_with_the_head_alone(kind: str) -> None:
    head = packed(kind, linear(331, 96, bias=False))
    tied = PackedEmbedding(head.numbers(), torch.float32, tied=True)
    both = nn.ModuleDict({"embedding": tied, "head": head})
    assert stored_bytes(both) == stored_bytes(head)
    again = PackedEmbedding.restored(tied.stored(), json.loads(json.dumps(tied.settings())))
    again.complete(head)
    ids = torch.arange(331)
    assert torch.equal(again(ids), tied(ids))
    assert torch.equal(again(ids), head.dequantized())


@pytest.mark.parametrize("engine", ["qnnpack", "fbgemm", "x86"])
def test_int8_is_the_same_with_every_kernel_of_torch(engine: str) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this build of torch has no {engine}")
    before = torch.backends.quantized.engine
    layer, x = linear(48, 64), given("dynamic", 4, 64, seed=3)
    try:
        torch.backends.quantized.engine = engine
        got = eight(layer)(x)
        assert torch.backends.quantized.engine == engine
    finally:
        torch.backends.quantized.engine = before
    want = layer(x)
    assert (got - want).norm() / want.norm() < 0.02  # 8 bits of both factors: 0.01 was seen


def test_int8_chooses_a_kernel_where_torch_has_chosen_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac, where torch starts with the engine ``none``."""

    class Backend:
        supported_engines = ("none", "qnnpack")
        engine = "none"

    monkeypatch.setattr(torch.backends, "quantized", Backend)
    quantized.choose_engine()
    assert Backend.engine == "qnnpack"
    Backend.supported_engines = ("none",)
    with pytest.raises(InvalidInput, match="no int8 kernels"):
        quantized.choose_engine()


@pytest.mark.parametrize(
    ("machine", "flags", "reduced"),
    [
        ("x86_64", {"avx2"}, True),
        ("x86_64", {"avx2", "avx_vnni"}, True),
        ("x86_64", {"avx2", "avx512_vnni"}, False),
        ("x86_64", set(), True),
        ("arm64", set(), False),
    ],
)
def test_activations_keep_to_7_bits_where_16_bit_sums_would_overflow(
    machine: str, flags: set[str], reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized.platform, "machine", lambda: machine)
    monkeypatch.setattr(quantized, "cpu_flags", lambda: frozenset(flags))
    assert quantized.reduces_range() is reduced
    layer = StaticInt8Linear(ROWS.quantize(torch.eye(8)), None, low=-1.0, high=1.0)
    assert layer.zero in ((63, 64) if reduced else (127, 128))
    x = torch.linspace(-2, 2, 8)[None]
    assert torch.allclose(layer(x), x.clamp(-1, 1), atol=2 / 127)


def test_sums_of_the_largest_products_do_not_overflow() -> None:
    """All products at their largest: the case that 16-bit sums clip to a half."""
    layer = nn.Linear(4096, 8, bias=False).requires_grad_(False)
    layer.weight.fill_(1.0)
    x = torch.ones(3, 4096)
    assert torch.allclose(eight(layer)(x), torch.tensor(4096.0))
    numbers = ROWS.quantize(layer.weight)
    assert torch.allclose(StaticInt8Linear(numbers, None, 0.0, 1.0)(x), torch.tensor(4096.0))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 63, 65, 331, 600])
def test_the_int4_operation_reads_the_codes_as_they_are_meant(rows: int, group: int) -> None:
    """One-hot inputs give the weights; the operation rounds once, to bf16: 2⁻⁸ of the value."""
    layer = four(linear(rows, 2 * group, bias=False, seed=rows), group)
    seen = layer.few(torch.eye(2 * group, dtype=torch.bfloat16)).float().T
    assert seen.shape == (rows, 2 * group)
    assert torch.allclose(seen, layer.dequantized(), rtol=2**-7, atol=1e-6)


def test_an_order_of_4_bit_codes_that_is_not_known_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nibbles(octets: torch.Tensor, *, halves: bool) -> torch.Tensor:
        return octets.new_zeros(32, 128)

    monkeypatch.setattr(quantized, "nibbles", nibbles)
    with pytest.raises(InvalidInput, match="in an order that is not known here"):
        quantized.int4_layout.__wrapped__()


def test_int8_takes_the_bytes_that_it_says() -> None:
    """Against the memory of this process, as the packed weights are out of Python's sight.

    Blocks of 48 MiB come from the system, and what is freed is given back before a look. A kernel
    that keeps a second copy takes twice what is said, fp32 four times.
    """
    rows, columns = 8192, 6144
    codes = torch.randint(1, 256, (rows, columns), dtype=torch.uint8)
    numbers = Quantized(8, codes, torch.rand(rows, 1))
    Int8Linear(numbers, None).make_ready()  # the first call loads libraries
    process = psutil.Process()
    trim_heap()
    before = process.memory_info().rss
    made = Int8Linear(numbers, None)
    made.make_ready()
    trim_heap()
    grown = process.memory_info().rss - before
    assert made.packed_bytes == int8_bytes(rows, columns, False)
    assert 0.95 * made.packed_bytes < grown < 1.16 * made.packed_bytes


@pytest.mark.parametrize("ready", [True, False])
def test_an_int8_layer_is_the_same_before_and_after_it_is_made_ready(ready: bool) -> None:
    codes = torch.randint(1, 256, (24, 32), dtype=torch.uint8)
    numbers = Quantized(8, codes, torch.rand(24, 1))
    layer, x = Int8Linear(numbers, None), torch.randn(3, 32)
    held = layer.packed_bytes
    if ready:
        layer.make_ready()
    assert torch.equal(layer.numbers().codes, codes)
    once = layer(x)
    assert torch.equal(layer(x), once)
    assert torch.equal(layer.numbers().codes, codes)
    assert layer.packed_bytes == held


class Tiles:
    """Stands for CUDA's two 4-bit operations: keeps the codes, and multiplies in float."""

    def convert(self, pairs: torch.Tensor, tiles: int) -> torch.Tensor:
        assert pairs.dtype == torch.uint8
        assert pairs.shape[1] * 2 % (tiles * 16) == 0
        assert pairs.shape[0] % 8 == 0
        return pairs

    def multiply(
        self, x: torch.Tensor, pairs: torch.Tensor, group: int, scales: torch.Tensor
    ) -> torch.Tensor:
        assert x.dtype == scales.dtype == torch.bfloat16
        codes = torch.stack((pairs >> 4, pairs & 15), dim=2).flatten(1).float() - 8
        scale, zero = scales.float().repeat_interleave(group, dim=0).unbind(2)
        return (x.float() @ (codes.T * scale + zero)).bfloat16()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("columns", [128, 192])
def test_what_cuda_is_given_is_the_layer(
    bits: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for its operations; the product and the numbers must be those of the CPU."""
    monkeypatch.setattr(
        torch.ops.aten, "_convert_weight_to_int4pack", Tiles().convert, raising=False
    )
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", Tiles().multiply, raising=False)
    weight = linear(48, columns, bias=False)
    numbers = Grid(bits, 64).quantize(weight.weight)
    tiled, plain = TiledInt4Linear(numbers, None), Int4Linear(numbers, None)
    assert torch.equal(tiled.numbers().codes, numbers.codes)
    x = given("int4", 2, 3, columns)
    assert (tiled(x) - plain(x)).abs().max() <= 2**-7 * plain(x).abs().max()
    assert stored_bytes(tiled) == stored_bytes(plain)
