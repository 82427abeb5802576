"""Clustering: against the best tables of small rows, packed and back, and by its bytes."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gptcore.errors import InvalidInput, NumericalError
from gptcore.linears import codes, resident_bytes, stored_bytes
from gptcore.linears.clustered import (
    ClusteredEmbedding,
    ClusteredLinear,
    Clusters,
    PackedClusteredLinear,
    nearest,
)
from gptcore.measure.memory import weight_bytes
from gptcore.passes.base import Pass
from gptcore.passes.calibrate import inverse_factor
from gptcore.passes.cluster import Cluster, compensated, tables
from gptcore.spec import ModelSpec
from tests.passes.small import GPT2, LLAMA, SHAPES, UNTIED, applied, kl, logits, made, placed, text

every_shape = pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)


def normal(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(row: torch.Tensor, table: torch.Tensor, importance: torch.Tensor) -> float:
    """Return the weighted squared error of the best choice from a table."""
    return (importance * (row[:, None] - table).square().amin(1)).sum().item()


def best_error(row: torch.Tensor, importance: torch.Tensor, clusters: int) -> float:
    """Return the least error of all ways to cut a sorted row into that many parts."""
    row, order = row.sort()
    importance = importance[order]
    found = []
    for cuts in itertools.combinations(range(1, len(row)), clusters - 1):
        parts = [range(a, b) for a, b in itertools.pairwise((0, *cuts, len(row)))]
        total = 0.0
        for part in parts:
            values, counts = row[list(part)], importance[list(part)]
            centre = (values * counts).sum() / counts.sum()
            total += (counts * (values - centre).square()).sum().item()
        found.append(total)
    return min(found)


@pytest.mark.parametrize("weighted", [True, False])
def test_tables_come_near_the_best_of_all(weighted: bool) -> None:
    """Lloyd's iterations end in some minimum, but never far from the best over 12 rows."""
    values = normal(12, 14)
    importance = torch.logspace(-1, 1, 14) if weighted else None
    counts = torch.ones(14) if importance is None else importance
    found = tables(values, importance, 4, shared=False)
    assert found.shape == (12, 4)
    assert (found.diff(dim=1) >= 0).all()
    ours = [error(row, table, counts) for row, table in zip(values, found, strict=True)]
    best = [best_error(row, counts, 4) for row in values]
    assert all(one >= other * 0.9999 for one, other in zip(ours, best, strict=True))
    assert sum(ours) <= 1.25 * sum(best)
    even = [torch.linspace(row.min(), row.max(), 4) for row in values]
    linear = [error(row, table, counts) for row, table in zip(values, even, strict=True)]
    assert sum(ours) < 0.7 * sum(linear)


def test_a_shared_table_is_that_of_all_values_in_one_row() -> None:
    values, importance = normal(6, 10), torch.logspace(-1, 1, 10)
    shared = tables(values, importance, 8, shared=True)
    assert shared.shape == (1, 8)
    counts = importance.expand(6, 10).reshape(1, -1)
    ours = error(values.flatten(), shared[0], counts[0])
    rows = tables(values, importance, 8, shared=False)
    alone = sum(error(row, table, importance) for row, table in zip(values, rows, strict=True))
    assert alone < ours < error(values.flatten(), torch.linspace(-3, 3, 8), counts[0])


def test_few_distinct_values_are_kept_exactly() -> None:
    values = torch.tensor([[0.5, -1.0, 2.0] * 7, [3.0] * 21])
    found = tables(values, None, 4, shared=False)
    indices = nearest(values, found)
    assert Clusters.of(indices, found.half()).dense(torch.float32).equal(values)


def test_nearest_is_the_nearest() -> None:
    values, table = normal(9, 50), normal(9, 16, seed=2).sort(dim=1).values
    expected = (values[:, :, None] - table[:, None]).abs().argmin(2)
    assert nearest(values, table).long().equal(expected)
    one = (values[:, :, None] - table[0]).abs().argmin(2)
    assert nearest(values, table[:1]).long().equal(one)


@pytest.mark.parametrize("shared", [True, False])
def test_compensation_lowers_the_error_of_the_outputs(shared: bool) -> None:
    """More columns than are put off together, so that both updates are in it."""
    columns = 150
    x = normal(400, columns, seed=3)
    x = x + x.roll(1, 1) / 2
    hessian, values = x.T @ x / len(x), normal(12, columns)
    table = tables(values, None, 4, shared=shared)
    given = values.clone()
    rounded = nearest(values, table)
    chosen = compensated(values, table, inverse_factor(hessian, 0.01))
    assert values.equal(given)

    def loss(indices: torch.Tensor) -> float:
        gap = values - table.expand(12, -1).gather(1, indices.long())
        return (gap @ hessian * gap).sum().item()

    assert loss(chosen) < 0.8 * loss(rounded)


