"""Let the weights of each block projection be few shared values, found by weighted k-means.

Weights are clustered row by row (or all of a layer together) on a line: Lloyd's iterations over
sorted values with running sums, so that a step costs no more than the number of clusters. Each
weight counts with the mean square of its input, the diagonal of the Hessian, as SqueezeLLM (Kim et
al. 2023, arXiv:2306.07629) does with Fisher information. Compensation goes through the columns as
GPTQ does (Frantar et al. 2022, arXiv:2210.17323): what rounding a weight to its cluster changes,
those still to come make up for.

Letters of shapes: R rows, C columns, K clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from gptcore.device import Placement
from gptcore.passes.base import Coverage, Pass, PassContext, Stage, refuse_nan
from gptcore.passes.calibrate import Inverses, Statistics, text_for
from gptcore.passes.convert import convert_projections
from gptcore.spec import BYTES, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gptcore.linears.clustered import Clusters
    from gptcore.model import GPT

ITERATIONS = 60
"""Lloyd's steps; on trained layers the loss moved by less than 0.1 % after 40."""
SAMPLE = 2**20
"""Weights of an embedding that its clusters are found from."""
EMBEDDING_CLUSTERS = 256
ROWS_AT_ONCE = 4096
"""Rows of an embedding that are clustered together."""
COLUMNS_AT_ONCE = 128
"""Columns whose effect on later ones is put off, as in SparseGPT."""
DAMPING = 0.01


