"""A loaded model that turns Requests into Tokens.

Prefill (many positions at once, bound by arithmetic) and decode (one position, bound by reading
the weights) are separate functions, because they are separate costs. ``Generation`` is the state
of one request between two steps; nothing in it is shared, so that a scheduler can later step
many of them in turn.

Letters of shapes: B batch, T new tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gptcore.constraint import Guide
from gptcore.errors import Cancelled, ContextOverflow, InvalidInput, NumericalError
from gptcore.kernels.step import NativeStep, adopt, step_of
from gptcore.linears.wide import wide_products
from gptcore.model import GPT, KVCache
from gptcore.records import Alternative, FinishReason, Request, Token
from gptcore.sampling import Floats, Stage, draw, likeliest, stages, uniform
from gptcore.tokenizer import Tokenizer

PREFILL_CHUNK = 512
"""Tokens computed at once in prefill, at most; between two chunks a cancellation is seen."""
CHUNK_PARAMETERS = 3 * 10**10
"""Tokens × parameters of a chunk on a CPU: about half a second of work on two cores."""
LEAST_CHUNK = 32
WIDE_TOKENS = 16
"""From here on 16-bit weights are multiplied in fp32 on a CPU without instructions for them."""
FORCED_CHUNK = 64
"""As above where the logits of every position are wanted: 64 × V × 4 bytes are 13 MB."""

Clock = Callable[[], float]


def prefill(model: GPT, ids: Sequence[int], cache: KVCache) -> Tensor:
    """Read ``ids`` into ``cache`` and return the logits after the last of them.

    Args:
        model: on its device.
        ids: T ≥ 1 token ids; they stand behind what the cache already holds.
        cache: of one sequence, with room for T more.

    Returns:
        (V,).
    """
    return forward(model, ids, cache, last_only=True)[-1]


def forward(model: GPT, ids: Sequence[int], cache: KVCache, *, last_only: bool = False) -> Tensor:
    """Read ``ids`` into ``cache`` and return the logits after each: (T, V), or (1, V).

    A few tokens are read by our own library, where it can do this model and cache, many by torch:
    16-bit weights in fp32 where the CPU has no faster way.
    """
    step = step_of(model)
    if step is not None and len(ids) <= step.few_tokens and step.takes(cache):
        return step.read(ids, cache, last_only=last_only)
    batch = torch.tensor([list(ids)], device=cache.k.device)  # (1, T)
    wide = cache.k.device.type == "cpu" and len(ids) >= WIDE_TOKENS
    with torch.inference_mode(), wide_products(model) if wide else nullcontext():
        logits: Tensor = model(batch, cache, last_only=last_only)
        return logits[0]


def decode(model: GPT, id: int, cache: KVCache) -> Tensor:
    """Read one token into ``cache`` and return the logits after it: (V,).

    In one call of our own library where an Engine found that it can do this model and cache.
    """
    step = step_of(model)
    if step is not None and step.takes(cache):
        return step(id, cache)
    return prefill(model, (id,), cache)


class Engine:
    """A model with its tokenizer, ready for requests.

    Attributes:
        decoder: what computes a decode step, and if that is torch on a CPU, why.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, clock: Clock = time.monotonic) -> None:
        step = adopt(model)
        self.decoder = step.name if isinstance(step, NativeStep) else f"torch: {step}"
        self.model = model
        self.tokenizer = tokenizer
        self.clock = clock

    def prompt_ids(self, request: Request) -> tuple[list[int], int]:
        """Return the prompt's token ids and how many were cut from its beginning.

        Raises:
            ContextOverflow: the prompt leaves no room in the context and may not be cut.
        """
        return fit_prompt(
            self.tokenizer.encode_prompt(request.prompt, request.messages),
            request,
            context=self.model.spec.context,
        )

    def start(
        self,
        request: Request,
        *,
        sent_at: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """Return a generation that computes nothing until it is iterated.

        Args:
            request: what to generate.
            sent_at: when the request was sent, on this engine's clock; now, if not given.
            cancelled: asked before every step.

        Raises:
            ContextOverflow: as ``prompt_ids``.
            InvalidInput: a forced id is not in the vocabulary, or the constraint cannot be used.
        """
        return Generation(self, request, self.clock() if sent_at is None else sent_at, cancelled)

    def decoder_of(self, cache: KVCache) -> str:
        """Return what computes a decode step with this cache."""
        step = step_of(self.model)
        if step is None or step.takes(cache):
            return self.decoder
        return f"torch: {step.name} does not read a {type(cache).__name__} or a changed model."

    def next_logits(
        self, ids: Sequence[int], *, cancelled: Callable[[], bool] = lambda: False
    ) -> Floats:
        """Return the logits after ``ids`` from a full forward pass: (V,) float32."""
        if len(ids) > self.model.spec.context:
            raise ContextOverflow(
                f"{len(ids)} tokens do not fit into the context of {self.model.spec.context}."
            )
        cache = self.model.new_cache(len(ids))
        return as_numpy(read(self.model, ids, cache, cancelled))


def fit_prompt(ids: list[int], request: Request, *, context: int) -> tuple[list[int], int]:
    """Return ``ids`` cut to what fits into ``context``, and how many were cut.

    One place at least stays free for a new token; a prompt that is cut leaves room for all new
    tokens that were asked for, up to half the context.

    Raises:
        ContextOverflow: they do not fit, and the request says to refuse.
    """
    forced = len(request.forced_ids)
    if len(ids) + forced < context:
        return ids, 0
    if request.overflow == "refuse":
        raise ContextOverflow(
            f"The prompt has {len(ids) + forced:,} tokens and this model reads at most "
            f"{context:,}, of which one must stay free: shorten it, or choose to cut its beginning."
        )
    room = context - forced - min(request.max_new_tokens, context // 2)
    if room < 1:
        raise ContextOverflow(
            f"The {forced:,} tokens of the branch leave no room in the context of {context:,}."
        )
    return ids[-room:], len(ids) - room


def read(model: GPT, ids: Sequence[int], cache: KVCache, cancelled: Callable[[], bool]) -> Tensor:
    """Prefill in chunks and return the last logits, (V,).

    Raises:
        Cancelled: between two chunks.
    """
    size = chunk_tokens(model)
    for begin in range(0, len(ids), size):
        if cancelled():
            raise Cancelled("Cancelled while the prompt was being read.")
        logits = prefill(model, ids[begin : begin + size], cache)
    return logits


def chunk_tokens(model: GPT) -> int:
    """Return how many tokens of a prompt are computed at once."""
    if model.embedding.weight.device.type != "cpu":
        return PREFILL_CHUNK
    return max(LEAST_CHUNK, min(PREFILL_CHUNK, CHUNK_PARAMETERS // model.spec.parameters))


def as_numpy(logits: Tensor) -> Floats:
    """Return logits on the CPU as float32; waits for the device."""
    return np.asarray(logits.detach().float().cpu().numpy())


class Generation:
    """One request on its way; iterate it for Tokens, then read what it cost.

    Attributes:
        prompt_ids: after a cut.
        token_ids: of the answer so far, forced ones included.
        finish_reason: None until the end.
        new_tokens: tokens generated so far; forced ones, and the end of text, are none.
        guide: holds the text to the request's constraint; None where there is none.
        prefill_s: seconds of the prefill, None before it is done.
        decoder: what computes the decode steps, and if that is torch on a CPU, why.
    """

    def __init__(
        self, engine: Engine, request: Request, sent_at: float, cancelled: Callable[[], bool]
    ) -> None:
        self.engine = engine
        self.request = request
        self.sent_at = sent_at
        self.prompt_ids, self.cut_tokens = engine.prompt_ids(request)
        self.token_ids: list[int] = []
        self.new_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.prefill_s: float | None = None
        self.decoder = engine.decoder
        self.first_s: float | None = None
        """Seconds from sending to the first text that was not forced."""
        self.last_s: float | None = None
        """Seconds from sending to the last token."""
        self._cancelled = cancelled
        vocabulary = engine.model.spec.vocabulary
        self.guide = (
            Guide(request.constraint, engine.tokenizer, vocabulary, clock=engine.clock)
            if request.constraint
            else None
        )
        for id in request.forced_ids:
            if not 0 <= id < vocabulary:
                raise InvalidInput(f"Token id {id} is not in the vocabulary of {vocabulary:,}.")

    @property
    def how(self) -> dict[str, str]:
        """What a run keeps of how its text was computed, as JSON-able values."""
        return {"decoder": self.decoder}

    def __iter__(self) -> Iterator[Token]:
        """Yield tokens until the limit, a stop string, the end of text, or a cancellation.

        Raises:
            NumericalError: a logit is NaN or infinite.
        """
        text = _Text(self.engine.tokenizer, self.request.stop)
        try:
            for token in self._tokens():
                for released in text.push(token):
                    if self.first_s is None and released.text and not released.forced:
                        self.first_s = token.seconds
                    yield released
                if text.stopped:
                    self.finish_reason = FinishReason.STOP
                    break
        except Cancelled:
            self.finish_reason = FinishReason.CANCELLED
        except NumericalError:
            self.finish_reason = FinishReason.ERROR
            yield from text.flush()
            raise
        yield from text.flush()

    def _tokens(self) -> Iterator[Token]:
        model, request, clock = self.engine.model, self.request, self.engine.clock
        limit = min(
            request.max_new_tokens,
            model.spec.context - len(self.prompt_ids) - len(request.forced_ids),
        )
        cache = model.new_cache(len(self.prompt_ids) + len(request.forced_ids) + limit)
        self.decoder = self.engine.decoder_of(cache)
        started = clock()
        raw = as_numpy(read(model, self.prompt_ids, cache, self._cancelled))
        reading_s = clock() - started
        for begin in range(0, len(request.forced_ids), FORCED_CHUNK):
            if self._cancelled():
                raise Cancelled("Cancelled while the branch was being read.")
            chunk = request.forced_ids[begin : begin + FORCED_CHUNK]
            started = clock()
            after = forward(model, chunk, cache).cpu()  # (T, V)
            reading_s += clock() - started
            for id, following in zip(chunk, after, strict=True):
                yield self._token(id, raw, self._chain(raw), forced=True)
                if self.guide:
                    self.guide.take(id)
                raw = as_numpy(following)
        self.prefill_s = reading_s
        eos_ids = frozenset() if request.ignore_eos else self.engine.tokenizer.eos_ids
        if self.guide:
            eos_ids = self.guide.end_ids
            if self.guide.complete:
                self.finish_reason = FinishReason.EOS
                return
        while True:
            token = self._drawn(raw)
            if token.id in eos_ids:
                self.token_ids.pop()
                self.finish_reason = FinishReason.EOS
                return
            self.new_tokens += 1
            self.last_s = token.seconds
            yield token
            if self.guide:
                self.guide.take(token.id)
                if self.guide.complete:
                    self.finish_reason = FinishReason.EOS
                    return
            if self.new_tokens >= limit:
                self.finish_reason = FinishReason.LENGTH
                return
            if self._cancelled():
                raise Cancelled("Cancelled.")
            raw = as_numpy(decode(model, token.id, cache))

    def _drawn(self, logits: Floats) -> Token:
        chain = self._chain(logits)
        id = draw(chain[-1], uniform(self.request.seed, len(self.token_ids)))
        return self._token(id, logits, chain, forced=False)

    def _chain(self, logits: Floats) -> list[Stage]:
        penalised = self.request.repetition_penalty != 1.0
        seen = self.prompt_ids + self.token_ids if penalised else ()
        allowed = self.guide.allowed() if self.guide else None
        return stages(logits, self.request.sampling, seen, allowed)

    def _token(self, id: int, logits: Floats, chain: list[Stage], *, forced: bool) -> Token:
        others = likeliest(logits, self.request.alternatives)
        table = np.stack([stage.probabilities(others) for stage in chain], axis=1)
        seconds = self.engine.clock() - self.sent_at
        index = len(self.token_ids)
        self.token_ids.append(id)
        one = np.array([id])
        return Token(
            index=index,
            id=id,
            text="",
            logprob=float(np.log(max(chain[0].probabilities(one)[0], 1e-300))),
            probability=float(chain[-1].probabilities(one)[0]),
            seconds=seconds,
            alternatives=tuple(
                Alternative(
                    int(other), self.engine.tokenizer.token_text(int(other)), tuple(map(float, row))
                )
                for other, row in zip(others, table, strict=True)
            ),
            forced=forced,
        )


class _Text:
    """Gives tokens their text; holds them back while they may be the start of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._stream = tokenizer.stream()
        self._stops = stops
        self._held: list[Token] = []
        self.stopped = False

    def push(self, token: Token) -> list[Token]:
        """Return the tokens whose text is now certain; none while a stop string may begin."""
        self._held.append(_with_text(token, self._stream.push(token.id)))
        return self._release()

    def flush(self) -> list[Token]:
        """Return what is still held, at the end; a character that was not completed is left out."""
        return self._release(final=True)

    def _release(self, *, final: bool = False) -> list[Token]:
        text = "".join(token.text for token in self._held)
        found = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if found >= 0 and not self.stopped:
            self.stopped = True
            self._held = _cut(self._held, found)
        elif not final and not self.stopped and self._may_begin_stop(text):
            return []
        released, self._held = self._held, []
        return released

    def _may_begin_stop(self, text: str) -> bool:
        return any(
            text.endswith(stop[:length])
            for stop in self._stops
            for length in range(1, min(len(stop), len(text) + 1))
        )


def _cut(tokens: list[Token], length: int) -> list[Token]:
    kept = []
    for token in tokens:
        kept.append(_with_text(token, token.text[: max(0, length)]))
        length -= len(token.text)
    return kept


def _with_text(token: Token, text: str) -> Token:
    return replace(token, text=text)
