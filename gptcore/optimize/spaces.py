"""Spaces of recipes that are worth a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gptcore.optimize.tune import LEAVE, Knob
from gptcore.passes.quantize import layer_shapes
from gptcore.spec import ModelSpec

UNIFORM = 4


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched, and on which precision its passes run."""

    about: str
    knobs: tuple[Knob, ...]
    precision: str
    start: tuple[Mapping[str, str | int | float | bool], ...] = field(default=())


def bits_by_kind(spec: ModelSpec) -> Space:
    """Return the search for the bits of each kind of layer, beginning with the same for all."""
    kinds = {name.partition(".")[2].partition(".")[2]: None for name, _ in layer_shapes(spec)[:-1]}
    knobs = tuple(
        Knob(technique="mixed_bits", layers=f"*.{one}", choices=(3, 4, 8)) for one in kinds
    )
    head = Knob(technique="mixed_bits", layers="head", choices=(4, 8))
    ends = tuple(
        Knob(technique="mixed_bits", layers=f"blocks.{at}.*", choices=(LEAVE, 8))
        for at in dict.fromkeys((0, 1, spec.layers - 1))
        if at < spec.layers
    )
    group = Knob(technique="mixed_bits", field="group", choices=(32, 64, 128))
    uniform: dict[str, str | int | float | bool] = {one.name: UNIFORM for one in (*knobs, head)}
    uniform |= {one.name: LEAVE for one in ends} | {group.name: 64}
    return Space(
        "How many bits each kind of layer gets, and whether the first and last blocks get more.",
        (*knobs, head, *ends, group),
        "bf16",
        (uniform,),
    )


SPACES: Mapping[str, Space] = {
    "formats": Space(
        "4-bit weights: group size, and how the codes are found.",
        (
            Knob(technique="int4", field="group", choices=(32, 64, 128)),
            Knob(technique="int4", field="method", choices=("round", "gptq", "awq")),
            Knob(technique="int4", field="embedding", choices=(False, True)),
        ),
        "bf16",
    ),
    "smaller": Space(
        "Fewer layers, fewer neurons, then 8 bits.",
        (
            Knob(technique="drop_layers", field="layers", choices=(0, 1, 2, 3)),
            Knob(technique="shrink", field="neurons", low=0.7, high=1.0),
            Knob(technique="int8"),
        ),
        "fp32",
    ),
    "pruning": Space(
        "How many weights can be zero, and how they are chosen.",
        (
            Knob(technique="prune", field="sparsity", low=0.1, high=0.7),
            Knob(technique="prune", field="method", choices=("magnitude", "wanda", "sparsegpt")),
        ),
        "fp32",
    ),
}


BITS = "bits"
NAMES = (*SPACES, BITS)


def space(name: str, spec: ModelSpec) -> Space:
    """Return the space of that name for a model of that shape."""
    return bits_by_kind(spec) if name == BITS else SPACES[name]