class Cluster(Pass):
    """Few values for all weights of a row, and the number of one for each weight."""

    name: ClassVar[str] = "cluster"
    stage: ClassVar[Stage] = Stage.NUMBERS
    title: ClassVar[str] = "Clustering"
    mechanism: ClassVar[str] = (
        "storage only: packed codes and tables on disk; the weights are unpacked to be computed "
        "with, so no change in speed is expected"
    )

    clusters: Literal[4, 8, 16, 32, 64, 128, 256] = Field(
        16, title="Clusters", description="Values of a table: 16 take 4 bits a weight."
    )
    scope: Literal["row", "tensor"] = Field(
        "row", title="Table for", description="A table for every row, or one for the whole layer."
    )
    weighted: bool = Field(
        True,
        title="Weighted by inputs",
        description="Weights with large inputs count for more; needs a calibration text.",
    )
    compensated: bool = Field(
        True,
        title="Compensated",
        description="Later columns make up for the rounding of earlier ones, as in GPTQ; needs a "
        "calibration text.",
    )
    embedding: bool = Field(
        True,
        title="Embedding too",
        description="Cluster the token embedding, and a head of its own, with 256 values in all: "
        "8 bits a weight.",
    )
    unpacked: bool = Field(
        True,
        title="Unpacked in memory",
        description="As fast and as large in memory as before; else packed in memory too, and "
        "unpacked at every call, which is much slower.",
    )

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at inputs."""
        return self.weighted or self.compensated

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the resident bytes: what they were, or those of the packed layers."""
        if self.unpacked:
            return before
        size = BYTES[placement.precision]
        saved = 0
        for one in spec.linears[:-1]:
            tables = one.rows if self.scope == "row" else 1
            bits = (self.clusters - 1).bit_length()
            packed = one.rows * -(-one.columns // 8) * bits + tables * self.clusters * 2
            saved += (one.rows * one.columns * size - packed) * one.count
        return before - saved

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Replace every block projection, and the embedding where it is wanted.

        Raises:
            InvalidInput: there is no calibration text, or too little.
            NumericalError: a weight is NaN or infinite, or the text leads to some.
        """
        from gptcore.linears.clustered import ClusteredLinear, PackedClusteredLinear

        inverses = Inverses(DAMPING)
        kind = ClusteredLinear if self.unpacked else PackedClusteredLinear

        def convert(name: str, linear: nn.Linear, seen: Statistics | None) -> nn.Module:
            clusters = self._clusters(linear.weight.detach(), seen, inverses)
            return kind(clusters, linear.bias, linear.weight.dtype)

        ids = text_for(self, context) if self.needs_calibration else None
        coverage = convert_projections(model, context, convert, ids=ids)
        if self.embedding:
            coverage = self._with_embedding(model, coverage, context.seed)
        context.coverage[self.name] = coverage
        return model

    def _clusters(self, weight: Tensor, seen: Statistics | None, inverses: Inverses) -> Clusters:
        from gptcore.linears.clustered import Clusters, nearest

        values = weight.float()
        importance = None
        if self.weighted and seen is not None and seen.hessian is not None:
            importance = seen.hessian.diagonal()
        table = tables(values, importance, self.clusters, shared=self.scope == "tensor")
        table = table.to(table_dtype(weight.dtype)).float()
        if self.compensated and seen is not None:
            indices = compensated(values, table, inverses.of(seen))
        else:
            indices = nearest(values, table)
        return Clusters.of(indices, table.to(table_dtype(weight.dtype)))

    def _with_embedding(self, model: GPT, coverage: Coverage, seed: int) -> Coverage:
        """Cluster the token embedding and the head; a tied head goes on sharing its weights."""
        from torch import nn

        from gptcore.linears import resident_bytes, stored_bytes
        from gptcore.linears.clustered import ClusteredEmbedding, ClusteredLinear

        head, weight = model.head, model.embedding.weight
        refuse_nan("embedding", weight)
        model.embedding = ClusteredEmbedding(sampled(weight.detach(), seed), weight.dtype)
        fresh: nn.Module = model.embedding
        if getattr(head, "weight", None) is weight:
            head.weight = model.embedding.weight
        elif isinstance(head, nn.Linear):
            refuse_nan("head", head.weight)
            clusters = sampled(head.weight.detach(), seed)
            model.head = fresh = ClusteredLinear(clusters, head.bias, weight.dtype)
        else:
            return coverage
        assert coverage.stored_bytes is not None
        assert coverage.resident_bytes is not None
        return Coverage(
            coverage.converted_weights + head.weight.numel(),
            coverage.total_weights,
            tuple(one for one in coverage.skipped if one[0] != "head"),
            coverage.stored_bytes + stored_bytes(fresh),
            coverage.resident_bytes + resident_bytes(fresh),
        )


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what a table is kept in: bfloat16 for such layers, else float16."""
    import torch

    return dtype if dtype == torch.bfloat16 else torch.float16


def tables(values: Tensor, importance: Tensor | None, clusters: int, *, shared: bool) -> Tensor:
    """Return the k-means centres of every row, or of all rows together.

    Lloyd's iterations end in the nearest minimum, so they are begun three times: with centres that
    are equally far apart, so that the few large weights have their own; with as many weights for
    each; and with as much importance for each. A row takes what ends best.

    Args:
        values: (R, C) float32.
        importance: (C,), what a squared error in each column counts; all the same where None.
        clusters: K.
        shared: one table for all rows.

    Returns:
        (R, K) or (1, K) float32, every row rising.
    """
    import torch

    counts = torch.ones_like(values) if importance is None else importance.expand_as(values)
    if shared:
        values, counts = values.reshape(1, -1), counts.reshape(1, -1)
    ordered, order = values.sort(dim=1)
    line = _Line(ordered, counts.gather(1, order))
    steps = torch.linspace(0, 1, clusters, device=values.device)
    low, high = ordered[:, :1], ordered[:, -1:]
    share = line.counts[:, 1:] / line.counts[:, -1:]  # (R, C), rising to 1
    last = values.shape[1] - 1
    heavy = torch.searchsorted(share, steps.double().expand(len(share), -1).contiguous())
    starts = (
        low + (high - low) * steps,
        ordered[:, (last * steps).round().long()],
        ordered.gather(1, heavy.clamp(max=last)),
    )
    best, least = starts[0], torch.full_like(share[:, 0], torch.inf)
    for start in starts:
        settled = line.settled(start)
        loss = line.loss(settled)  # (R,)
        best = torch.where((loss < least)[:, None], settled, best)
        least = torch.minimum(loss, least)
    return best


class _Line:
    """Weights of each row on a line, sorted, with running sums: (R, C + 1) in float64."""

    def __init__(self, ordered: Tensor, counts: Tensor) -> None:
        from torch.nn import functional as F

        self.ordered = ordered
        counts, exact = counts.double(), ordered.double()
        self.counts = F.pad(counts.cumsum(1), (1, 0))
        self.sums = F.pad((counts * exact).cumsum(1), (1, 0))
        self.squares = F.pad((counts * exact.square()).cumsum(1), (1, 0))

    def settled(self, centres: Tensor) -> Tensor:
        """Return where Lloyd's iterations lead, (R, K); an empty cluster keeps its centre."""
        for _ in range(ITERATIONS):
            counts, sums = self._between(self.counts, centres), self._between(self.sums, centres)
            moved = (sums / counts).float().where(counts > 0, centres).sort(dim=1).values
            if moved.equal(centres):
                break
            centres = moved
        return centres

    def loss(self, centres: Tensor) -> Tensor:
        """Return the weighted squared error of each row, (R,)."""
        counts, sums = self._between(self.counts, centres), self._between(self.sums, centres)
        exact = centres.double()
        errors = exact.square() * counts - 2 * exact * sums
        return errors.sum(1) + self.squares[:, -1]

    def _between(self, running: Tensor, centres: Tensor) -> Tensor:
        """Return the sum over each centre's cluster, (R, K)."""
        import torch
        from torch.nn import functional as F

        middle = (centres[:, 1:] + centres[:, :-1]) / 2
        edges = torch.searchsorted(self.ordered, middle.contiguous())  # (R, K − 1)
        edges = F.pad(F.pad(edges, (1, 0)), (0, 1), value=self.ordered.shape[1])
        return running.gather(1, edges).diff(dim=1)


def compensated(values: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    """Return the cluster of each weight, chosen column by column as GPTQ rounds.

    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1, with a table in place of a grid.

    Args:
        values: (R, C) float32; not written to.
        table: (R, K) or (1, K) float32, every row rising.
        inverse: (C, C), see ``calibrate.inverse_factor``.

    Returns:
        (R, C) uint8.
    """
    import torch

    rows, columns = values.shape
    table = table.expand(rows, -1)
    middle = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
    # (C, R), so that a column is one piece of memory; a copy, also where there is only one row.
    moved = values.T.clone(memory_format=torch.contiguous_format)
    indices = torch.empty(columns, rows, dtype=torch.uint8, device=values.device)
    for begin in range(0, columns, COLUMNS_AT_ONCE):
        end = min(begin + COLUMNS_AT_ONCE, columns)
        now, factor = moved[begin:end], inverse[begin:end, begin:end]
        errors = torch.empty_like(now)
        for i in range(end - begin):
            chosen = torch.searchsorted(middle, now[i][:, None])  # (R, 1)
            indices[begin + i] = chosen[:, 0]
            errors[i] = (now[i] - table.gather(1, chosen)[:, 0]) / factor[i, i]
            now[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        moved[end:].addmm_(inverse[begin:end, end:].T, errors, alpha=-1)
    return indices.T.contiguous()


def sampled(weight: Tensor, seed: int) -> Clusters:
    """Return a large matrix with one table, whose values come from some of its weights."""
    import torch

    from gptcore.linears.clustered import Clusters, nearest

    flat = weight.flatten()
    if flat.numel() > SAMPLE:
        random = torch.Generator().manual_seed(seed)
        at = torch.randint(flat.numel(), (SAMPLE,), generator=random)
        flat = flat[at.to(flat.device)]
    table = tables(flat.float()[None], None, EMBEDDING_CLUSTERS, shared=True)
    kept = table.to(table_dtype(weight.dtype))
    indices = [nearest(part.float(), kept.float()) for part in torch.split(weight, ROWS_AT_ONCE)]
    return Clusters.of(torch.cat(indices), kept)
