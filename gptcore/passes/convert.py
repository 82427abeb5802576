"""Replace the block projections of a model one by one, and say how far that went."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from gptcore.passes.base import Coverage, PassContext, refuse_nan
from gptcore.passes.calibrate import HESSIAN, Statistic, Statistics, calibrate, named_linears

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptcore.model import GPT

Convert = Callable[[str, "nn.Linear", "Statistics | None"], "nn.Module | str"]
"""Given a name, a layer, and what reaches it: what replaces it, or why it is left."""


def convert_projections(
    model: GPT,
    context: PassContext,
    convert: Convert,
    *,
    ids: Tensor | None = None,
    statistics: Collection[Statistic] = HESSIAN,
) -> Coverage:
    """Replace every linear layer of the blocks by what ``convert`` makes of it.

    Args:
        model: its modules are replaced, its tensors never written to.
        context: told the progress.
        convert: called once a layer, in order; gradients are off.
        ids: (N, T), the calibration text, where ``convert`` wants to know what reaches a layer.
        statistics: what it wants to know.

    Raises:
        NumericalError: a weight is NaN or infinite, or the text leads to some.
        InvalidInput: the text does not suit the model.
    """
    import torch

    from gptcore.linears import resident_bytes, stored_bytes

    fresh: list[nn.Module] = []
    skipped = [("head", "passes on blocks leave the output head as it is")]
    converted = 0

    def visit(name: str, linear: nn.Linear, seen: Statistics | None) -> nn.Module | None:
        nonlocal converted
        refuse_nan(name, linear.weight)
        made = convert(name, linear, seen)
        if isinstance(made, str):
            skipped.append((name, made))
            return None
        fresh.append(made)
        converted += linear.weight.numel()
        return made

    total = _matmul_weights(model)
    skipped += _foreign(model)
    if ids is not None:
        calibrate(model, ids, visit, progress=context.progress, statistics=statistics)
    else:
        layers = named_linears(model.blocks, "blocks")
        with torch.no_grad():
            for done, (name, linear) in enumerate(layers):
                context.progress(done / len(layers))
                if (made := visit(name, linear, None)) is not None:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, made)
        context.progress(1.0)
    return Coverage(
        converted,
        total,
        tuple(skipped),
        stored_bytes=sum(map(stored_bytes, fresh)),
        resident_bytes=sum(map(resident_bytes, fresh)),
    )


def _projections(model: GPT) -> list[tuple[str, nn.Module, int]]:
    """Return (name, module, weights of its kind by the spec) of all projections of the blocks."""
    return [
        (
            f"blocks.{layer}.{part}.{one.name}",
            parent.get_submodule(one.name),
            one.rows * one.columns,
        )
        for layer, block in enumerate(model.blocks)
        for one in model.spec.linears[:-1]
        for part in ("attention" if one.name in ("q", "k", "v", "out") else "mlp",)
        for parent in (block.get_submodule(part),)
    ]


def _foreign(model: GPT) -> list[tuple[str, str]]:
    """Return the projections that another pass took before, so that no linear layer is left."""
    return [
        (name, f"{type(one).__name__} of an earlier pass is no plain linear layer")
        for name, one, _ in _projections(model)
        if not named_linears(one, name)
    ]


def _matmul_weights(model: GPT) -> int:
    total = model.spec.linears[-1].rows * model.spec.linears[-1].columns
    for name, one, weights in _projections(model):
        layers = named_linears(one, name)
        total += sum(linear.weight.numel() for _, linear in layers) if layers else weights
    return total