def test_inputs_that_are_independent_need_no_compensation() -> None:
    values = normal(5, 40)
    table = tables(values, None, 8, shared=False)
    chosen = compensated(values, table, inverse_factor(torch.eye(40), 0.01))
    assert chosen.equal(nearest(values, table))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (2, 8), (5, 19)])
def test_codes_are_packed_and_come_back(bits: int, rows: int, columns: int) -> None:
    random = torch.Generator().manual_seed(bits)
    given = torch.randint(0, 2**bits, (rows, columns), generator=random)
    packed = codes.pack(given, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, bits * -(-columns // 8) if bits < 8 else columns)
    assert codes.unpack(packed, bits, columns).long().equal(given)


def test_16_clusters_are_really_4_bits() -> None:
    clusters = Clusters.of(torch.zeros(6, 64, dtype=torch.uint8), torch.zeros(6, 16).half())
    assert clusters.packed.nbytes == 6 * 64 // 2
    assert clusters.table.nbytes == 6 * 16 * 2
    assert clusters.nbytes == 6 * 64 // 2 + 6 * 16 * 2


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [ClusteredLinear, PackedClusteredLinear])
def test_a_stored_layer_comes_back_bit_for_bit(
    kind: type, dtype: torch.dtype, bias: bool, shared: bool
) -> None:
    table_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    table = tables(normal(12, 21), None, 16, shared=shared).to(table_dtype)
    clusters = Clusters.of(nearest(normal(12, 21), table.float()), table)
    shift = normal(1, 12)[0].to(dtype) if bias else None
    layer = kind(clusters, shift, dtype)
    back = kind.restored(layer.stored(), json.loads(json.dumps(layer.settings())))
    x = normal(2, 21, seed=4).to(dtype)
    assert back(x).equal(layer(x))
    assert back(x).dtype == dtype
    assert torch.allclose(layer(x), F.linear(x, clusters.dense(dtype), shift), rtol=1e-2, atol=1e-2)
    assert stored_bytes(layer) <= clusters.nbytes + (12 * dtype.itemsize if bias else 0)


def test_packed_and_unpacked_layers_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of 5 rows, so that rows and their tables must be cut alike."""
    monkeypatch.setattr("gptcore.linears.clustered.ROWS_AT_ONCE", 5)
    table = tables(normal(12, 21), None, 8, shared=False).half()
    clusters = Clusters.of(nearest(normal(12, 21), table.float()), table)
    x, shift = normal(3, 21, seed=4), normal(1, 12)[0]
    dense = ClusteredLinear(clusters, shift, torch.float32)
    packed = PackedClusteredLinear(clusters, shift, torch.float32)
    assert torch.allclose(dense(x), packed(x), atol=1e-5)


def test_a_stored_embedding_comes_back_bit_for_bit() -> None:
    table = tables(normal(40, 6), None, 16, shared=True).half()
    layer = ClusteredEmbedding(
        Clusters.of(nearest(normal(40, 6), table.float()), table), torch.float32
    )
    back = ClusteredEmbedding.restored(layer.stored(), layer.settings())
    assert back.weight.equal(layer.weight)
    assert back(torch.tensor([3, 39])).equal(layer.weight[[3, 39]])


@every_shape
@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_every_projection_has_few_values(spec: ModelSpec, scope: str) -> None:
    one = Cluster(scope=scope)
    model, coverage = applied(one, made(spec), text(spec))
    for name, _ in model.linears():
        weight = model.get_submodule(name).weight
        found = [weight] if scope == "tensor" else list(weight)
        assert max(len(rows.unique()) for rows in found) <= 16, name
    assert 100 < len(model.embedding.weight.unique()) <= 256
    assert coverage.ratio == 1.0
    assert coverage.skipped == ()
    assert (model.head.weight is model.embedding.weight) is spec.tied_head
    assert one.weights_bytes_after(spec, placed(), 1000) == 1000
    assert weight_bytes(model)[0] == spec.weights_bytes("fp32")


def test_stored_bytes_are_codes_tables_and_what_is_left() -> None:
    model, coverage = applied(Cluster(), made(LLAMA), text(LLAMA))
    blocks = 3 * (2 * 48 * 48 + 2 * 16 * 48 + 3 * 96 * 48)
    rows = 3 * (48 + 2 * 16 + 48 + 2 * 96 + 48)
    embedding = 199 * 48 + len(model.embedding.weight.unique()) * 2
    assert coverage.stored_bytes == blocks // 2 + rows * 16 * 2 + embedding
    assert coverage.converted_weights == blocks + 199 * 48
    assert stored_bytes(model) == coverage.stored_bytes + 7 * 48 * 4
    assert coverage.resident_bytes == 4 * (blocks + 199 * 48)


def test_packed_in_memory_takes_the_predicted_bytes_and_computes_the_same() -> None:
    one = Cluster(unpacked=False)
    packed, coverage = applied(one, made(UNTIED), text(UNTIED))
    unpacked, _ = applied(Cluster(), made(UNTIED), text(UNTIED))
    before = UNTIED.weights_bytes("fp32")
    assert one.weights_bytes_after(UNTIED, placed(), before) == weight_bytes(packed)[0]
    assert resident_bytes(packed) == weight_bytes(packed)[0] < 0.5 * before
    assert stored_bytes(packed) == stored_bytes(unpacked)
    ids = text(UNTIED)[:2]
    assert torch.allclose(logits(packed, ids), logits(unpacked, ids), atol=1e-4)
    assert coverage.resident_bytes < 4 * coverage.converted_weights


@every_shape
def test_weights_and_compensation_help(spec: ModelSpec) -> None:
    exact, other = made(spec), text(spec, seed=8)[:8]

    def damage(**fields: object) -> float:
        one = Cluster(clusters=4, embedding=False, **fields)
        return kl(exact, applied(one, made(spec), text(spec))[0], other)

    assert damage() < 0.9 * damage(compensated=False)
    assert damage(scope="row") < damage(scope="tensor")


def test_more_clusters_do_less_harm() -> None:
    exact, other = made(LLAMA), text(LLAMA, seed=8)[:8]
    found = [
        kl(exact, applied(Cluster(clusters=n), made(LLAMA), text(LLAMA))[0], other)
        for n in (4, 16, 256)
    ]
    assert found[2] < 0.1 * found[1] < 0.1 * found[0]


def test_what_has_few_values_already_is_changed_in_no_bit() -> None:
    """A table of 256 holds the 16 values of every row."""
    model, _ = applied(Cluster(compensated=False, embedding=False), made(LLAMA), text(LLAMA))
    weights = [one.weight.clone() for _, one in model.linears()]
    ids = text(LLAMA)[:2]
    before = logits(model, ids)
    again, _ = applied(
        Cluster(clusters=256, compensated=False, embedding=False), model, text(LLAMA)
    )
    assert all(
        old.equal(new.weight) for old, (_, new) in zip(weights, again.linears(), strict=True)
    )
    assert logits(again, ids).equal(before)


def test_the_same_text_and_seed_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcore.passes.cluster.SAMPLE", 2000)
    one, same = (applied(Cluster(), made(LLAMA), text(LLAMA))[0] for _ in range(2))
    other, _ = applied(Cluster(), made(LLAMA), text(LLAMA), seed=1)
    for name in ("embedding", "blocks.2.mlp.down"):
        assert one.get_submodule(name).weight.equal(same.get_submodule(name).weight)
    assert not one.embedding.weight.equal(other.embedding.weight)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", [LLAMA, UNTIED], ids=["llama", "untied"])
def test_no_tensor_that_came_in_is_written_to(spec: ModelSpec, precision: str) -> None:
    model = made(spec, precision)
    given = dict(model.named_parameters())
    copies = {name: tensor.clone() for name, tensor in given.items()}
    model, _ = applied(Cluster(), model, text(spec))
    assert all(tensor.equal(copies[name]) for name, tensor in given.items())
    assert {p.dtype for p in model.parameters()} == {model.norm.weight.dtype}


def test_nan_and_a_missing_text_are_refused_in_a_sentence() -> None:
    model = made(LLAMA)
    model.blocks[0].mlp.up.weight[3, 5] = float("nan")
    with pytest.raises(NumericalError, match=r"^blocks\.0\.mlp\.up holds NaN"):
        applied(Cluster(), model, text(LLAMA))
    model = made(UNTIED)
    model.head.weight[3, 5] = float("inf")
    with pytest.raises(NumericalError, match=r"^head holds NaN or infinite"):
        applied(Cluster(), model, text(UNTIED))
    with pytest.raises(InvalidInput, match="choose a calibration text"):
        applied(Cluster(), made(LLAMA))
    bare = Cluster(weighted=False, compensated=False)
    assert not bare.needs_calibration
    assert applied(bare, made(GPT2))[1].ratio == 1.0


def test_a_head_of_an_earlier_pass_is_left_and_named() -> None:
    class Foreign(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = made(LLAMA)
    model.head = Foreign()
    one: Pass = Cluster(weighted=False, compensated=False)
    model, coverage = applied(one, model)
    assert isinstance(model.embedding, ClusteredEmbedding)
    assert [name for name, _ in coverage.skipped] == ["head"]
