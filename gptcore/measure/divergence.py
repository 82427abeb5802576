"""What a change did to a model's predictions: two variants on the same tokens, token by token.

Perplexity alone hides damage, as some tokens get better where others get worse. So the whole
distributions are compared: KL divergence from A to B, the true token's probability, the likeliest
token, and the texts that both write greedily. Logits stream by in chunks and are never kept, but
for the few windows of ``alternated``.

Letters of shapes: t tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptcore.errors import InvalidInput
from gptcore.measure.perplexity import (
    Floats,
    Logits,
    Passage,
    Scored,
    Window,
    error_of_mean,
    log_total,
    require_finite,
)

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT
    from gptcore.tokenizer import Tokenizer

SLICE = 2**18
"""Logits that are compared at once: few enough to stay in a processor's cache."""
TAIL_TOKENS = 1000
"""The 99.9 % quantile of fewer is the largest value by another name, and is left out."""


@dataclass(frozen=True, slots=True)
class Paired:
    """A window under A and B; each array has one entry a scored token."""

    window: Window
    nll_a: Floats
    nll_b: Floats
    kl: Floats
    """KL(A‖B) of the distributions before the token, in nats."""
    same_top: NDArray[np.bool_]
    """Whether both find the same token likeliest; of equals the lowest id."""

    @property
    def a(self) -> Scored:
        """The window as A alone scores it."""
        return Scored(self.window, self.nll_a)

    @property
    def b(self) -> Scored:
        """The window as B alone scores it."""
        return Scored(self.window, self.nll_b)


@dataclass(frozen=True, slots=True)
class Divergence:
    """B against A over all scored tokens."""

    tokens: int
    log_ppl_ratio_mean: float
    """ln(PPL_B / PPL_A): the mean over tokens of NLL_B − NLL_A."""
    log_ppl_ratio_se: float | None
    """Its standard error from paired blocks of windows; None where there are not two."""
    kl_mean: float
    kl_se: float | None
    kl_median: float
    kl_p99: float
    kl_p999: float | None
    """None for fewer than 1,000 tokens."""
    delta_p_mean: float
    """Mean of p_B − p_A of the true token."""
    delta_p_rms: float
    same_top_ratio: float

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return asdict(self)


def require_same_tokens(a: Tokenizer, b: Tokenizer) -> None:
    """Refuse variants whose tokens are not the same.

    Raises:
        InvalidInput: their tokenizers differ.
    """
    if a.identity != b.identity:
        raise InvalidInput(
            "The two variants have different tokenizers, so they do not predict the same tokens: "
            "measure each alone and compare bits per byte."
        )


def paired(passage: Passage, a: Logits, *others: Logits) -> Iterator[tuple[Paired, ...]]:
    """Yield every window under A and each other variant, a chunk of each in memory at a time.

    Raises:
        InvalidInput: they have different vocabularies.
        NumericalError: a logit is NaN or infinite.
    """
    for window in passage.windows:
        ids, first = passage.model_ids(window), passage.first_logits(window)
        chunks = zip(*(one(ids, first) for one in (a, *others)), strict=True)
        yield _window(passage, window, chunks)


def alternated(
    passage: Passage,
    open_a: Callable[[], Logits],
    *open_others: Callable[[], Logits],
    vocabulary: int,
    held_bytes: int,
) -> Iterator[tuple[Paired, ...]]:
    """Yield what ``paired`` does, bit for bit, for variants that do not fit together.

    In rounds: one variant's logits for as many windows as ``held_bytes`` hold stay in memory on
    the CPU, then the others are loaded in turn and compared with them. Of two variants the one
    that is loaded goes first in the next round, so every round loads once; of more it is always A.

    Args:
        passage: the text.
        open_a: loads A, letting go of what is loaded, and returns its logits, to be used until
            another one is loaded.
        open_others: likewise, each of the others.
        vocabulary: V.
        held_bytes: for the logits that are kept; one window is the least.
    """
    left = list(passage.windows)
    a_first = True
    while left:
        rows = held_bytes // (4 * vocabulary)
        count = 1
        while count < len(left) and sum(one.end - one.first for one in left[: count + 1]) <= rows:
            count += 1
        round, left = left[:count], left[count:]
        in_turn = (open_a, *open_others) if a_first else (open_others[0], open_a)
        logits = in_turn[0]()
        kept = [
            [chunk.cpu() for chunk in logits(passage.model_ids(one), passage.first_logits(one))]
            for one in round
        ]
        del logits
        found: list[list[Paired]] = [[] for _ in round]
        for opened in in_turn[1:]:
            logits = opened()
            for number, one in enumerate(round):
                fresh = logits(passage.model_ids(one), passage.first_logits(one))
                held = kept[number]
                if opened is in_turn[-1]:
                    kept[number] = []
                both = ((x.to(y.device), y) for x, y in zip(held, fresh, strict=True))
                found[number] += _window(passage, one, both if a_first else _swapped(both))
                if opened is in_turn[-1]:
                    yield tuple(found[number])
            del logits, fresh, both, held
        a_first = len(open_others) > 1 or not a_first


