"""Guess ahead by looking up what stood behind the same words before, and check it in one step.

A native step reads the weights once for several tokens. So the tokens that followed the last three
when these occurred before are read together with the newest one; as long as the draws agree with
the guess, their logits are there already. Every draw sees the logits that it would see without, to
the bit, so the text is the same, drawn or greedy. Source: Leviathan et al. 2023, arXiv:2211.17192,
with the prompt as the draft model (Saxena 2023, prompt lookup decoding).

Guessing costs: eight tokens take about one and a half times as long as one. Where guesses are
mostly wrong it pauses, each time for longer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gptcore.kernels.step import NativeStep, step_of
from gptcore.model import GPT, KVCache

GRAM = 3
"""Tokens that must have occurred before, in this order."""
GUESSES = 7
"""Tokens guessed at once, at most: with the newest one they fill a call of the native step."""
WINDOW = 3
"""Guesses in a row that are judged together."""
LEAST_ACCEPTED = 0.75
"""Tokens that a guess of the window must have saved on average."""
PAUSE = 32
"""Tokens without a guess after a bad window; twice as many after the next."""


class Lookup:
    """Decodes one text, and guesses ahead where the text repeats itself.

    Attributes:
        guessed: tokens guessed so far.
        accepted: how many of these the draws agreed with.
    """

    def __init__(self, step: NativeStep, cache: KVCache, ids: Sequence[int]) -> None:
        self.guessed = self.accepted = 0
        self._step = step
        self._cache = cache
        self._ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        """Where the token behind each gram stands, the last time it occurred."""
        self._ahead: list[tuple[int, Tensor]] = []
        """Guesses that were read, each with the logits behind it."""
        self._saved: list[int] = []
        """Tokens that each guess of the window saved."""
        self._next_at = 0
        """Tokens known when guessing may go on."""
        self._pause = PAUSE
        for id in ids:
            self._add(id)

    @classmethod
    def of(cls, model: GPT, cache: KVCache, ids: Sequence[int]) -> Lookup | None:
        """Return what guesses ahead, or None where several tokens are not read at once.

        Args:
            model: what to decode with.
            cache: knows all of ``ids``.
            ids: prompt and text so far.
        """
        step = step_of(model)
        return cls(step, cache, ids) if step is not None and step.takes(cache) else None

    def after(self, id: int, wanted: int) -> tuple[Tensor, int]:
        """Return the logits after a newly drawn token, (V,), and how many steps that took.

        Args:
            id: the token.
            wanted: tokens that are still to come; no more than these are guessed.
        """
        position = len(self._ids)
        self._add(id)
        if self._ahead:
            guess, logits = self._ahead.pop(0)
            if guess == id:
                self.accepted += 1
                self._saved[-1] += 1
                return logits, 0
            self._ahead.clear()
        self._cache.truncate(position)
        guesses = self._guess(min(wanted - 1, self._cache.capacity - position - 1))
        if not guesses:
            return self._step(id, self._cache), 1
        self._saved.append(0)
        self.guessed += len(guesses)
        found = self._step.read([id, *guesses], self._cache)
        self._ahead = list(zip(guesses, found[1:], strict=True))
        return found[0], 1

    def pass_over(self, id: int) -> None:
        """Note a newly drawn token that is read elsewhere, behind what the cache knew before it."""
        self._ahead.clear()
        self._cache.truncate(len(self._ids))
        self._add(id)

    def _add(self, id: int) -> None:
        """Note what stands behind the last gram."""
        if len(self._ids) >= GRAM:
            self._behind[tuple(self._ids[-GRAM:])] = len(self._ids)
        self._ids.append(id)

    def _guess(self, most: int) -> list[int]:
        """Return what stood behind the last gram when it occurred before, or nothing.

        What reaches the end of the text goes on as it began there, as a loop does.
        """
        if len(self._saved) >= WINDOW:
            if sum(self._saved) < LEAST_ACCEPTED * WINDOW:
                self._next_at = len(self._ids) + self._pause
                self._pause *= 2
            self._saved.clear()
        if len(self._ids) < self._next_at:
            return []
        at = self._behind.get(tuple(self._ids[-GRAM:]))
        if at is None:
            return []
        seen = self._ids[at:]
        return [seen[i % len(seen)] for i in range(min(GUESSES, most))]
