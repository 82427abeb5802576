"""Run a text through a model block by block, and let a pass convert each block on what it saw.

The idea is that of GPTQ (Frantar et al. 2022, arXiv:2210.17323) and SparseGPT (Frantar and
Alistarh 2023, arXiv:2301.00774): a block is run on the calibration text, what reaches each linear
layer is summed up, the layers are converted, and the block is run again, so that the next one is
calibrated on what the converted ones before it really put out. Nothing but the hidden states of
the text and the sums of one block is in memory beside the model.

A pass uses it as::

    def visit(name, linear, seen):
        solved = solve(linear.weight, seen.hessian)
        return converted(solved, linear.bias)       # or None, to leave the layer as it is

    calibrate(model, text_for(self, context), visit, progress=context.progress)

Letters of shapes: N sequences of T tokens, B sequences at once, W model width, I inputs of a layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from gptcore.errors import InvalidInput, NumericalError
from gptcore.passes.base import Pass, PassContext

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptcore.model import GPT

LEAST_TOKENS = 1024
"""Calibration texts shorter than this are refused: what they say of a layer's inputs is chance."""
TOKENS_AT_ONCE = 2048
"""Tokens that run through a block together."""

Statistic = Literal["hessian", "moments"]
HESSIAN: tuple[Statistic, ...] = ("hessian",)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with Uᵀ·U = (H + damping · mean of H's diagonal · 1)⁻¹.

    Row i of U tells how the columns after i make up for a change of column i, once those before
    it are fixed: it is what GPTQ and SparseGPT step through.

    Args:
        hessian: (I, I), symmetric and not negative; not written to.
        damping: as ``root``.

    Returns:
        (I, I), in the Hessian's type.

    Raises:
        NumericalError: as ``root``.
    """
    import torch

    # The Cholesky factor of H read backwards is an upper one, L·Lᵀ = H, and U its inverse.
    lower = root(hessian.flip(0, 1), damping)
    one = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True)
    return factor


def root(hessian: Tensor, damping: float) -> Tensor:
    """Return the lower triangular S with S·Sᵀ = H + damping · mean of H's diagonal · 1.

    Args:
        hessian: (I, I), symmetric and not negative; not written to.
        damping: share of the mean curvature; raised tenfold, at most four times, where rounding
            leaves H not invertible.

    Raises:
        NumericalError: the Hessian holds NaN, or no damping helps.
    """
    import torch

    mean = hessian.diagonal().mean().item() or 1.0
    for more in range(5):
        damped = hessian.clone()
        damped.diagonal().add_(damping * 10**more * mean)
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.item() and lower.isfinite().all():
            return lower
    raise NumericalError(
        f"The inputs of a layer of {len(hessian):,} columns cannot be inverted: choose another "
        "calibration text, or more damping."
    )


@dataclass(frozen=True, slots=True)
class Statistics:
    """What reached a linear layer, over all tokens; shared by layers that share their input.

    The tensors are float32 on the model's device, and must not be written to: the query, key and
    value projections of a block are given the same ones. What was not asked for is None.
    """

    tokens: int
    """How many inputs were seen."""
    hessian: Tensor | None = None
    """(I, I): the mean of x·xᵀ, half the second derivative of a layer's mean squared error."""
    rms: Tensor | None = None
    """(I,): the root of the mean square of each input channel; √tokens · rms is its L2 norm."""
    mean_abs: Tensor | None = None
    """(I,): the mean magnitude of each input channel."""
    low: Tensor | None = None
    """(I,): the least value of each input channel."""
    high: Tensor | None = None
    """(I,): the greatest value of each input channel."""

    @property
    def absmax(self) -> Tensor | None:
        """(I,): the largest magnitude of each input channel."""
        return None if self.low is None or self.high is None else (-self.low).maximum(self.high)


class Inverses:
    """Factors of inverse Hessians; layers that share their inputs are given the same one."""

    def __init__(self, damping: float) -> None:
        self._damping = damping
        self._last: tuple[Statistics, Tensor] | None = None

    def of(self, seen: Statistics) -> Tensor:
        """Return the upper Cholesky factor of the damped Hessian's inverse, (I, I)."""
        assert seen.hessian is not None
        if self._last is None or self._last[0] is not seen:
            self._last = None
            self._last = (seen, inverse_factor(seen.hessian, self._damping))
        return self._last[1]


Visit = Callable[[str, "nn.Linear", Statistics], "nn.Module | None"]
"""Given a layer's name, the layer and what reached it; returns what replaces it, or None."""


def calibrate(
    model: GPT,
    ids: Tensor,
    visit: Visit,
    *,
    progress: Callable[[float], None],
    statistics: Collection[Statistic] = HESSIAN,
    wanted: Callable[[str], bool] = lambda name: True,
    head: bool = False,
) -> None:
    """Visit every linear layer of the blocks, in order, with what the text brings to it.

    Layers of one block are visited in the order of its modules, all with what the block saw before
    any of them was converted; the replaced ones are in force when the block is run again.

    Args:
        model: its modules are replaced, its tensors never written to.
        ids: (N, T) int64, T within the model's context.
        visit: called once a layer; may raise to stop.
        progress: told the share done; raises Cancelled where the user stopped the work.
        statistics: what to sum up: "hessian" fills ``hessian`` (and ``rms``, its diagonal's root),
            "moments" the (I,) fields.
        wanted: which layers to visit, by name; nothing is summed up for the others.
        head: visit the output head too, as ``head``, after the last block.

    Raises:
        InvalidInput: the text is no (N, T), longer than the context, or of another vocabulary.
        NumericalError: NaN or infinity came out of a block, which is named.
    """
    import torch
    from torch import nn

    with torch.no_grad():
        text = Residual(model, ids)
        steps = len(model.blocks) + head
        for layer, block in enumerate(model.blocks):
            tell = _part(progress, layer / steps, (layer + 1) / steps)
            name = f"blocks.{layer}"
            sums = _watch(
                named_linears(block, name),
                wanted,
                statistics,
                partial(text.run, layer, progress=_part(tell, 0.0, 0.4)),
            )
            _visit(model, named_linears(block, name), sums, visit, _part(tell, 0.4, 0.8))
            del sums
            text.advance(layer, progress=_part(tell, 0.8, 1.0))
        if head and isinstance(model.head, nn.Linear) and wanted("head"):
            tell = _part(progress, (steps - 1) / steps, 1.0)
            of_head = _Sums(statistics)
            for x in text.before_head(progress=tell):
                of_head.add(x.flatten(0, -2))
            _visit(model, [("head", model.head)], {"head": of_head}, visit, lambda share: None)
    progress(1.0)


def text_for(one: Pass, context: PassContext, *, least: int = LEAST_TOKENS) -> Tensor:
    """Return the calibration text that a pass was given, (N, T).

    Raises:
        InvalidInput: there is none, or it has fewer than ``least`` tokens.
    """
    ids = context.calibration_ids
    if ids is None:
        raise InvalidInput(
            f"{one.title} looks at how a text runs through the model, and was given none: choose a "
            "calibration text."
        )
    if ids.numel() < least:
        raise InvalidInput(
            f"The calibration text has {ids.numel():,} tokens, and {one.title.lower()} needs "
            f"{least:,} at least: choose a longer one."
        )
    return ids


def text_hash(ids: Tensor) -> str:
    """Return ``sha256:…`` of token ids and their arrangement in sequences."""
    rows = f"{tuple(ids.shape)}:".encode() + ids.long().cpu().contiguous().numpy().tobytes()
    return f"sha256:{hashlib.sha256(rows).hexdigest()}"


class Residual:
    """The hidden states of a text in front of one block, moved on block by block.

    Attributes:
        model: whose blocks it goes through.
        batches: each (B, T, W), in the model's dtype and on its device.
        where: positions and mask, the same for all.
    """

    def __init__(self, model: GPT, ids: Tensor) -> None:
        import torch

        if ids.ndim != 2 or not ids.numel():
            raise InvalidInput(
                f"A calibration text is an array of sequences × tokens, not {tuple(ids.shape)}."
            )
        if ids.shape[1] > model.spec.context:
            raise InvalidInput(
                f"The calibration text comes in sequences of {ids.shape[1]:,} tokens and this "
                f"model reads at most {model.spec.context:,}: cut it into shorter ones."
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= model.spec.vocabulary:
            raise InvalidInput(
                f"The calibration text has token id {low if low < 0 else high}, which is not in "
                f"the vocabulary of {model.spec.vocabulary:,}: use this model's own tokenizer."
            )
        self.model = model
        at_once = max(1, TOKENS_AT_ONCE // ids.shape[1])
        ids = ids.to(model.embedding.weight.device)
        self.batches = [model.enter(batch)[0] for batch in torch.split(ids, at_once)]
        self.where = model.enter(ids[:1])[1]

    def outputs(self, layer: int) -> Iterator[Tensor]:
        """Yield what a block makes of each batch, (B, T, W)."""
        for x in self.batches:
            yield self.model.blocks[layer](x, self.where, None, layer)

    def run(self, layer: int, *, progress: Callable[[float], None]) -> None:
        """Run a block on all batches and forget what comes out."""
        for i, _ in enumerate(self.outputs(layer), start=1):
            progress(i / len(self.batches))

    def advance(self, layer: int, *, progress: Callable[[float], None]) -> None:
        """Take what the block puts out as the hidden states.

        Raises:
            NumericalError: NaN or infinity is among it.
        """
        for i, x in enumerate(self.outputs(layer)):
            if not x.float().sum().isfinite():
                raise NumericalError(
                    f"NaN or infinity came out of block {layer} on the calibration text: choose "
                    "another model, precision or pass."
                )
            self.batches[i] = x
            progress((i + 1) / len(self.batches))

    def before_head(self, *, progress: Callable[[float], None]) -> Iterator[Tensor]:
        """Yield what the head is given of each batch, (B, T, W)."""
        for i, x in enumerate(self.batches, start=1):
            yield self.model.norm(x)
            progress(i / len(self.batches))


def named_linears(module: nn.Module, name: str) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers at and below a module, with their names in the whole model."""
    from torch import nn

    return [
        (below, one)
        for below, one in module.named_modules(prefix=name)
        if isinstance(one, nn.Linear)
    ]


def _part(tell: Callable[[float], None], begin: float, end: float) -> Callable[[float], None]:
    """Return a progress of its own for the part of a work that lies between two shares."""
    return lambda share: tell(begin + share * (end - begin))


class _Sums:
    """What reached a layer so far."""

    def __init__(self, statistics: Collection[Statistic]) -> None:
        self._statistics = statistics
        self._tokens = 0
        self._hessian: Tensor | None = None
        self._moments: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        """Sums of squares and of magnitudes, least and greatest values; each (I,)."""
        self._result: Statistics | None = None

    def add(self, x: Tensor) -> None:
        """Add inputs, (tokens, I)."""
        x = x.float()
        self._tokens += x.shape[0]
        if "hessian" in self._statistics:
            if self._hessian is None:
                self._hessian = x.new_zeros(x.shape[1], x.shape[1])
            self._hessian.addmm_(x.T, x)
        if "moments" in self._statistics:
            squares, magnitudes, (low, high) = x.square().sum(0), x.abs().sum(0), x.aminmax(dim=0)
            if self._moments is not None:
                before = self._moments
                squares, magnitudes = before[0] + squares, before[1] + magnitudes
                low, high = before[2].minimum(low), before[3].maximum(high)
            self._moments = squares, magnitudes, low, high

    def result(self) -> Statistics:
        """Return the means; always the same object, so that what is made of it can be kept."""
        if self._result is None:
            hessian = rms = mean_abs = low = high = None
            if self._moments is not None:
                squares, magnitudes, low, high = self._moments
                rms, mean_abs = (squares / self._tokens).sqrt(), magnitudes / self._tokens
            if self._hessian is not None:
                hessian = self._hessian.div_(self._tokens)
                rms = hessian.diagonal().sqrt()
            self._result = Statistics(self._tokens, hessian, rms, mean_abs, low, high)
        return self._result


def _watch(
    layers: Sequence[tuple[str, nn.Linear]],
    wanted: Callable[[str], bool],
    statistics: Collection[Statistic],
    run: Callable[[], None],
) -> dict[str, _Sums]:
    """Run a part of the model and return the sums of its wanted layers, by name.

    Layers that are given the very same tensor share their sums, and only the first adds to them.
    """
    sums: dict[str, _Sums] = {}
    adding: set[str] = set()
    first: list[tuple[Tensor, _Sums]] = []
    """Inputs of the first batch, held so that no other tensor can be mistaken for one."""

    def before(name: str, linear: nn.Module, given: tuple[Tensor, ...]) -> None:
        (x,) = given
        if name in adding:
            first.clear()
        elif name not in sums:
            shared = next((one for other, one in first if other is x), None)
            sums[name] = shared or _Sums(statistics)
            if shared is None:
                first.append((x, sums[name]))
                adding.add(name)
        if name in adding:
            sums[name].add(x.flatten(0, -2))

    hooks = [
        linear.register_forward_pre_hook(partial(before, name))
        for name, linear in layers
        if wanted(name)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _visit(
    model: GPT,
    layers: Sequence[tuple[str, nn.Linear]],
    sums: dict[str, _Sums],
    visit: Visit,
    progress: Callable[[float], None],
) -> None:
    visited = [(name, linear) for name, linear in layers if name in sums]
    for done, (name, linear) in enumerate(visited):
        progress(done / len(visited))
        replacement = visit(name, linear, sums[name].result())
        if replacement is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