def _swapped(pairs: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    return ((b, a) for a, b in pairs)


def _window(
    passage: Passage, window: Window, chunks: Iterator[tuple[Tensor, ...]]
) -> tuple[Paired, ...]:
    """Return a window under A, whose logits stand first, and each other variant."""
    import torch

    found: list[list[tuple[Floats, Floats, Floats, NDArray[np.bool_]]]] = []
    at = window.first
    for a, *others in chunks:
        targets = torch.from_numpy(passage.ids[at : at + len(a)]).to(a.device)
        found.append([])
        for b in others:
            if a.shape[1] != b.shape[1]:
                raise InvalidInput(
                    f"The variants have vocabularies of {a.shape[1]:,} and {b.shape[1]:,} "
                    "tokens, so their predictions cannot be compared: measure each alone."
                )
            with torch.inference_mode():
                numbers = compare(a, b, targets)
            for one in numbers[:3]:
                require_finite(one, at)
            found[-1].append(numbers)
        at += len(a)
    pairs = []
    for side in zip(*found, strict=True):
        nll_a, nll_b, kl, same_top = (np.concatenate(parts) for parts in zip(*side, strict=True))
        pairs.append(Paired(window, nll_a, nll_b, kl, same_top))
    return tuple(pairs)


def compare(
    a: Tensor, b: Tensor, targets: Tensor
) -> tuple[Floats, Floats, Floats, NDArray[np.bool_]]:
    """Return NLL under A and B, KL(A‖B) and whether the likeliest token is the same, by row.

    KL = Σ p_A (ln p_A − ln p_B), in float64: where the two are close it is a small difference of
    large numbers, of which float32 would leave the first four digits.

    Args:
        a: (t, V) float32.
        b: (t, V) float32, on the same device.
        targets: (t,) ids.

    Returns:
        Four arrays of t.
    """
    import torch

    rows = max(1, SLICE // a.shape[1])
    found = [
        _compared_rows(*slices)
        for slices in zip(*(torch.split(one, rows) for one in (a, b, targets)), strict=True)
    ]
    nll_a, nll_b, kl, same = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return nll_a, nll_b, kl, same


def _compared_rows(a: Tensor, b: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = targets[:, None]
    nll_a = log_total(a) - a.gather(1, columns)[:, 0].double()
    nll_b = log_total(b) - b.gather(1, columns)[:, 0].double()
    log_p, log_q = a.double().log_softmax(1), b.double().log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1).clamp_min(0)
    return nll_a, nll_b, kl, a.argmax(dim=1) == b.argmax(dim=1)


def divergence(pairs: Sequence[Paired]) -> Divergence:
    """Return the report over the windows that were compared so far, one at least."""
    nll_a = np.concatenate([one.nll_a for one in pairs])
    nll_b = np.concatenate([one.nll_b for one in pairs])
    kl = np.concatenate([one.kl for one in pairs])
    moved = np.exp(-nll_b) - np.exp(-nll_a)
    return Divergence(
        tokens=len(kl),
        log_ppl_ratio_mean=float((nll_b - nll_a).mean()),
        log_ppl_ratio_se=error_of_mean([one.nll_b - one.nll_a for one in pairs]),
        kl_mean=float(kl.mean()),
        kl_se=error_of_mean([one.kl for one in pairs]),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_p999=float(np.quantile(kl, 0.999)) if len(kl) >= TAIL_TOKENS else None,
        delta_p_mean=float(moved.mean()),
        delta_p_rms=float(np.sqrt((moved**2).mean())),
        same_top_ratio=float(np.concatenate([one.same_top for one in pairs]).mean()),
    )


@dataclass(frozen=True, slots=True)
class Agreement:
    """How long two variants write the same when each takes its likeliest token."""

    prompts: int
    new_tokens: int
    """Written after each prompt, past the end of text."""
    first_divergent: tuple[int | None, ...]
    """For each prompt the first token that differs, counted from 1; None where none does."""
    agreement_ratio: float
    """Mean share of a text's tokens that stand before the first that differs."""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return asdict(self)


def prompts_of(passage: Passage, count: int, length: int) -> tuple[tuple[int, ...], ...]:
    """Return beginnings for greedy texts: runs of the passage's tokens, evenly spread.

    A passage that is too short for so many gives fewer, and one at least.
    """
    tokens = len(passage.ids)
    length = min(length, tokens)
    count = max(1, min(count, tokens // length))
    starts = (at * (tokens - length) // max(1, count - 1) for at in range(count))
    return tuple(tuple(map(int, passage.ids[at : at + length])) for at in starts)


def greedy(
    model: GPT, prompt: Sequence[int], new_tokens: int, check: Callable[[], None] = lambda: None
) -> tuple[int, ...]:
    """Return the ids that a model writes after ``prompt``, each the likeliest, past any end.

    Args:
        model: on its device.
        prompt: ids; with ``new_tokens`` they fit into the context.
        new_tokens: how many to write.
        check: called before each; raises Cancelled where the user stopped the work.
    """
    from gptcore.engine import decode, prefill

    cache = model.new_cache(len(prompt) + new_tokens)
    logits = prefill(model, prompt, cache)
    written = [int(logits.argmax())]
    while len(written) < new_tokens:
        check()
        written.append(int(decode(model, written[-1], cache).argmax()))
    return tuple(written)


def agreement(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> Agreement:
    """Return how the greedy texts of two variants agree; text i of both follows prompt i."""
    firsts = [_first_divergent(one, other) for one, other in zip(a, b, strict=True)]
    length = len(a[0])
    return Agreement(
        prompts=len(firsts),
        new_tokens=length,
        first_divergent=tuple(firsts),
        agreement_ratio=fmean(1.0 if at is None else (at - 1) / length for at in firsts),
    )


def _first_divergent(a: Sequence[int], b: Sequence[int]) -> int | None:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=True), start=1) if x != y), None)
