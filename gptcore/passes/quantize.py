"""Quantize the linear layers: 8, 4 or 3 bits a weight, with or without 8-bit activations.

``int8`` multiplies integers: one scale a row of the weights, one a token of the activations, or a
few where our own library multiplies. The others keep float activations and move fewer bytes:
``int8_weights`` with a scale a row, ``int4`` and ``int3`` with a scale and a zero a group of
columns. All are really packed: the float weights are gone, one layer at a time, so that the model
is never there twice.

Error: with method ``round``, half a step a weight: max|w of the row| / 254 for 8 bits,
(max − min of the group) / 30 for 4 and / 14 for 3, and the rounding of scale and zero to bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from gptcore.device import BF16_CAPABILITY, Placement, compute_capability
from gptcore.passes.base import Pass, PassContext, Stage
from gptcore.passes.formats import Format, int4_bytes, int8_bytes
from gptcore.passes.packing import Fill, Method, by_method, pack_embedding, pack_linears
from gptcore.spec import BYTES, LinearShape, ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from gptcore.model import GPT

__all__ = ["Int3", "Int4", "Int8", "Int8Weights", "Quantizer", "int4_bytes", "int8_bytes"]

CODE_BYTES = 5
"""A weight takes so many while a layer's codes are being found and packed."""


