"""How well a model predicts a text: perplexity, with all that two of them must share.

The text's tokens are cut into windows; a token is scored once, in the first window that holds it,
by what the model says of it after the tokens before it in that window. With a stride shorter than
the window the windows overlap, and what was scored before is context only. A window's first token
is scored where it overlaps or where the model's first-of-text token is put before it; else nothing
stands before it, and it is context only.

Windows are computed one at a time and through the cache, as a prompt is: a pass that changes the
cache is measured too, and one that scales activations by call sees the calls of a prompt.

Letters of shapes: T tokens of a window, t of a chunk of them, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptcore.errors import ContextOverflow, InvalidInput, NumericalError
from gptcore.measure.corpora import JOINING, EvaluationText
from gptcore.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT

Floats = NDArray[np.float64]
Logits = Callable[["Tensor", int], "Iterator[Tensor]"]
"""(ids (T,), first) -> the logits after each of ids[first:], in order, as chunks (t, V) float32."""

CHUNK_BYTES = 32 * 2**20
"""Of one chunk of float32 logits; beside it a few more of this size are needed."""
MAX_CHUNK = 512
BLOCK_TOKENS = 128
"""Neighbouring tokens err together, so blocks of at least so many are taken as independent."""


class Windowing(BaseModel):
    """How a text is cut for scoring."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: int = Field(
        512,
        ge=2,
        le=1_048_576,
        title="Window",
        description="Tokens that the model sees at once, the scored ones included.",
    )
    stride: int = Field(
        0,
        ge=0,
        le=1_048_576,
        title="Stride",
        description="Tokens from the beginning of a window to that of the next; fewer than the "
        "window give each token more context, and take longer; 0 is the window.",
    )
    bos: bool = Field(
        False,
        title="First-of-text token",
        description="Put the model's first-of-text token before every window; models that were "
        "trained with it (Llama) predict badly without.",
    )
    max_tokens: int = Field(
        0,
        ge=0,
        le=100_000_000,
        title="Tokens",
        description="Use the text's first tokens only, so many; 0 uses all.",
    )

    @model_validator(mode="after")
    def _leaves_nothing_out(self) -> Windowing:
        if self.stride > self.window:
            raise ValueError(
                f"the stride of {self.stride:,} is longer than the window of {self.window:,} and "
                "would leave tokens out: choose at most the window"
            )
        return self

    @property
    def resolved_stride(self) -> int:
        """The number of tokens that ``stride`` stands for."""
        return self.stride or self.window


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``begin`` to ``end`` of the text, of which those from ``first`` on are scored."""

    begin: int
    first: int
    end: int


def windows(tokens: int, windowing: Windowing) -> tuple[Window, ...]:
    """Return the windows over a text of so many tokens, those without a scored token left out."""
    found, scored = [], 0
    for begin in range(0, tokens, windowing.resolved_stride):
        end = min(tokens, begin + windowing.window)
        first = max(scored, begin + (not windowing.bos))
        if first < end:
            found.append(Window(begin, first, end))
        scored = end
        if end == tokens:
            break
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Passage:
    """A text as one tokenizer's ids, with the bytes that each of them stands for."""

    text_hash: str
    tokenizer: str
    """The tokenizer's identity."""
    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    bos_id: int | None
    """What stands before every window, None where nothing does."""
    windowing: Windowing

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows in which its tokens are scored."""
        return windows(len(self.ids), self.windowing)

    def model_ids(self, window: Window) -> Tensor:
        """Return what the model reads to predict a window's tokens: all before its last one."""
        import torch

        ids = torch.from_numpy(self.ids[window.begin : window.end - 1])
        return ids if self.bos_id is None else torch.cat((torch.tensor([self.bos_id]), ids))

    def first_logits(self, window: Window) -> int:
        """Return the index in ``model_ids`` behind which the first scored token stands."""
        return window.first - window.begin - (self.bos_id is None)


