"""Put packed layers in the place of float ones, each in its own format, by one of three methods.

``round`` takes each weight to the nearest number of its grid and needs no text. ``gptq`` and
``awq`` look at what a calibration text brings to each layer; see ``gptq.py`` and ``awq.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from gptcore.passes import awq, gptq
from gptcore.passes.base import ROWS_AT_ONCE, Coverage, Pass, PassContext, refuse_nan
from gptcore.passes.calibrate import Statistics, calibrate, text_for
from gptcore.passes.folding import Folding, shared, sites
from gptcore.passes.formats import Format
from gptcore.passes.ranges import rounded

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gptcore.linears.quantized import PackedLinear
    from gptcore.model import GPT

Method = Literal["round", "gptq", "awq"]
Choose = Callable[[str, "nn.Linear"], "Format | str"]
"""Given a layer's name and the layer: its format, or why it is left as it is."""
Fill = Callable[["GPT", dict[str, Format], PassContext], None]
"""Replaces the layers of these names by packed ones in their formats."""


def pack_linears(model: GPT, choose: Choose, fill: Fill, context: PassContext) -> Coverage:
    """Replace the linear layers of a model by packed ones, the head included.

    They are replaced one by one and their float weights let go, so that the model is never in
    memory twice.

    Args:
        model: its modules are replaced, its tensors never written to.
        choose: called once a layer, in the order of the modules.
        fill: finds the codes and replaces the layers, see ``by_method``.
        context: has the calibration text, where the method looks at one, and is told the progress.

    Raises:
        NumericalError: a weight is NaN or infinite, which is named.
        InvalidInput: the calibration text is missing, too short, or of another model.
    """
    import torch
    from torch import nn

    from gptcore.linears import resident_bytes, stored_bytes

    formats: dict[str, Format] = {}
    skipped: list[tuple[str, str]] = []
    converted = total = 0
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        refuse_nan(name, linear.weight, partial(context.progress, 0.0))
        total += linear.weight.numel()
        found = choose(name, linear)
        if isinstance(found, str):
            skipped.append((name, found))
        else:
            formats[name] = found
            converted += linear.weight.numel()
    with torch.no_grad():
        fill(model, formats, context)
    context.progress(1.0)
    packed = [model.get_submodule(name) for name in formats]
    return Coverage(
        converted,
        total,
        tuple(skipped),
        stored_bytes=sum(map(stored_bytes, packed)),
        resident_bytes=sum(map(resident_bytes, packed)),
    )


def by_method(one: Pass, method: Method) -> Fill:
    """Return what replaces layers by that method, on the text that the pass was given."""
    if method == "round":
        return _round
    by_text = _gptq if method == "gptq" else _awq

    def fill(model: GPT, formats: dict[str, Format], context: PassContext) -> None:
        from gptcore.linears.wide import wide_products

        with wide_products(model):
            by_text(model, formats, context, text_for(one, context))

    return fill


def pack_embedding(model: GPT) -> None:
    """Pack the token embedding, as far as that takes less memory.

    One that is tied takes the numbers of the head, if that is packed; one that is not tied is
    rounded to 8 bits a weight.
    """
    from torch import nn

    from gptcore.linears.embedding import PackedEmbedding
    from gptcore.linears.grid import Grid
    from gptcore.linears.quantized import PackedLinear

    head, embedding = model.head, model.embedding
    assert isinstance(embedding, nn.Embedding)
    dtype = embedding.weight.dtype
    if not model.spec.tied_head:
        refuse_nan("embedding", embedding.weight)
        numbers = Grid(8, symmetric=True).quantize(embedding.weight.detach())
        replace(model, "embedding", PackedEmbedding(numbers, dtype, tied=False))
    elif isinstance(head, PackedLinear):
        replace(model, "embedding", PackedEmbedding(head.numbers(), dtype, tied=True))


def replace(model: nn.Module, name: str, by: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, by)


def _round(model: GPT, formats: dict[str, Format], context: PassContext) -> None:
    from torch import nn

    dtype, parts = next(model.norm.parameters()).dtype, len(formats) + 1
    for done, (name, format) in enumerate(formats.items()):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        progress = partial(_tell, context, done, parts)
        progress(0.0)
        numbers = format.grid().quantize(linear.weight.detach(), dtype, progress)
        replace(model, name, format.layer(numbers, linear.bias, context.placement.device))
        del linear, numbers
    for one in model.parameters():
        if one.dtype != dtype:
            one.data = _converted(one.detach(), dtype, partial(_tell, context, parts - 1, parts))


