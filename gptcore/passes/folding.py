"""Scale the channels that reach a layer, and what they come from the other way: nothing changes.

An input that is divided by s and a column that is multiplied by s give the same product, but
another one once they are rounded. The division costs nothing where it goes into the weights that
the input comes from: those of a norm, of the values that attention mixes, or of the branch of a
SwiGLU that is not gated. Through a GELU it cannot go.

Letters of shapes: O outputs, I inputs, G key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Site:
    """Layers of a block that are given the same input, and what that comes from."""

    layers: tuple[str, ...]
    source: str | None
    """None where no scale can be folded into it."""


def sites(spec: ModelSpec) -> tuple[Site, ...]:
    """Return the places of a block where channels can be scaled."""
    gated = spec.mlp == "swiglu"
    return (
        Site(("attention.q", "attention.k", "attention.v"), "attention_norm"),
        Site(("attention.out",), "attention.v"),
        Site(("mlp.gate", "mlp.up") if gated else ("mlp.up",), "mlp_norm"),
        Site(("mlp.down",), "mlp.up" if gated else None),
    )


def shared(scale: Tensor, spec: ModelSpec, site: Site) -> Tensor:
    """Return (I,) scales that are equal where channels are the same channel of the source.

    Query heads that share a key/value head mix the same values: they get the geometric mean.
    """
    if site.source != "attention.v":
        return scale
    heads = scale.view(spec.kv_heads, -1, spec.head_width)  # (G, H / G, D)
    mean = heads.log().mean(1, keepdim=True).exp()
    return mean.expand_as(heads).reshape(-1)


class Folding:
    """The scales of one block: collected first, then in force for every layer that is asked for."""

    def __init__(self, block: nn.Module, spec: ModelSpec) -> None:
        self._block = block
        self._spec = spec
        self._columns: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}

    def layer(self, name: str) -> nn.Linear:
        """Return a layer of the block as it is."""
        from torch import nn

        found = self._block.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found

    def can(self, site: Site) -> bool:
        """Return whether a site's scales can go into what it comes from."""
        from torch import nn

        known = [self._block.get_submodule(name) for name in site.layers]
        if site.source is None or not all(isinstance(one, nn.Linear) for one in known):
            return False
        source = self._block.get_submodule(site.source)
        return isinstance(source, nn.Linear | nn.LayerNorm | nn.RMSNorm)

    def add(self, site: Site, scale: Tensor) -> Tensor:
        """Scale the inputs of a site by 1 / ``scale``, (I,), and return what is in force.

        The weights of a norm are replaced at once; rounding them to their type changes the scale.
        """
        from torch import nn

        assert site.source is not None
        source = self._block.get_submodule(site.source)
        if isinstance(source, nn.Linear):
            own = scale
            if site.source == "attention.v":
                own = scale.view(self._spec.kv_heads, -1, self._spec.head_width)[:, 0].flatten()
            self._rows[site.source] = own.reciprocal()
        else:
            assert isinstance(source, nn.LayerNorm | nn.RMSNorm)
            before = source.weight
            after = (before.float() / scale).to(before.dtype)
            scale = (before.float() / after.float()).where(after != 0, scale)
            source.weight = nn.Parameter(after, requires_grad=False)
            bias = getattr(source, "bias", None)
            if bias is not None:
                source.bias = nn.Parameter((bias.float() / scale).to(bias.dtype), False)
        for name in site.layers:
            self._columns[name] = scale
        return scale

    def tensors(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return a layer's weight, (O, I) float32, and bias with the scales in force."""
        linear = self.layer(name)
        weight = linear.weight.detach().float()
        bias: Tensor | None = None if linear.bias is None else linear.bias.detach()
        if name in self._columns:
            weight = weight * self._columns[name]
        if name in self._rows:
            weight = weight * self._rows[name][:, None]
            bias = None if bias is None else (bias.float() * self._rows[name]).to(bias.dtype)
        return weight, bias

    def settle(self, keep: set[str]) -> None:
        """Give the scaled weights to the layers that stay, all but ``keep``."""
        from gptcore.linears import filled

        for name in ({*self._columns, *self._rows}) - keep:
            linear = self.layer(name)
            weight, bias = self.tensors(name)
            filled(linear, weight.to(linear.weight.dtype), bias)