def passage(text: EvaluationText, tokenizer: Tokenizer, windowing: Windowing) -> Passage:
    """Return ``text`` as tokens, ready to be scored.

    Raises:
        InvalidInput: it has too few tokens to score one, or the tokenizer has no first-of-text
            token and one is asked for.
    """
    ids, sizes = tokenizer.encode_sized(text.content)
    if windowing.bos and tokenizer.bos_id is None:
        raise InvalidInput("This model's tokenizer has no first-of-text token: measure without it.")
    most = windowing.max_tokens or len(ids)
    found = Passage(
        text_hash=text.hash,
        tokenizer=tokenizer.identity,
        ids=np.array(ids[:most], dtype=np.int64),
        sizes=np.array(sizes[:most], dtype=np.int64),
        bos_id=tokenizer.bos_id if windowing.bos else None,
        windowing=windowing,
    )
    if not found.windows:
        raise InvalidInput(
            f"The text {text.name} has {len(found.ids)} token{'s' * (len(found.ids) != 1)} to "
            "read, and a token is scored by what stands before it: give at least two."
        )
    return found


def require_context(passage: Passage, context: int, model: str) -> None:
    """Refuse windows that a model cannot see whole.

    Raises:
        ContextOverflow: the window is longer than the context.
    """
    if (window := passage.windowing.window) > context:
        raise ContextOverflow(
            f"The window of {window:,} tokens is longer than the context of {model}, "
            f"{context:,}: choose at most that."
        )


@dataclass(frozen=True, slots=True)
class Identity:
    """What two perplexities must share to be compared."""

    text: str
    """``sha256:…`` of the normalised text."""
    joining: str
    """How pieces of text became one."""
    tokenizer: str
    tokens: int
    """The text's first so many tokens were used."""
    window: int
    stride: int
    bos: int | None
    """The id before every window, None without one."""
    scored_positions: int
    """Tokens scored; which ones, the other fields decide."""


def require_comparable(one: Identity, other: Identity) -> None:
    """Refuse to compare perplexities of different things.

    Raises:
        InvalidInput: a field differs; it names all that do.
    """
    found, wanted = asdict(one), asdict(other)
    differing = [
        f"{name.replace('_', ' ')} ({_brief(found[name])} and {_brief(wanted[name])})"
        for name in found
        if found[name] != wanted[name]
    ]
    if differing:
        across = found["tokenizer"] != wanted["tokenizer"] and found["text"] == wanted["text"]
        way_out = "compare bits per byte" if across else "measure both alike"
        raise InvalidInput(
            f"These perplexities cannot be compared, they differ in {', '.join(differing)}: "
            f"{way_out}."
        )


def _brief(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)[:19]


