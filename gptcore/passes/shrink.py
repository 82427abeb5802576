"""Make every block narrower: fewer neurons in its MLP, fewer groups of attention heads.

Every layer of the same spec keeps the same number, so the result is an ordinary, smaller model.
What is left out goes by what its loss costs once the rest has made up for it: with H the mean of
x·xᵀ of what reaches the layer behind, that is w·wᵀ / (H⁻¹)ᵢᵢ for a neuron and tr(W·((H⁻¹)_gg)⁻¹·Wᵀ)
for a group (Optimal Brain Surgeon, Hassibi and Stork 1993, on whole columns as in Kwon et al.
2022, arXiv:2204.09656). The layer behind changes as each goes: least squares with what is left.

A group is a key/value head with the query heads that share it, so grouped queries stay whole.

Letters of shapes: W model width, F neurons, G groups, D head width, J inputs of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.passes.base import Coverage, Pass, PassContext, Stage, refuse_nan
from gptcore.passes.calibrate import Statistics, calibrate, text_for
from gptcore.spec import BYTES, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptcore.model import GPT, Block

MULTIPLE = 32
"""Neurons are kept in such numbers, where there are enough, so that they can be quantized after."""
DAMPING = 0.01
ROUNDS = 32
"""How often the costs of what is left are taken anew while a layer is cut."""


class Shrink(Pass):
    """Narrower blocks: the neurons and heads that can best be done without are cut out."""

    name: ClassVar[str] = "shrink"
    stage: ClassVar[Stage] = Stage.SHAPE
    title: ClassVar[str] = "Shrink blocks"
    mechanism: ClassVar[str] = "fewer bytes moved and fewer operations; fewer heads need less cache"

    neurons: float = Field(
        0.9,
        ge=0.05,
        le=1.0,
        title="Neurons kept",
        description="Share of each MLP's neurons that stays, to the next 32; 1 keeps all.",
    )
    groups: float = Field(
        1.0,
        ge=0.05,
        le=1.0,
        title="Head groups kept",
        description="Share of the key/value heads, each with its query heads, that stays, to the "
        "next whole one; 1 keeps all.",
    )

    @property
    def needs_calibration(self) -> bool:
        """Whether there is anything to choose."""
        return self.neurons < 1 or self.groups < 1

    def spec_after(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec of the narrower blocks."""
        step = MULTIPLE if spec.hidden >= 2 * MULTIPLE else 1
        hidden = max(step, round(self.neurons * spec.hidden / step) * step)
        groups = max(1, round(self.groups * spec.kv_heads))
        return spec.model_copy(
            update={
                "hidden": spec.hidden if self.neurons == 1 else min(hidden, spec.hidden),
                "kv_heads": groups,
                "heads": spec.heads // spec.kv_heads * groups,
            }
        )

    def caution(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return a warning where a share is so near to 1 that nothing is left out."""
        after = self.spec_after(spec)
        if self.groups < 1 and after.kv_heads == spec.kv_heads:
            return f"{self.groups:.0%} of {spec.kv_heads} head groups, rounded, are all of them."
        if self.neurons < 1 and after.hidden == spec.hidden:
            return f"{self.neurons:.0%} of {spec.hidden:,} neurons, rounded, are all of them."
        return None

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the exact bytes of the narrower shape."""
        gone = spec.parameters - self.spec_after(spec).parameters
        return before - gone * BYTES[placement.precision]

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Cut every block; the model's spec is that of the result.

        Raises:
            InvalidInput: there is no calibration text, too little, or an earlier pass took layers
                that are to be cut.
            NumericalError: a weight is NaN or infinite, or the text leads to some.
        """
        from gptcore.model import Block

        spec, after = model.spec, self.spec_after(model.spec)
        wanted = ("out",) * (after.heads < spec.heads) + ("down",) * (after.hidden < spec.hidden)

        def visit(name: str, linear: nn.Linear, seen: Statistics) -> nn.Module:
            refuse_nan(name, linear.weight)
            block = model.blocks[int(name.split(".")[1])]
            assert isinstance(block, Block)
            assert seen.hessian is not None
            if name.endswith("down"):
                return cut_neurons(block, linear, seen.hessian, after.hidden)
            return cut_groups(block, linear, seen.hessian, after)

        if wanted:
            _check_plain(model)
            calibrate(
                model,
                text_for(self, context),
                visit,
                progress=context.progress,
                wanted=lambda name: name.endswith(wanted),
            )
        context.progress(1.0)
        model.spec = after
        context.coverage[self.name] = _coverage(spec, after, context.placement)
        return model


def cut_neurons(block: Block, down: nn.Linear, hessian: Tensor, count: int) -> nn.Linear:
    """Cut a block's MLP to its ``count`` worthiest neurons, and return its new ``down``."""
    stay, weight = cut_inputs(down.weight, hessian, 1, count)
    for name in ("gate", "up"):
        if hasattr(block.mlp, name):
            setattr(block.mlp, name, rows_of(getattr(block.mlp, name), stay))
    return _like(down, weight)


def cut_groups(block: Block, out: nn.Linear, hessian: Tensor, after: ModelSpec) -> nn.Linear:
    """Cut a block's attention to the groups of ``after``, and return its new ``out``."""
    attention = block.attention
    width = after.heads // after.kv_heads * after.head_width
    stay, weight = cut_inputs(out.weight, hessian, width, after.kv_heads)
    attention.q = rows_of(attention.q, stay)
    shared = places(stay.view(-1, width)[:, 0] // width, after.head_width)
    attention.k, attention.v = rows_of(attention.k, shared), rows_of(attention.v, shared)
    attention.spec = after
    return _like(out, weight)


def cut_inputs(weight: Tensor, hessian: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the inputs that stay and the weights that make up best for those that go.

    Groups go a few at a time, the cheapest first, and costs are taken anew each time: of two
    neurons that say the same, one can go for nothing, but not both.

    Args:
        weight: (W, n · J), of the layer that the groups go into.
        hessian: (n · J, n · J), of its inputs.
        size: J, neighbours of a group.
        count: groups that stay.

    Returns:
        (count · J,) int64, rising, and (W, count · J) float64.
    """
    import torch

    damped = hessian.double()
    damped.diagonal().add_(DAMPING * (damped.diagonal().mean().item() or 1.0))
    inverse, now = torch.linalg.inv(damped), weight.double()
    left = torch.arange(len(hessian) // size, device=weight.device)
    step = max(1, (len(left) - count) // ROUNDS)
    while len(left) > count:
        n = len(left)
        own = inverse.view(n, size, n, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        groups = now.view(len(now), n, size).transpose(0, 1)  # (n, W, J)
        cost = (groups @ torch.linalg.inv(own) * groups).sum((1, 2))  # (n,)
        order = cost.argsort(stable=True)
        going = min(step, n - count)
        gone, stay = places(order[:going], size), places(order[going:].sort().values, size)
        makes_up = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stay])
        now = now[:, stay] - now[:, gone] @ makes_up
        inverse = inverse[stay][:, stay] - inverse[stay][:, gone] @ makes_up
        left = left[order[going:].sort().values]
    return places(left, size), now


def places(groups: Tensor, size: int) -> Tensor:
    """Return the places of the members of each group of ``size`` neighbours."""
    import torch

    found: Tensor = groups[:, None] * size + torch.arange(size, device=groups.device)
    return found.flatten()


def rows_of(linear: nn.Linear, stay: Tensor) -> nn.Linear:
    """Return the layer with some of its outputs."""
    from gptcore.linears import plain

    return plain(linear.weight[stay], None if linear.bias is None else linear.bias[stay])


def _like(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """Return a layer of that weight with the bias and precision of another."""
    from gptcore.linears import plain

    return plain(weight.to(linear.weight.dtype), linear.bias)


def _check_plain(model: GPT) -> None:
    from torch import nn

    for name, one in model.blocks.named_modules(prefix="blocks"):
        if name.split(".")[-1] in {one.name for one in model.spec.linears} and (
            type(one) is not nn.Linear
        ):
            raise InvalidInput(
                f"{name} is a {type(one).__name__} of an earlier pass, which cannot be cut: put "
                "the shrinking first."
            )


def _coverage(before: ModelSpec, after: ModelSpec, placement: Placement) -> Coverage:
    """Count the kinds of layers that became smaller."""
    size = BYTES[placement.precision]
    pairs = list(zip(before.linears, after.linears, strict=True))
    smaller = [
        (old, new) for old, new in pairs if (old.rows, old.columns) != (new.rows, new.columns)
    ]
    kept = sum((new.columns + new.bias) * new.rows * new.count * size for _, new in smaller)
    same = [old.name for old, new in pairs if (old.rows, old.columns) == (new.rows, new.columns)]
    return Coverage(
        sum(old.rows * old.columns * old.count for old, _ in smaller),
        before.matmul_parameters,
        tuple((name, "its width is not cut") for name in same),
        stored_bytes=kept,
        resident_bytes=kept,
    )
