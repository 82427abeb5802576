"""Which models this machine can hold: weights at each precision against the free memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from gptcore.errors import GptcoreError
from pages.parts import format as shown

if TYPE_CHECKING:
    from gptcore.lab import Lab
    from gptcore.recipe import Variant

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
ASKED_AGAIN_S = 10.0
"""Free memory changes, but not so fast that every click must ask again for 70 variants."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One model at one precision."""

    weights_bytes: int | None
    fits: bool
    sentence: str
    free_bytes: int | None = None
    """What was free when it was asked; None where that is unknown."""

    @property
    def text(self) -> str:
        """What the matrix shows: the weights, and whether they can be held."""
        if self.weights_bytes is None:
            return shown.UNKNOWN
        return f"{'✓' if self.fits else '✗'} {shown.gigabytes(self.weights_bytes)}"


def weights_bytes(variant: Variant) -> int:
    """Return the bytes of the weights once every pass of the recipe has shrunk them."""
    size = variant.spec.weights_bytes(variant.placement.precision)
    for one in variant.recipe.passes:
        size = one.weights_bytes_after(variant.spec, variant.placement, size)
    return size


def matrix(lab: Lab, names: Sequence[str], device: str) -> dict[str, tuple[Cell, ...]]:
    """Return for each model one cell a precision, in the order of ``PRECISIONS``."""
    return _matrix(lab, id(lab), tuple(names), device)


@st.cache_data(ttl=ASKED_AGAIN_S, max_entries=8, show_spinner=False)
def _matrix(
    _lab: Lab, lab_id: int, names: tuple[str, ...], device: str
) -> dict[str, tuple[Cell, ...]]:
    return {name: tuple(_cell(_lab, name, p, device) for p in PRECISIONS) for name in names}


def _cell(lab: Lab, name: str, precision: str, device: str) -> Cell:
    try:
        variant = lab.variant(name, precision, device)
        for one in variant.recipe.passes:
            if blocked := one.blocked_by(variant.spec, variant.placement):
                return Cell(None, False, f"{name} in {precision}: {blocked}")
        fit = lab.fit(variant)
    except GptcoreError as error:
        return Cell(None, False, str(error))
    said = (
        fit.sentence if not fit.fits else f"{name} in {precision} fits on {device}: {fit.sentence}"
    )
    return Cell(weights_bytes(variant), fit.fits, said, fit.free_bytes)