@dataclass(frozen=True, slots=True)
class Scored:
    """A window and what its scored tokens cost, in nats."""

    window: Window
    nll: Floats


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(Σ NLL / scored tokens), with its identity."""

    identity: Identity
    nats: float
    """Σ NLL of the scored tokens."""
    scored_tokens: int
    scored_bytes: int
    """UTF-8 bytes of the text for which the scored tokens stand."""
    windows: int
    nll_se: float | None
    """Standard error of the mean NLL, from blocks of windows; None where there are not two."""

    @property
    def nll_mean(self) -> float:
        """Mean nats a token."""
        return self.nats / self.scored_tokens

    @property
    def perplexity(self) -> float:
        """exp(mean NLL).

        Raises:
            NumericalError: no number can hold it.
        """
        try:
            return math.exp(self.nll_mean)
        except OverflowError:
            raise NumericalError(
                f"The model gives the text {self.nll_mean:,.0f} nats a token, and no number holds "
                "the perplexity of that: this variant is broken."
            ) from None

    @property
    def bits_per_byte(self) -> float | None:
        """Σ NLL / (ln 2 · bytes); None where the scored tokens stand for no byte."""
        return self.nats / (math.log(2) * self.scored_bytes) if self.scored_bytes else None

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return {
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "scored_tokens": self.scored_tokens,
            "scored_bytes": self.scored_bytes,
            "nll_mean": self.nll_mean,
            "nll_se": self.nll_se,
            "windows": self.windows,
            "identity": asdict(self.identity),
        }


def score(passage: Passage, logits: Logits) -> Iterator[Scored]:
    """Yield every window's costs; logits are held a chunk at a time.

    Raises:
        NumericalError: a logit is NaN or infinite.
    """
    import torch

    for window in passage.windows:
        costs, at = [], window.first
        for chunk in logits(passage.model_ids(window), passage.first_logits(window)):
            targets = torch.from_numpy(passage.ids[at : at + len(chunk)]).to(chunk.device)
            costs.append(nll_of(chunk, targets, at))
            at += len(chunk)
        yield Scored(window, np.concatenate(costs))


def summary(passage: Passage, scored: Sequence[Scored]) -> Perplexity:
    """Return the perplexity over the windows that were scored so far, one at least."""
    costs = [one.nll for one in scored]
    windowing = passage.windowing
    count = sum(map(len, costs))
    return Perplexity(
        identity=Identity(
            text=passage.text_hash,
            joining=JOINING,
            tokenizer=passage.tokenizer,
            tokens=len(passage.ids),
            window=windowing.window,
            stride=windowing.resolved_stride,
            bos=passage.bos_id,
            scored_positions=count,
        ),
        nats=math.fsum(float(one.sum()) for one in costs),
        scored_tokens=count,
        scored_bytes=sum(
            int(passage.sizes[one.window.first : one.window.end].sum()) for one in scored
        ),
        windows=len(scored),
        nll_se=error_of_mean(costs),
    )


def error_of_mean(costs: Sequence[Floats]) -> float | None:
    """Return the standard error of the mean over all tokens of consecutive windows.

    The tokens of a window are no independent observations; blocks of ``BLOCK_TOKENS`` or more,
    made of whole windows, nearly are. The ratio estimator over blocks of n_i tokens with sums s_i:
    se² = k / (k − 1) · Σ (s_i − mean · n_i)² / (Σ n_i)². Source: Cochran 1977, section 6.4.

    Returns:
        None where there are fewer than two blocks.
    """
    blocks: list[list[float]] = []
    for one in costs:
        if not blocks or blocks[-1][1] >= BLOCK_TOKENS:
            blocks.append([0.0, 0])
        blocks[-1][0] += float(one.sum())
        blocks[-1][1] += len(one)
    if len(blocks) < 2:
        return None
    sums, counts = np.array(blocks).T
    apart = sums - sums.sum() / counts.sum() * counts
    k = len(blocks)
    return float(np.sqrt(k / (k - 1) * (apart**2).sum()) / counts.sum())


def nll_of(logits: Tensor, targets: Tensor, at: int) -> Floats:
    """Return −ln of each target's probability, in float64.

    Args:
        logits: (t, V) float32.
        targets: (t,) ids, on the same device.
        at: index of the first target in the text, for an error to name.

    Raises:
        NumericalError: a logit is NaN or infinite.
    """
    costs = log_total(logits) - logits.gather(1, targets[:, None])[:, 0].double()
    found: Floats = costs.cpu().numpy()
    require_finite(found, at)
    return found


def log_total(logits: Tensor) -> Tensor:
    """Return ln Σ exp of each row, (t, V) float32 -> (t,) float64, summed in float64."""
    import torch

    top = logits.amax(dim=1, keepdim=True)
    return top[:, 0].double() + (logits - top).exp_().sum(dim=1, dtype=torch.float64).log()


def require_finite(costs: Floats, at: int) -> None:
    """Refuse what is no number.

    Raises:
        NumericalError: it names the token.
    """
    wrong = np.flatnonzero(~np.isfinite(costs))
    if len(wrong):
        raise NumericalError(
            f"The model produced NaN or infinity at token {at + int(wrong[0]):,} of the text, so "
            "there is no perplexity: choose another precision or recipe."
        )


def call_tokens(vocabulary: int) -> int:
    """Return how many scored tokens at most go through a model in one call."""
    return max(1, min(MAX_CHUNK, CHUNK_BYTES // (4 * vocabulary)))


def model_logits(model: GPT) -> Logits:
    """Return what asks a model for its logits in chunks of ``CHUNK_BYTES``.

    Tokens that are context only are read without computing their logits.
    """
    import torch

    size = call_tokens(model.spec.vocabulary)

    def logits(ids: Tensor, first: int) -> Iterator[Tensor]:
        with torch.inference_mode():
            cache = model.new_cache(len(ids))
        device = cache.k.device
        context, scored = ids[:first].to(device), ids[first:].to(device)
        for begin in range(0, len(context), MAX_CHUNK):
            with torch.inference_mode():
                model(context[None, begin : begin + MAX_CHUNK], cache, last_only=True)
        for begin in range(0, len(scored), size):
            with torch.inference_mode():
                chunk = model(scored[None, begin : begin + size], cache)[0].float()  # (t, V)
            # Apple's GPUs have no float64, in which the sums are made.
            yield chunk.cpu() if device.type == "mps" else chunk

    return logits
