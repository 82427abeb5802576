"""Whether a variant fits into the free memory of its device. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gptcore.device import PRECISIONS, free_bytes
from gptcore.recipe import Variant
from gptcore.spec import BYTES, PRESETS, ModelSpec

PREFILL_TOKENS = 512
LIBRARY_BYTES = 64 * 2**20
"""What the operations' own scratch buffers were seen to take beside the activations."""
USABLE_RATIO = 0.95
"""The share of the free memory that a model may take; the rest keeps the machine responsive."""
RANDOM_SHAPES = tuple(
    (name, spec, "random:0") for name, spec in PRESETS.items() if name != "smollm2-135m"
)
"""(name, spec, weights id) of the shapes that need no weights on disk."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a variant fits into the free memory of its device, and what would."""

    fits: bool
    needed_bytes: int
    """Weights at the placement's precision + the cache for the context + working space."""
    free_bytes: int | None
    sentence: str
    """Ready to show: what is needed against what is free, and what would fit."""
    suggestions: tuple[tuple[str, str], ...] = ()
    """(model, precision) pairs that would fit, the nearest first."""


def needed_bytes(variant: Variant, context_tokens: int) -> int:
    """Return the bytes that ``variant`` takes at its peak with a cache of that many tokens.

    The weights are there as the placement's precision before a pass shrinks them, so the largest
    of all these moments counts.

    Error: 3 to 40 % above the peak that was seen on a CPU with random models of 124 and 356
    million parameters in fp32, bf16, int8 and int4, and once 4 % below it.
    """
    spec, precision = variant.spec, variant.placement.precision
    peak = weights = spec.weights_bytes(precision)
    for one in variant.recipe.passes:
        peak = max(peak, one.weights_peak_bytes(spec, variant.placement, weights))
        weights = one.weights_bytes_after(spec, variant.placement, weights)
        spec = one.spec_after(spec)
    cache = context_tokens * variant.kv_bytes_per_token
    activations = PREFILL_TOKENS * (6 * spec.width + 3 * spec.hidden) * BYTES[precision]
    return peak + cache + activations + 4 * spec.vocabulary * 4 + LIBRARY_BYTES


def fit(
    variant: Variant,
    context_tokens: int,
    *,
    others: Iterable[tuple[str, ModelSpec, str]] = RANDOM_SHAPES,
    reusable_bytes: int = 0,
    free: Callable[[str], int | None] = free_bytes,
) -> Fit:
    """Return whether ``variant`` fits, and which of ``others`` would.

    Args:
        variant: what was chosen.
        context_tokens: positions of the cache.
        others: (name, spec, weights id) of models to suggest from.
        reusable_bytes: what loaded models hold and would give back.
        free: bytes that can be allocated on a device, None where unknown.
    """
    device = variant.placement.device
    needed = needed_bytes(variant, context_tokens)
    available = free(device)
    if available is None:
        return Fit(True, needed, None, f"{gib(needed)} needed; free memory is unknown.")
    available += reusable_bytes
    if needed <= available * USABLE_RATIO:
        return Fit(True, needed, available, f"{gib(needed)} needed, {gib(available)} free.")
    suggestions = _suggestions(variant, context_tokens, others, available * USABLE_RATIO)
    named = " or ".join(f"{name} in {precision}" for name, precision in suggestions)
    weights = variant.spec.weights_bytes(variant.placement.precision)
    return Fit(
        False,
        needed,
        available,
        f"{variant.model} in {variant.precision} does not fit on {device}: its "
        f"{variant.spec.parameters:,} parameters take {decimal_gb(weights)} ({gib(weights)}), "
        f"{gib(needed)} with cache and working space, and {gib(available)} are free. "
        + (f"What would fit: {named}." if named else "Free some memory and try again."),
        suggestions,
    )


def gib(size: float) -> str:
    """Return bytes as a person reads them: ``1.3 GiB``, ``812 MiB``."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def decimal_gb(size: float) -> str:
    """Return bytes in units of 10⁹, as models are quoted: ``698 GB``, ``0.5 GB``."""
    return f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e9:,.1f} GB"


def _suggestions(
    variant: Variant,
    context_tokens: int,
    others: Iterable[tuple[str, ModelSpec, str]],
    budget: float,
) -> tuple[tuple[str, str], ...]:
    """Return what fits into ``budget`` bytes, at a precision that the weights can start in.

    A quantized one needs no less at its peak than the precision that it starts from.
    """
    candidates = []
    same = (variant.model, variant.spec, variant.weights_id)
    for name, spec, weights_id in (same, *others):
        for precision in PRECISIONS:
            if precision == variant.precision and name == variant.model:
                continue
            placement = variant.placement.model_copy(update={"precision": precision})
            other = Variant(model=name, spec=spec, weights_id=weights_id, placement=placement)
            if needed_bytes(other, min(context_tokens, spec.context)) <= budget:
                distance = abs(spec.parameters - variant.spec.parameters)
                candidates.append((distance, precision != variant.precision, name, precision))
    chosen: dict[str, str] = {}
    for _, _, name, precision in sorted(candidates):
        chosen.setdefault(name, precision)
    return tuple(chosen.items())[:2]
