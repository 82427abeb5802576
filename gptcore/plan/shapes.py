"""Size: parameters by part, the published counts beside the exact ones, shapes from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcore.errors import InvalidInput, InvalidSpec, UnknownModel
from gptcore.spec import GPT2, GPT3, PRESETS, ModelSpec
from gptcore.weights.huggingface import spec_of

MAX_CONFIG_BYTES = 2**20
"""A config.json has a few KiB."""


@dataclass(frozen=True, slots=True)
class Published:
    """What the paper's table says of a size."""

    parameters: float
    heads: int
    head_width: int
    source: str


_GPT2_PAPER = "Radford et al. 2019, table 2"
_GPT3_PAPER = "Brown et al. 2020, table 2.1, arXiv:2005.14165"
PUBLISHED: dict[str, Published] = {
    "gpt2": Published(117e6, 12, 64, _GPT2_PAPER),
    "gpt2-medium": Published(345e6, 16, 64, _GPT2_PAPER),
    "gpt2-large": Published(762e6, 20, 64, _GPT2_PAPER),
    "gpt2-xl": Published(1542e6, 25, 64, _GPT2_PAPER),
    "gpt3-125m": Published(125e6, 12, 64, _GPT3_PAPER),
    "gpt3-350m": Published(350e6, 16, 64, _GPT3_PAPER),
    "gpt3-760m": Published(760e6, 16, 96, _GPT3_PAPER),
    "gpt3-1.3b": Published(1.3e9, 24, 128, _GPT3_PAPER),
    "gpt3-2.7b": Published(2.7e9, 32, 80, _GPT3_PAPER),
    "gpt3-6.7b": Published(6.7e9, 32, 128, _GPT3_PAPER),
    "gpt3-13b": Published(13e9, 40, 128, _GPT3_PAPER),
    "gpt3-175b": Published(175e9, 96, 128, _GPT3_PAPER),
}
"""GPT-2's own paper gives counts that were corrected later; the exact ones are its checkpoints'."""


def quirks(name: str) -> tuple[str, ...]:
    """Return what is odd about the published row of a size, a sentence each."""
    published, spec = PUBLISHED.get(name), PRESETS.get(name)
    if published is None or spec is None:
        return ()
    found = []
    product = published.heads * published.head_width
    if product != spec.width:
        found.append(
            f"The table gives {published.heads} heads of {published.head_width}, which is "
            f"{product:,} and not the width of {spec.width:,}. Built with {spec.heads} heads of "
            f"{spec.head_width}, the largest count below the table's that divides the width; the "
            "number of parameters does not depend on it."
        )
    if abs(spec.parameters / published.parameters - 1) > 0.02:
        found.append(
            f"The paper says {published.parameters / 1e6:,.0f} M; its released checkpoint has "
            f"{spec.parameters:,} parameters."
            if name in GPT2
            else f"The table rounds {spec.parameters:,} to {published.parameters / 1e6:,.0f} M."
        )
    return tuple(found)


def shape(
    model: str, *, known: Mapping[str, ModelSpec] | None = None, paths: bool = False
) -> ModelSpec:
    """Return the shape of a preset, of a model that the caller knows, or of a config.json.

    Args:
        model: a name; or the path of a Hugging Face config.json or of the folder that holds one.
        known: more names, such as the installed models.
        paths: whether files may be read; a name in an address comes from anybody.

    Raises:
        UnknownModel: there is no such name or file.
        InvalidSpec: the config contradicts itself or is of another family.
    """
    names = {**PRESETS, **(known or {})}
    if model in names:
        return names[model]
    try:
        path = Path(model).expanduser()
        file = path / "config.json" if path.is_dir() else path
        there = paths and model.strip() != "" and file.is_file()
    except (OSError, ValueError, RuntimeError):
        there = False
    if not there:
        raise UnknownModel(
            f"There is no model or config.json {model[:80]!r}; known are: {', '.join(names)}."
        )
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise InvalidSpec(f"{file.name} has {file.stat().st_size:,} bytes: it is no config.json.")
    return from_config(file.read_bytes())


def from_config(text: str | bytes) -> ModelSpec:
    """Return the shape that a Hugging Face config.json describes.

    Raises:
        InvalidSpec: no JSON object, another family, or values that contradict each other.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise InvalidSpec(f"The config has {len(text):,} bytes; the most is {MAX_CONFIG_BYTES:,}.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidSpec(f"The config is no JSON: {str(error)[:120]}.") from None
    if not isinstance(found, dict):
        raise InvalidSpec("The config is no JSON object: paste the whole config.json.")
    return spec_of(found)


def free(layers: int, width: int, heads: int, context: int, vocabulary: int) -> ModelSpec:
    """Return a GPT-3 shape with sizes of one's own.

    Raises:
        InvalidInput: the heads do not divide the width, or it is beyond the largest allowed.
    """
    if width % heads:
        fitting = [one for one in range(1, heads + 1) if width % one == 0][-1]
        raise InvalidInput(
            f"{heads} heads do not divide a width of {width:,}; {fitting} heads would."
        )
    try:
        return ModelSpec(
            family="gpt2",
            layers=layers,
            heads=heads,
            kv_heads=heads,
            head_width=width // heads,
            width=width,
            hidden=4 * width,
            context=context,
            vocabulary=vocabulary,
        )
    except ValueError as error:
        raise InvalidSpec(_reason(error)) from None


def size(spec: ModelSpec) -> dict[str, int]:
    """Return the parameters of the parts that are there, their sum last as ``total``."""
    parts = {name: count for name, count in spec.parameters_by_part.items() if count}
    return {**parts, "total": spec.parameters}


def formula(spec: ModelSpec) -> str:
    """Return how the number of parameters comes about, for a person to check.

    The short form holds for GPT-2 and GPT-3: 12 L d² + 13 L d + (V + n) d + 2 d.
    """
    L, d, V, n = spec.layers, spec.width, spec.vocabulary, spec.context
    plain = 12 * L * d * d + 13 * L * d + (V + n) * d + 2 * d
    if plain == spec.parameters:
        return (
            f"12·{L}·{d:,}² + 13·{L}·{d:,} + ({V:,} + {n:,})·{d:,} + 2·{d:,} = {spec.parameters:,}"
        )
    parts = " + ".join(f"{count:,}" for name, count in size(spec).items() if name != "total")
    return f"{parts} = {spec.parameters:,}"


def _reason(error: Any) -> str:
    found = error.errors()[0]
    said = found["msg"].removeprefix("Value error, ")
    where = ".".join(map(str, found["loc"]))
    return f"{where + ': ' if where else ''}{said}."


NAMES: tuple[str, ...] = (*GPT2, *GPT3, "smollm2-135m")
