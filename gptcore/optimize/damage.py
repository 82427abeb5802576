"""What a recipe did to the numbers themselves: layer by layer in weights, and in what flows by.

Signal to noise in dB: 10·log10(Σ a² / Σ (a − b)²), so 20 dB is an error of a tenth.

Letters of shapes: R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptcore.model import GPT

BINS = 61
REACH_STDS = 4.0
"""A histogram covers so many standard deviations of the weights before."""
MOST_COUNTED = 2**22
"""Weights of a kind that a histogram counts, evenly taken."""


def matrices(model: GPT) -> Mapping[str, nn.Module]:
    """Return the modules that stand for the projections and the head, by name."""
    from gptcore.passes.quantize import layer_shapes

    there = dict(model.named_modules())
    return {name: there[name] for name, _ in layer_shapes(model.spec) if name in there}


def of_weights(a: GPT, b: GPT, check: Callable[[], None]) -> dict[str, Any]:
    """Return the signal-to-noise ratio of each layer's weights and histograms by kind of layer.

    A layer whose shape changed, or that is gone, has none. What folds scales into weights (AWQ,
    SmoothQuant) makes them others without making outputs others, so there the ratio of weights
    says little, and the one of the stream counts.
    """
    import torch

    from gptcore.export.dense import dense_of

    layers: list[dict[str, Any]] = []
    kinds: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    others = matrices(b)
    for name, module in matrices(a).items():
        check()
        before = dense_of(module)[0].detach().float()
        other = others.get(name)
        after = None if other is None else dense_of(other)[0].detach().float()
        if after is None or before.shape != after.shape:
            layers.append({"layer": name, "snr_db": None, "zeros_ratio": None})
            continue
        noise = (before - after).square().sum().item()
        layers.append(
            {
                "layer": name,
                "snr_db": snr_db(before.square().sum().item(), noise),
                "zeros_ratio": (after == 0).float().mean().item(),
            }
        )
        was, now = kinds.setdefault(name.rpartition(".")[2], ([], []))
        step = max(1, before.numel() * a.spec.layers // MOST_COUNTED)
        was.append(before.flatten()[::step].clone())
        now.append(after.flatten()[::step].clone())
    histograms = {
        kind: histogram(torch.cat(was), torch.cat(now)) for kind, (was, now) in kinds.items()
    }
    return {"layers": layers, "histograms": histograms}


def snr_db(signal: float, noise: float) -> float | None:
    """Return 10·log10(signal ÷ noise), None where there is no noise at all."""
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


def histogram(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Return how many weights lie in each of equal bins, before and after; ends are cut off."""
    reach = REACH_STDS * (float(before.std()) or 1.0)
    return {
        "low": -reach,
        "high": reach,
        "before": _counts(before, reach),
        "after": _counts(after, reach),
    }


def _counts(weights: Tensor, reach: float) -> list[int]:
    import torch

    return [int(one) for one in torch.histc(weights, BINS, -reach, reach)]


def of_stream(layers: Iterator[Any]) -> list[dict[str, Any]]:
    """Return, for the stream behind each block, its signal-to-noise ratio and what was added.

    Args:
        layers: ``explain.difference.LayerDifference``, in order.
    """
    return [
        {
            "blocks": one.blocks,
            "snr_db": snr_db(1.0, one.accumulated**2),
            "introduced_ratio": one.introduced,
            "cosine": one.cosine,
        }
        for one in layers
    ]
