"""Several texts of one engine side by side: they join and leave between two steps.

A step gives every text that is being written its next token. The weights are read once for all of
them, as far as our own library decodes; each text keeps its own cache, sampler, rule and stop
strings, and gets the bits that it would get alone. Behind the step one prompt of those that wait to
be read is read on, for as long as the step took, so that the gap between two tokens of the others
about doubles, where a whole chunk would make it half a second. It is the prompt that came first and
the one that is done soonest in turns: neither a short one nor a long one waits for all others. A
prompt is read in the same chunks as alone, since the bits of a float model depend on them; what is
read at a time is a part of a chunk: some blocks of the model, or some tokens where bits do not
depend on that.

A text that is alone is decoded as ``Generation`` does when it is iterated, guesses ahead included.

Memory is given out by the slot: a text takes what it may come to need, and one for which there is
no room waits until others have ended. Who came first is let in first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gptcore.captured import captured_rows
from gptcore.engine import (
    Engine,
    Generation,
    Going,
    Known,
    ToRead,
    answer,
    decode,
    in_pieces,
    read_asked,
)
from gptcore.errors import Cancelled, DoesNotFit
from gptcore.kernels.step import step_of
from gptcore.model import GPT, KVCache
from gptcore.records import Token

MOST_TEXTS = 32
"""Texts side by side, at most; what one call of our library takes."""
LEAST_READING_S = 0.02
"""For so long prompts are read behind every step, however fast that was."""
PIECE_TOKENS = 8
"""Tokens of a prompt that are read before the clock is looked at: a quarter of a call."""


@dataclass(frozen=True, slots=True, eq=False)
class Advance:
    """What became of a text in a step."""

    generation: Generation
    tokens: tuple[Token, ...]
    ended: bool = False
    error: Exception | None = None
    """What broke it off; the other texts go on."""


@dataclass(slots=True, eq=False)
class _Text:
    """A text that has its slot."""

    generation: Generation
    nbytes: int
    going: Going
    asked: ToRead | None = None
    """What it waits for; None at its end."""
    pieces: Iterator[Tensor | None] | None = None
    """How that is being read, where it was begun."""

    @property
    def is_writing(self) -> bool:
        """Whether its prompt is read, and it waits for the logits behind its newest token."""
        return self.asked is not None and self.asked.left is not None

    def left_to_read(self) -> int:
        """Return how many tokens of its prompt and trunk are not read."""
        known, one = self.generation.cache, self.generation
        whole = len(one.prompt_ids) + len(one.request.forced_ids)
        return whole - (known.length if known else 0)


class Batch:
    """Texts of one engine, written side by side.

    Args:
        engine: what they are written by.
        budget_bytes: what the caches of all texts may take together.
        most: texts side by side.
        least_reading_s: for so long prompts are read behind every step, if not for longer.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        budget_bytes: int,
        most: int = MOST_TEXTS,
        least_reading_s: float = LEAST_READING_S,
    ) -> None:
        one = engine.model.new_cache(1)
        self.least_reading_s = least_reading_s
        self.budget_bytes = budget_bytes
        self.most = most
        self._position_bytes = one.k.nbytes + one.v.nbytes
        self._engine = engine
        self._texts: list[_Text] = []
        self._waiting: deque[Generation] = deque()
        self._step_s = 0.0
        self._first_comes = False
        """Whose turn it was to be read: that of who came first, or of who is done soonest."""

    def __len__(self) -> int:
        """How many texts there are, those that wait for room included."""
        return len(self._texts) + len(self._waiting)

    @property
    def used_bytes(self) -> int:
        """What the texts that were let in may come to need."""
        return sum(one.nbytes for one in self._texts)

    def needed_bytes(self, generation: Generation) -> int:
        """Return what a text may come to need."""
        return generation.capacity * self._position_bytes

    def has_room(self, generation: Generation) -> bool:
        """Return whether a text would be let in with the next step."""
        needed = sum(map(self.needed_bytes, (*self._waiting, generation)))
        return self.used_bytes + needed <= self.budget_bytes and len(self) < self.most

    def add(self, generation: Generation) -> None:
        """Let a text in with the next step for which there is room.

        Raises:
            DoesNotFit: there never will be.
        """
        needed = self.needed_bytes(generation)
        if needed > self.budget_bytes:
            raise DoesNotFit(
                f"A text of up to {generation.capacity:,} tokens needs {_mib(needed)} of cache, "
                f"and texts that are written side by side may take {_mib(self.budget_bytes)} "
                "together: ask for fewer new tokens, or shorten the prompt."
            )
        self._waiting.append(generation)

    def step(self) -> Iterator[Advance]:
        """Go one step on, and yield what became of each text; to be iterated to its end."""
        yield from self._let_in()
        if len(self._texts) > 1:
            for one in self._texts:
                others = len(self._texts) - 1
                one.generation.most_others = max(one.generation.most_others, others)
        began = self._engine.clock()
        writing = [one for one in self._texts if one.is_writing]
        for one, compute in zip(writing, self._decoded(writing), strict=True):
            yield self._answered(one, compute)
        self._step_s = self._engine.clock() - began
        yield from self._stopped()
        yield from self._read_on()

    def _let_in(self) -> Iterator[Advance]:
        """Begin the texts that have waited, while there is room; those that were stopped end."""
        for generation in tuple(self._waiting):
            if generation.cancelled():
                self._waiting.remove(generation)
                yield self._begun(generation)
        while self._waiting and len(self._texts) < self.most:
            needed = self.needed_bytes(self._waiting[0])
            if self.used_bytes + needed > self.budget_bytes:
                return
            yield self._begun(self._waiting.popleft())

    def _begun(self, generation: Generation) -> Advance:
        generation.others = self._known
        text = _Text(generation, self.needed_bytes(generation), generation.going())
        self._texts.append(text)
        return self._advanced(text, lambda: next(text.going, None))

    def _known(self) -> list[Known]:
        return [known for one in self._texts if (known := one.generation.known) is not None]

    def _decoded(self, writing: Sequence[_Text]) -> list[Callable[[], Tensor]]:
        """Decode a token of every text, and return what gives the logits of each."""
        if len(writing) == 1:
            (one,) = writing
            assert one.asked is not None
            return [partial(one.generation.read, one.asked)]
        asked = [one.asked for one in writing if one.asked is not None]
        for one, wanted in zip(writing, asked, strict=True):
            if one.generation.lookup:
                one.generation.lookup.pass_over(wanted.ids[0])
            one.generation.steps += 1
        ids, caches = [one.ids[0] for one in asked], [one.cache for one in asked]
        return together(self._engine.model, ids, caches)

    def _stopped(self) -> Iterator[Advance]:
        """End the texts that were stopped while their prompt waits to be read."""
        for one in tuple(self._texts):
            if one.asked is not None and not one.is_writing and one.generation.cancelled():
                yield self._answered(one, _cancel)

    def _read_on(self) -> Iterator[Advance]:
        """Read on in one of the prompts that are not read: as long as a step, if others write."""
        unread = [one for one in self._texts if not one.is_writing]
        if not unread:
            return
        self._first_comes = not self._first_comes
        text = unread[0] if self._first_comes else min(unread, key=_Text.left_to_read)
        model, clock = self._engine.model, self._engine.clock
        assert text.asked is not None
        if text.pieces is None and len(unread) == len(self._texts):
            read = partial(read_asked, model, text.asked, text.generation.cancelled)
            yield self._answered(text, read)
            return
        text.pieces = text.pieces or in_pieces(model, text.asked, PIECE_TOKENS)
        until = clock() + max(self._step_s, self.least_reading_s)
        try:
            logits = next(text.pieces)
            while logits is None and clock() < until:
                logits = next(text.pieces)
        except Exception as error:
            yield self._answered(text, partial(_fail, error))
            return
        if logits is not None:
            yield self._answered(text, partial(_given, logits))

    def _answered(self, text: _Text, compute: Callable[[], Tensor]) -> Advance:
        text.pieces = None
        return self._advanced(text, lambda: answer(text.going, compute))

    def _advanced(self, text: _Text, go: Callable[[], Token | ToRead | None]) -> Advance:
        """Let a text go on until it wants something read, or ends, and return what it said."""
        tokens = []
        try:
            event = go()
            while isinstance(event, Token):
                tokens.append(event)
                event = next(text.going, None)
        except Exception as error:
            self._texts.remove(text)
            return Advance(text.generation, tuple(tokens), ended=True, error=error)
        text.asked = event
        if event is None:
            self._texts.remove(text)
        return Advance(text.generation, tuple(tokens), ended=event is None)

    def close(self) -> None:
        """Break off every text; what each cache knows may still be kept."""
        for one in self._texts:
            one.going.close()
        self._texts.clear()
        self._waiting.clear()


def together(
    model: GPT, ids: Sequence[int], caches: Sequence[KVCache]
) -> list[Callable[[], Tensor]]:
    """Read one token into each of B caches of one text, and return what gives the logits of each.

    Our own library reads the weights once for many of them, at once, and so does a step that was
    recorded on CUDA for 16-bit weights. Torch reads one after the other, when they are asked for:
    its sums of several at once are other sums than those of one, and the texts would not be those
    that are written alone.
    """
    step = step_of(model)
    if step is not None and all(step.takes(one) for one in caches):
        # Where the call breaks, none is read: each by itself then shows whose fault it is.
        with suppress(Exception):
            return [partial(_given, one) for one in step.batch(ids, caches)]
    elif (rows := captured_rows(model, caches)) is not None:
        with suppress(Exception):
            return [partial(_given, one) for one in rows(torch.tensor(ids), caches)]
    return [partial(decode, model, id, cache) for id, cache in zip(ids, caches, strict=True)]


def _given(logits: Tensor) -> Tensor:
    return logits


def _fail(error: Exception) -> Tensor:
    raise error


def _cancel() -> Tensor:
    raise Cancelled("Cancelled while the prompt was being read.")


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