def _tell(context: PassContext, done: int, parts: int, ratio: float) -> None:
    """Tell how much is done, after so many parts and a share of the next."""
    context.progress((done + ratio) / parts)


def _converted(matrix: Tensor, dtype: torch.dtype, progress: Callable[[float], None]) -> Tensor:
    """Return a matrix in another type; after some rows each it may be let go of what was read."""
    found = matrix.new_empty(matrix.shape, dtype=dtype)
    for begin in range(0, len(matrix), ROWS_AT_ONCE):
        found[begin : begin + ROWS_AT_ONCE] = matrix[begin : begin + ROWS_AT_ONCE]
        progress(begin / len(matrix))
    return found


def _gptq(model: GPT, formats: dict[str, Format], context: PassContext, ids: Tensor) -> None:
    known: tuple[Statistics, gptq.Inputs] | None = None

    def visit(name: str, linear: nn.Linear, seen: Statistics) -> PackedLinear:
        nonlocal known
        assert seen.hessian is not None
        if known is None or known[0] is not seen:
            known = None  # let go before the next is made
            known = seen, gptq.Inputs.of(seen.hessian)
        numbers = gptq.solve(linear.weight.detach(), known[1], formats[name].grid())
        return formats[name].layer(numbers, linear.bias, context.placement.device)

    calibrate(
        model,
        ids,
        visit,
        progress=context.progress,
        wanted=formats.__contains__,
        head="head" in formats,
    )


def _awq(model: GPT, formats: dict[str, Format], context: PassContext, ids: Tensor) -> None:
    last = {name.rpartition(".")[0].rpartition(".")[0]: name for name in formats}
    """The layer of each block that is visited last."""
    pending: dict[str, Statistics] = {}

    def visit(name: str, linear: nn.Linear, seen: Statistics) -> PackedLinear | None:
        format, device = formats[name], context.placement.device
        if name == "head":
            assert seen.rms is not None
            numbers = rounded(linear.weight.detach(), seen.rms.square(), format.grid())
            return format.layer(numbers, linear.bias, device)
        block = name.rpartition(".")[0].rpartition(".")[0]
        pending[name.removeprefix(f"{block}.")] = seen
        if name != last[block]:
            return None
        own = {
            one.removeprefix(f"{block}."): formats[one]
            for one in formats
            if one.startswith(f"{block}.")
        }
        made = _awq_block(model, model.get_submodule(block), own, pending, device)
        pending.clear()
        result = made.pop(name.removeprefix(f"{block}."))
        for other, layer in made.items():
            replace(model, f"{block}.{other}", layer)
        return result

    calibrate(
        model,
        ids,
        visit,
        progress=context.progress,
        statistics=("hessian", "moments"),
        wanted=formats.__contains__,
        head="head" in formats,
    )


def _awq_block(
    model: GPT,
    block: nn.Module,
    formats: dict[str, Format],
    seen: dict[str, Statistics],
    device: str,
) -> dict[str, PackedLinear]:
    """Return the packed layers of a block by name; what else is scaled is changed in place."""
    folding = Folding(block, model.spec)
    importance: dict[str, Tensor] = {}
    for site in sites(model.spec):
        names = [name for name in site.layers if name in formats]
        if not names:
            continue
        known = seen[names[0]]
        assert known.hessian is not None
        assert known.mean_abs is not None
        squares = known.hessian.diagonal()
        if folding.can(site):
            scale = folding.add(
                site,
                awq.channel_scales(
                    [(folding.layer(name).weight.detach(), formats[name].grid()) for name in names],
                    known.hessian,
                    known.mean_abs,
                    share=partial(shared, spec=model.spec, site=site),
                ),
            )
            squares = squares / scale.square()
        importance |= dict.fromkeys(names, squares)
    made = {}
    for name, format in formats.items():
        weight, bias = folding.tensors(name)
        made[name] = format.layer(rounded(weight, importance[name], format.grid()), bias, device)
    folding.settle(keep=set(formats))
    return made
