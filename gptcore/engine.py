"""A loaded model that turns Requests into Tokens.

Prefill (many positions at once, bound by arithmetic) and decode (one position, bound by reading
the weights) are separate functions, because they are separate costs. ``Generation`` is the state
of one request between two steps. Its ``going`` computes nothing: it says what has to be read next
and is sent the logits, so that a text is drawn, stopped and held to its rule by the same lines
whether it is written alone (iterate it) or beside others (``batching``).

Letters of shapes: B batch, T new tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gptcore import captured
from gptcore.constraint import Guide
from gptcore.errors import Cancelled, ContextOverflow, InvalidInput, NumericalError
from gptcore.kernels.step import NativeStep, adopt, step_of
from gptcore.linears.quantized import PackedLinear
from gptcore.linears.wide import wide_products
from gptcore.lookup import Lookup
from gptcore.model import GPT, KVCache
from gptcore.records import Alternative, FinishReason, Request, Token
from gptcore.sampling import Floats, Stage, draw, likeliest, stages, uniform
from gptcore.tokenizer import Tokenizer

PREFILL_CHUNK = 512
"""Tokens computed at once in prefill on an accelerator, at most."""
CPU_CHUNK = 256
"""Likewise on a CPU: twice as many are 6 % faster, and texts in floats have beginnings in common by
whole chunks."""
CHUNK_PARAMETERS = 3 * 10**10
"""Tokens × parameters of a chunk that cannot be broken off: about half a second on two cores."""
LEAST_CHUNK = 32
WIDE_TOKENS = 16
"""From here on 16-bit weights are multiplied in fp32 on a CPU without instructions for them."""
KEPT_BYTES = 2**28
"""Keys and values that an engine keeps of its last texts, at most."""
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
    if (step := reader_of(model, len(ids), cache)) is not None:
        return step.read(ids, cache, last_only=last_only)
    batch = torch.tensor([list(ids)], device=cache.k.device)  # (1, T)
    with torch.inference_mode(), _products(cache, len(ids))(model):
        logits: Tensor = model(batch, cache, last_only=last_only)
        return logits[0]


def _products(cache: KVCache, tokens: int) -> Callable[[nn.Module], AbstractContextManager[object]]:
    """Return in what context a part of the model multiplies so many tokens."""
    narrow = cache.k.device.type == "cpu" and cache.k.dtype != torch.float32
    return wide_products if narrow and tokens >= WIDE_TOKENS else nullcontext


def read_asked(model: GPT, asked: ToRead, cancelled: Callable[[], bool]) -> Tensor:
    """Read what a generation asked for.

    Raises:
        Cancelled: between two pieces; the cache is then as if the last of them had not been begun.
    """
    pieces = in_pieces(model, asked)
    while (logits := next(pieces)) is None:
        if cancelled():
            raise Cancelled("Cancelled while the prompt was being read.")
    return logits


def in_pieces(model: GPT, asked: ToRead, at_once: int | None = None) -> Iterator[Tensor | None]:
    """Read what a generation asked for, to the same bits however it is divided; logits come last.

    Between two pieces, where None comes, others may use the model: behind every block of it, or
    behind some tokens where bits do not depend on what is read with them.

    Args:
        model: on its device.
        asked: tokens and the cache that they are added to.
        at_once: of these some tokens; None for as many as our library reads at once.
    """
    ids, cache = asked.ids, asked.cache
    if (step := reader_of(model, len(ids), cache)) is not None:
        found = []
        for logits in step.read_on(ids, cache, last_only=not asked.each, at_once=at_once):
            found.append(logits)
            yield None
        yield torch.cat(found) if asked.each else found[-1][-1]
        return
    if not model.divisible:
        all_at_once = forward(model, ids, cache, last_only=not asked.each)
        yield all_at_once if asked.each else all_at_once[-1]
        return
    batch = torch.tensor([list(ids)], device=cache.k.device)  # (1, T)
    around = _products(cache, len(ids))
    pieces = model.by_blocks(batch, cache, last_only=not asked.each, around=around)
    while True:
        with torch.inference_mode():
            logits_of_all = next(pieces)
        if logits_of_all is not None:
            yield logits_of_all[0] if asked.each else logits_of_all[0, -1]
            return
        yield None


def reader_of(model: GPT, tokens: int, cache: KVCache) -> NativeStep | None:
    """Return the native step where it is what reads so many tokens, else None: torch does."""
    step = step_of(model)
    if step is not None and step.takes(cache) and (step.exact or tokens <= step.few_tokens):
        return step
    return None


def decode(model: GPT, id: int, cache: KVCache) -> Tensor:
    """Read one token into ``cache`` and return the logits after it: (V,).

    In one call of our own library where an Engine found that it can do this model and cache; on
    CUDA by a recorded step.
    """
    step = step_of(model)
    if step is not None and step.takes(cache):
        return step(id, cache)
    if (recorded := captured.captured_step(model, cache)) is not None:
        return recorded(torch.tensor([id]))[0]
    return prefill(model, (id,), cache)


class Engine:
    """A model with its tokenizer, ready for requests.

    Attributes:
        decoder: what computes a decode step, and if that is torch on a CPU, why.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, clock: Clock = time.monotonic) -> None:
        step = adopt(model)
        if model.draft is not None:
            adopt(model.draft.model)
        for one in model.modules():
            if isinstance(one, PackedLinear):
                one.make_ready()
        self.decoder = step.name if isinstance(step, NativeStep) else f"torch: {step}"
        self.model = model
        self.tokenizer = tokenizer
        self.clock = clock
        self._kept: list[Known] = []
        """Of the last texts that wanted to be kept, the oldest first."""

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
        shortcuts: bool = False,
    ) -> Generation:
        """Return a generation that computes nothing until it is iterated.

        Args:
            request: what to generate.
            shortcuts: leave out what the last text already computed, and guess ahead. The tokens
                are the same; times are then not those of every token alone.
            sent_at: when the request was sent, on this engine's clock; now, if not given.
            cancelled: asked before every step.

        Raises:
            ContextOverflow: as ``prompt_ids``.
            InvalidInput: a forced id is not in the vocabulary, or the constraint cannot be used.
        """
        return Generation(
            self, request, self.clock() if sent_at is None else sent_at, cancelled, shortcuts
        )

    def cache_for(self, ids: Sequence[int], capacity: int, others: Iterable[Known] = ()) -> KVCache:
        """Return a cache that knows as much of ``ids`` as an earlier text had in common with them.

        One token at least is left to be read. What is taken over has the bits that reading it anew
        would give: any number of tokens where a token's bits do not depend on its neighbours in a
        call, else whole chunks of the prompt.

        Args:
            ids: of a prompt.
            capacity: positions of the new cache.
            others: texts that are being written now, of which the beginning may be the same too.
        """
        cache = self.model.new_cache(capacity)
        granule, best, common = self._granule(cache), None, 0
        for one in (*self._kept, *others):
            shared = one.common(ids[:-1]) // granule * granule
            if shared >= max(common, 1) and one.cache.k.shape[-1] == cache.k.shape[-1]:
                best, common = one, shared
        if best is not None:
            for there, here in ((best.cache.k, cache.k), (best.cache.v, cache.v)):
                here[:, :, :, :common].copy_(there[:, :, :, :common])
            cache.length = common
            self._kept.sort(key=lambda one: one is best)  # the last to go
        return cache

    def known(self, ids: Sequence[int], answer: Sequence[int], cache: KVCache) -> Known:
        """Return what a text's cache knows that another text may take over."""
        chunk = self._granule(cache)
        exact = list(ids[: len(ids) // chunk * chunk])
        if chunk == 1:
            exact += answer[:-1]  # the last token was drawn, not read
        return Known(exact[: cache.length], cache)

    def keep(self, known: Known) -> None:
        """Keep what is known of a text for those to come, and as many before it as there is room.

        One that is too large for that is not kept, and none that it goes on from.
        """
        if known.nbytes > KEPT_BYTES:
            return
        self._kept = [one for one in self._kept if one.ids != known.ids[: len(one.ids)]]
        self._kept.append(known)
        while sum(one.nbytes for one in self._kept) > KEPT_BYTES:
            self._kept.pop(0)

    def forget(self) -> None:
        """Let go of what was kept."""
        self._kept.clear()

    def _granule(self, cache: KVCache) -> int:
        """Return of how many tokens the bits depend on each other."""
        step = step_of(self.model)
        exact = step is not None and step.exact and step.takes(cache)
        return 1 if exact else chunk_tokens(self.model)

    def decoder_of(self, cache: KVCache) -> str:
        """Return what computes a decode step with this cache."""
        if (recorded := captured.told(cache)) is not None:
            return recorded
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


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What a cache knows for certain: the tokens whose keys and values anybody would compute so."""

    ids: list[int]
    cache: KVCache

    @property
    def nbytes(self) -> int:
        """What the cache takes."""
        return self.cache.k.nbytes + self.cache.v.nbytes

    def common(self, ids: Sequence[int]) -> int:
        """Return how many tokens ``ids`` begins with in common."""
        most = min(len(self.ids), len(ids), self.cache.length)
        return next((i for i in range(most) if self.ids[i] != ids[i]), most)


@dataclass(frozen=True, slots=True, eq=False)
class ToRead:
    """Tokens that a generation wants to have read into its cache before it goes on.

    The answer is the logits after the last of them, (V,), or after each, (T, V).
    """

    ids: Sequence[int]
    cache: KVCache
    each: bool = False
    """Whether the logits after every token are wanted."""
    left: int | None = None
    """For the newest token of a text: how many are still to come, that one not counted."""


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
        Cancelled: as ``read_asked``.
    """
    size = chunk_tokens(model)
    for begin in range(0, len(ids), size):
        if cancelled():
            raise Cancelled("Cancelled while the prompt was being read.")
        logits = read_asked(model, ToRead(ids[begin : begin + size], cache), cancelled)
    return logits


def chunk_tokens(model: GPT) -> int:
    """Return how many tokens of a prompt are computed at once."""
    if model.embedding.weight.device.type != "cpu":
        return PREFILL_CHUNK
    if model.divisible:
        return CPU_CHUNK
    return max(LEAST_CHUNK, min(CPU_CHUNK, CHUNK_PARAMETERS // model.spec.parameters))


def as_numpy(logits: Tensor) -> Floats:
    """Return logits on the CPU as float32; waits for the device."""
    return np.asarray(logits.detach().float().cpu().numpy())


Going = Generator[Token | ToRead, Tensor, None]
"""A generation on its way: what it yields, and what it is sent for every ``ToRead``."""


def answer(going: Going, compute: Callable[[], Tensor]) -> Token | ToRead | None:
    """Send a generation the logits that it asked for, and return what it yields; None is its end.

    What goes wrong in ``compute`` is raised where it was asked for, so that the text ends in order.
    """
    try:
        try:
            logits = compute()
        except Exception as error:
            return going.throw(error)
        return going.send(logits)
    except StopIteration:
        return None


class Generation:
    """One request on its way; iterate it for Tokens, then read what it cost.

    Attributes:
        prompt_ids: after a cut.
        token_ids: of the answer so far, forced ones included.
        finish_reason: None until the end.
        new_tokens: tokens generated so far; forced ones, and the end of text, are none.
        guide: holds the text to the request's constraint; None where there is none.
        prefill_s: seconds of the prefill, None before it is done.
        reused_tokens: of the prompt, which another text had computed.
        steps: decode steps so far; fewer than tokens where guesses were right.
        most_others: texts that were decoded in the same steps, at most.
        lookup: guesses ahead; None where that is not wanted, or would save nothing.
        cache: keys and values of the text, None before it is begun.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        sent_at: float,
        cancelled: Callable[[], bool],
        shortcuts: bool = False,
    ) -> None:
        self.engine = engine
        self.request = request
        self.sent_at = sent_at
        self.prompt_ids, self.cut_tokens = engine.prompt_ids(request)
        self.token_ids: list[int] = []
        self.new_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.prefill_s: float | None = None
        self.reused_tokens = self.steps = self.most_others = 0
        self.lookup: Lookup | None = None
        self.cache: KVCache | None = None
        self.others: Callable[[], Iterable[Known]] = tuple
        """Texts beside this one; asked once, for a beginning in common."""
        self._shortcuts = shortcuts
        self.first_s: float | None = None
        """Seconds from sending to the first text that was not forced."""
        self.last_s: float | None = None
        """Seconds from sending to the last token."""
        self.cancelled = cancelled
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
    def decoder(self) -> str:
        """What computes the decode steps, and if that is torch, why."""
        return self.engine.decoder_of(self.cache) if self.cache else self.engine.decoder

    @property
    def how(self) -> dict[str, str | int]:
        """What a run keeps of how its text was computed, as JSON-able values."""
        found: dict[str, str | int] = {"decoder": self.decoder}
        if self._shortcuts:
            found["reused_tokens"] = self.reused_tokens
        if self.lookup:
            found["guessed_tokens"] = self.lookup.guessed
            found["accepted_tokens"] = self.lookup.accepted
        if self.most_others:
            found["most_others"] = self.most_others
        return found

    @property
    def limit(self) -> int:
        """How many new tokens there may be: those that were asked for, if the context has room."""
        known = len(self.prompt_ids) + len(self.request.forced_ids)
        return min(self.request.max_new_tokens, self.engine.model.spec.context - known)

    @property
    def capacity(self) -> int:
        """Positions that the text may come to have."""
        return len(self.prompt_ids) + len(self.request.forced_ids) + self.limit

    @property
    def known(self) -> Known | None:
        """What other texts may take over of this one, None before it is begun."""
        if self.cache is None:
            return None
        return self.engine.known(self.prompt_ids, self.token_ids, self.cache)

    def __iter__(self) -> Iterator[Token]:
        """Yield tokens until the limit, a stop string, the end of text, or a cancellation.

        Raises:
            NumericalError: a logit is NaN or infinite.
        """
        with closing(self.going()) as going:
            event = next(going, None)
            while event is not None:
                if isinstance(event, Token):
                    yield event
                    event = next(going, None)
                else:
                    event = answer(going, partial(self.read, event))

    def read(self, asked: ToRead) -> Tensor:
        """Compute what ``going`` asked for, with guesses ahead where that was wished for."""
        model = self.engine.model
        if asked.left is None:
            return read_asked(model, asked, self.cancelled)
        if self.lookup:
            logits, computed = self.lookup.after(asked.ids[0], asked.left)
            self.steps += computed
            return logits
        self.steps += 1
        return decode(model, asked.ids[0], asked.cache)

    def going(self) -> Going:
        """Yield tokens, and what has to be read between them; send the logits for the latter.

        Raises:
            NumericalError: a logit is NaN or infinite.
        """
        text = _Text(self.engine.tokenizer, self.request.stop)
        try:
            yield from self._begun(text)
        except Cancelled:
            self.finish_reason = FinishReason.CANCELLED
        except NumericalError:
            self.finish_reason = FinishReason.ERROR
            yield from text.flush()
            raise
        yield from text.flush()

    def _begun(self, text: _Text) -> Going:
        if self.cancelled():
            raise Cancelled("Cancelled before it began.")
        started = self.engine.clock()
        if self._shortcuts:
            cache = self.engine.cache_for(self.prompt_ids, self.capacity, self.others())
            self.reused_tokens = cache.length
        else:
            cache = self.engine.model.new_cache(self.capacity)
        self.cache = cache
        try:
            yield from self._written(text, cache, started)
        finally:
            if self._shortcuts:
                self.engine.keep(self.engine.known(self.prompt_ids, self.token_ids, cache))

    def _written(self, text: _Text, cache: KVCache, started: float) -> Going:
        """Yield the tokens of the trunk and then the new ones."""
        request, clock, limit = self.request, self.engine.clock, self.limit
        size = chunk_tokens(self.engine.model)
        for begin in range(cache.length, len(self.prompt_ids), size):
            if self.cancelled():
                raise Cancelled("Cancelled while the prompt was being read.")
            logits = yield ToRead(self.prompt_ids[begin : begin + size], cache)
        raw = as_numpy(logits)
        reading_s = clock() - started
        for begin in range(0, len(request.forced_ids), FORCED_CHUNK):
            if self.cancelled():
                raise Cancelled("Cancelled while the branch was being read.")
            chunk = request.forced_ids[begin : begin + FORCED_CHUNK]
            started = clock()
            after = yield ToRead(chunk, cache, each=True)  # (T, V)
            after = after.cpu()
            reading_s += clock() - started
            for id, following in zip(chunk, after, strict=True):
                yield from self._said(text, self._token(id, raw, self._chain(raw), forced=True))
                if text.stopped:
                    return
                if self.guide:
                    self.guide.take(id)
                raw = as_numpy(following)
        self.prefill_s = reading_s
        if self._shortcuts or self.engine.model.draft is not None:
            known = [*self.prompt_ids, *self.token_ids]
            self.lookup = Lookup.of(
                self.engine.model, cache, known, self._guessed, looks_up=self._shortcuts
            )
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
            yield from self._said(text, token)
            if text.stopped:
                return
            if self.guide:
                self.guide.take(token.id)
                if self.guide.complete:
                    self.finish_reason = FinishReason.EOS
                    return
            if self.new_tokens >= limit:
                self.finish_reason = FinishReason.LENGTH
                return
            if self.cancelled():
                raise Cancelled("Cancelled.")
            raw = as_numpy((yield ToRead((token.id,), cache, left=limit - self.new_tokens)))

    def _said(self, text: _Text, token: Token) -> Iterator[Token]:
        """Yield the tokens whose text is certain now; a stop string ends the generation."""
        for released in text.push(token):
            if self.first_s is None and released.text and not released.forced:
                self.first_s = token.seconds
            yield released
        if text.stopped:
            self.finish_reason = FinishReason.STOP

    def _drawn(self, logits: Floats) -> Token:
        chain = self._chain(logits)
        id = draw(chain[-1], uniform(self.request.seed, len(self.token_ids)))
        return self._token(id, logits, chain, forced=False)

    def _guessed(self, logits: Tensor, ahead: int) -> int:
        """Return what would be drawn from a draft's logits, with the random number of that draw."""
        if self.request.temperature == 0:
            return int(logits.argmax())
        chain = self._chain(as_numpy(logits))
        return draw(chain[-1], uniform(self.request.seed, len(self.token_ids) + ahead))

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
