"""Spaces of recipes that are worth a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gptcore.optimize.tune import Knob
from gptcore.passes.quantize import layer_shapes
from gptcore.spec import ModelSpec

WEIGHT = 1.5
"""Doublings of a damage, up or down, that are tried at most: a scan is seldom more wrong."""


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched, and on which precision its passes run."""

    about: str
    knobs: tuple[Knob, ...]
    precision: str
    start: tuple[Mapping[str, str | int | float | bool], ...] = field(default=())


def bits_by_layer(spec: ModelSpec) -> Space:
    """Return the search for the bits of each layer, beginning with what a scan of them says.

    It tries how much the damage of each kind of layer, of each ten blocks and of the first and
    last one counts beside what the scan found, as powers of two; the bytes stay the same.
    """
    names = [name for name, _ in layer_shapes(spec)]
    kinds = dict.fromkeys(f"*.{name.partition('.')[2].partition('.')[2]}" for name in names[:-1])
    tens = [f"blocks.{ten or ''}[0-9].*" for ten in range(-(-spec.layers // 10))]
    ends = dict.fromkeys(f"blocks.{at}.*" for at in (0, spec.layers - 1))
    patterns = dict.fromkeys((*kinds, *(tens if len(tens) > 1 else ()), *ends, "head"))
    knobs = tuple(
        Knob(technique="mixed_bits", layers=one, low=-WEIGHT, high=WEIGHT) for one in patterns
    )
    as_scanned: dict[str, str | int | float | bool] = {one.name: 0.0 for one in knobs}
    return Space(
        "How many bits each layer gets, 3, 4 or 8, within the same bytes: a scan finds what "
        "rounding each does, and the search how far to trust it.",
        knobs,
        "bf16",
        (as_scanned,),
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
    return bits_by_layer(spec) if name == BITS else SPACES[name]