class Quantizer(Pass):
    """What quantizing passes share: how codes are found, and what beside the blocks is packed."""

    stage: ClassVar[Stage] = Stage.NUMBERS
    quantizes: ClassVar[bool] = True
    also_called: ClassVar[Mapping[str, str]] = {"group_size": "group"}
    later: ClassVar[frozenset[str]] = frozenset({"method", "head", "embedding"})
    """Fields that came after recipes were stored: left out where they say what was so before."""

    method: Method = Field(
        "round",
        title="Method",
        description="Round each weight to the nearest; or gptq: let later columns make up for "
        "each error; or awq: scale channels with large inputs up before rounding. The latter two "
        "look at a calibration text.",
    )
    head: bool = Field(
        True, title="Output head", description="Pack the output head as well as the blocks."
    )
    embedding: bool = Field(
        False,
        title="Token embedding",
        description="Pack the token embedding too: it shares the head's numbers where the two are "
        "tied, and takes 8 bits a weight where they are not.",
    )

    def format(self, name: str) -> Format:
        """Return the form of the layer of that name."""
        raise AssertionError(f"{type(self).__name__} does not say its format")

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at the context's calibration text."""
        return self.method != "round"

    @property
    def converts(self) -> bool:
        """Whether it does without a forward pass, and so without the model as a whole."""
        return not self.needs_calibration

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return why no layer of that shape can be packed there, or None."""
        if sentence := self._misplaced(placement):
            return sentence
        formats = [self.format(name) for name, _ in layer_shapes(spec)]
        if all(
            form.skips(one.rows, one.columns, placement.device)
            for form, (_, one) in zip(formats, layer_shapes(spec), strict=True)
        ):
            found = " and ".join(map(str, sorted({one.columns for one in spec.linears})))
            return f"groups of {formats[0].group} do not divide its layers of {found} columns."
        return None

    def _misplaced(self, placement: Placement) -> str | None:
        """Return why a placement does not do for weight-only layers, or None."""
        if placement.device == "mps":
            return "its operation is for CPUs and CUDA, not mps; choose bf16 there."
        if placement.precision != "bf16":
            return (
                f"its operation takes bf16 activations, not {placement.precision}; choose bf16 "
                "under it."
            )
        capability = compute_capability(placement.device)
        if capability is not None and capability < BF16_CAPABILITY:
            return (
                f"{placement.device} has no bf16 arithmetic (compute capability {capability[0]}."
                f"{capability[1]}, 8.0 is needed); choose fp16 there."
            )
        return None

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the exact bytes, scales, zeros and padding included; what is skipped stays.

        Error: for 8-bit activations on a CPU the kernel's own padding is left out, see
        ``linears.quantized.int8_bytes``.
        """
        after = self._after_linears(spec, placement, before)
        table = self._embedding_bytes(spec, placement)
        if table is None:
            return after
        return after - spec.vocabulary * spec.width * BYTES[placement.precision] + table

    def weights_peak_bytes(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the most bytes: a layer's codes are there unpacked for a moment."""
        *blocks, head = spec.linears
        after = self._after_linears(spec, placement, before)
        peak = before + max(map(self._scratch_bytes, blocks))
        return max(peak, after + self._scratch_bytes(head) * self.head)

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Replace every linear layer that the format suits.

        Raises:
            NumericalError: a weight is NaN or infinite.
            InvalidInput: the calibration text is missing or does not suit, or this torch has no
                kernel for the format.
        """
        device = context.placement.device

        def choose(name: str, linear: nn.Linear) -> Format | str:
            if name == "head" and not self.head:
                return "the output head was to be left as it is"
            form = self.format(name)
            return form.skips(linear.out_features, linear.in_features, device) or form

        context.coverage[self.name] = pack_linears(model, choose, self._fill(), context)
        if self.embedding:
            pack_embedding(model)
        return model

    def _fill(self) -> Fill:
        """Return what finds the codes and replaces the layers."""
        return by_method(self, self.method)

    def as_json(self) -> dict[str, Any]:
        """Return the pass as JSON, which is as before for what could be said before.

        The hash of a variant is made of it: what was measured keeps its place.
        """
        fields = type(self).model_fields
        kept = self.model_dump(mode="json")
        for name in self.later & kept.keys():
            if kept[name] == fields[name].default:
                del kept[name]
        return {"pass": self.name, **kept}

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Return the fields that were chosen, so that a pass prints as its own source."""
        return [
            (name, getattr(self, name))
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        ]

    def _after_linears(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        size = BYTES[placement.precision]
        after = before
        for name, one in layer_shapes(spec):
            form = self.format(name)
            if form.skips(one.rows, one.columns, placement.device):
                continue
            if name == "head" and not self.head:
                continue
            shared = name == "head" and spec.tied_head
            floats = 0 if shared else (one.rows * one.columns + one.rows * one.bias) * size
            after += form.resident_bytes(one.rows, one.columns, one.bias, placement) - floats
        return after

    def _embedding_bytes(self, spec: ModelSpec, placement: Placement) -> int | None:
        """Return what the embedding takes afterwards, None where it stays as it is."""
        if not self.embedding:
            return None
        if not spec.tied_head:
            return spec.vocabulary * (spec.width + 2)
        form, head = self.format("head"), spec.linears[-1]
        if not self.head or form.skips(head.rows, head.columns, placement.device):
            return None
        return form.stored_bytes(head.rows, head.columns, False, placement)

    def _scratch_bytes(self, one: LinearShape) -> int:
        return (one.rows + 16) * one.columns * CODE_BYTES


class Int8(Quantizer):
    """8-bit weights, one scale a row; activations to 8 bits with a scale a token, or to 16."""

    name: ClassVar[str] = "int8"
    title: ClassVar[str] = "8-bit weights and activations"
    mechanism: ClassVar[str] = "a quarter of the bytes of fp32, integer multiplications"
    later: ClassVar[frozenset[str]] = frozenset({"method", "head", "activation_bits"})

    activation_bits: Literal[16, 8] = Field(
        16,
        title="Bits of activations",
        description="Of our own library on a CPU: 16 are as good as exact, 8 read prompts faster. "
        "The output head has 16 either way; torch's operation has 8.",
    )
    embedding: bool = Field(
        True,
        title="Token embedding",
        description="Pack the token embedding too, with the head's numbers where the two are tied.",
    )

    def format(self, name: str) -> Format:
        """Return the form of every layer."""
        bits = 16 if name == "head" else self.activation_bits
        return Format(8, activations=True, activation_bits=bits)

    def _misplaced(self, placement: Placement) -> str | None:
        if placement.device == "mps":
            return "its operation is for CPUs and CUDA, not mps; choose bf16 there."
        if placement.device == "cpu" and placement.precision != "fp32":
            return (
                f"its operation takes fp32 activations, not {placement.precision}; choose fp32 "
                "under it."
            )
        return None


class Int8Weights(Quantizer):
    """8-bit weights, one scale a row; activations stay in bf16."""

    name: ClassVar[str] = "int8_weights"
    title: ClassVar[str] = "8-bit weights"
    mechanism: ClassVar[str] = "half of the bytes of bf16"

    def format(self, name: str) -> Format:
        """Return the form of every layer."""
        return Format(8)


class Int4(Quantizer):
    """4-bit weights in groups, each with a scale and a zero; activations stay in bf16."""

    name: ClassVar[str] = "int4"
    title: ClassVar[str] = "4-bit weights"
    mechanism: ClassVar[str] = "a quarter of the bytes of bf16"

    group: Literal[32, 64, 128] = Field(
        64, title="Group size", description="Weights that share a scale; fewer are more exact."
    )

    def format(self, name: str) -> Format:
        """Return the form of every layer."""
        return Format(4, self.group)


class Int3(Quantizer):
    """3-bit weights in groups, each with a scale and a zero; activations stay in bf16."""

    name: ClassVar[str] = "int3"
    title: ClassVar[str] = "3-bit weights"
    mechanism: ClassVar[str] = (
        "a fifth of the bytes of bf16 in a file; in memory held in 4 bits, for which there is a "
        "fast operation, or in 3, and unpacked at every call"
    )

    group: Literal[32, 64, 128] = Field(
        64, title="Group size", description="Weights that share a scale; fewer are more exact."
    )
    small: bool = Field(
        False,
        title="Small in memory",
        description="Keep 3 bits a weight in memory too, and unpack them at every call: slow.",
    )

    def format(self, name: str) -> Format:
        """Return the form of every layer."""
        return Format(3, self.group, small=self.small)


def layer_shapes(spec: ModelSpec) -> list[tuple[str, LinearShape]]:
    """Return every linear layer with its name in the model."""
    *blocks, head = spec.linears
    parts = {"q": "attention", "k": "attention", "v": "attention", "out": "attention"}
    found = [
        (f"blocks.{i}.{parts.get(one.name, 'mlp')}.{one.name}", one)
        for i in range(spec.layers)
        for one in blocks
    ]
    return [*found, ("head", head)]
