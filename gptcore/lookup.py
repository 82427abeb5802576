"""Guess ahead, and check all guesses in one step.

A native step reads the weights once for several tokens. So tokens that may follow are read together
with the newest one; as long as the draws agree with them, their logits are there already. Every
draw sees the logits that it would see without, to the bit, so the text is the same, drawn or
greedy. Source: Leviathan et al. 2023, arXiv:2211.17192.

Guesses are what stood behind the same three tokens before (Saxena 2023, prompt lookup decoding),
else, where the model has one, what would be drawn from a draft of fewer bits.

Guessing costs: eight tokens take about one and a half times as long as one, and a draft's tokens
take time of their own. Looking up and drafting are each judged by what they save: one that saves
less than it costs pauses, each time for longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from gptcore.kernels.step import NativeStep, step_of
from gptcore.model import GPT, Draft, KVCache

GRAM = 3
"""Tokens that must have occurred before, in this order."""
GUESSES = 7
"""Tokens guessed at once, at most: with the newest one they fill a call of the native step."""
LOOKED_UP, DRAFTED = 3, 6
"""Guesses in a row that are judged together, by how they came about."""
LEAST_ACCEPTED = 0.75
"""Tokens that a looked up guess of the window must have saved on average."""
CHECKING = 0.3
"""What checking a draft's few guesses costs beyond a step, in steps."""
READING = 16
"""Tokens that a draft reads at once in about twice the time of one."""
DRAFT_CONTEXT = 128
"""Tokens of the text that a draft begins with: its guesses need not be the best."""
PAUSE = 32
"""Tokens without a guess after a bad window; twice as many after the next."""


Pick = Callable[[Tensor, int], int]
"""Of a draft's logits, (V,), the token that would be drawn so many draws from the next one on."""


class Judge:
    """Decides whether one way of guessing saves more than it costs, and pauses it where not."""

    def __init__(self, window: int) -> None:
        """Judge so many guesses at a time."""
        self._window = window
        self._saved: list[int] = []
        """Tokens that each guess of the window saved."""
        self._due: list[float] = []
        """Tokens that each of them had to save."""
        self._next_at = 0
        """Tokens known when guessing may go on."""
        self._pause = PAUSE

    def allows(self, known: int) -> bool:
        """Return whether to guess behind so many tokens."""
        if len(self._saved) >= self._window:
            if sum(self._saved) < sum(self._due):
                self._next_at = known + self._pause
                self._pause *= 2
            self._saved.clear()
            self._due.clear()
        return known >= self._next_at

    def guessed(self, due: float) -> None:
        """Note a guess that has to save so many tokens."""
        self._saved.append(0)
        self._due.append(due)

    def saved(self) -> None:
        """Note that the newest guess saved a token."""
        self._saved[-1] += 1


class Drafter:
    """Says how one text may go on: what would be drawn from the draft, token behind token."""

    def __init__(self, draft: Draft, step: NativeStep, capacity: int, pick: Pick) -> None:
        """Begin with a text of at most ``capacity`` positions."""
        self.draft = draft
        self._pick = pick
        self._step = step
        self._capacity = capacity
        self._cache: KVCache | None = None
        self._first = 0
        """Where the text begins that the draft knows."""
        self._read: list[int] = []
        """The tokens that its cache knows, wrong guesses too."""
        self._sure = 0
        """How many of these are the text's."""
        self.cost = 0.0
        """What the last guess cost, in steps of the model that checks."""

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """Return what may stand behind ``ids``, ``most`` tokens at most and one at least."""
        if self._cache is None:
            self._first = max(0, len(ids) - DRAFT_CONTEXT)
            self._cache = self.draft.model.new_cache(self._capacity - self._first)
        text = ids[self._first :]
        while self._sure < min(len(self._read), len(text) - 1):
            if self._read[self._sure] != text[self._sure]:
                break
            self._sure += 1
        del self._read[self._sure :]
        self._cache.truncate(self._sure)
        unread = list(text[self._sure :])
        logits = self._step.read(unread, self._cache, last_only=True)[-1]
        self._read += unread
        self._sure = len(text)
        found = [self._pick(logits, 0)]
        while len(found) < min(most, self.draft.guesses):
            self._read.append(found[-1])
            found.append(self._pick(self._step(found[-1], self._cache), len(found)))
        self.cost = self.draft.cost * (len(found) + len(unread) / READING)
        return found


class Lookup:
    """Decodes one text, and guesses ahead where that saves time.

    Attributes:
        guessed: tokens guessed so far.
        accepted: how many of these the draws agreed with.
    """

    def __init__(
        self,
        step: NativeStep,
        cache: KVCache,
        ids: Sequence[int],
        drafter: Drafter | None = None,
        *,
        looks_up: bool = True,
    ) -> None:
        self._drafter = drafter
        self._looks_up = looks_up
        self.guessed = self.accepted = 0
        self._step = step
        self._cache = cache
        self._ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        """Where the token behind each gram stands, the last time it occurred."""
        self._ahead: list[tuple[int, Tensor]] = []
        """Guesses that were read, each with the logits behind it."""
        self._looking, self._drafting = Judge(LOOKED_UP), Judge(DRAFTED)
        self._judge = self._looking
        """Of the way in which was guessed last."""
        for id in ids:
            self._add(id)

    @classmethod
    def of(
        cls,
        model: GPT,
        cache: KVCache,
        ids: Sequence[int],
        pick: Pick = lambda logits, ahead: int(logits.argmax()),
        *,
        looks_up: bool = True,
    ) -> Lookup | None:
        """Return what guesses ahead, or None where several tokens are not read at once.

        Args:
            model: what to decode with.
            cache: knows all of ``ids``.
            ids: prompt and text so far.
            pick: draws from a draft's logits; with the random numbers of the text itself, the two
                agree the more often the nearer they are.
            looks_up: whether to look into the text; else only a draft guesses.
        """
        step = step_of(model)
        if step is None or not step.takes(cache):
            return None
        drafter = None
        if model.draft is not None and (drafts := step_of(model.draft.model)) is not None:
            drafter = Drafter(model.draft, drafts, cache.capacity, pick)
        if drafter is None and not looks_up:
            return None
        return cls(step, cache, ids, drafter, looks_up=looks_up)

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
                self._judge.saved()
                return logits, 0
            self._ahead.clear()
        self._cache.truncate(position)
        guesses = self._guess(min(wanted - 1, self._cache.capacity - position - 1))
        if not guesses:
            return self._step(id, self._cache), 1
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
        """Return what may follow, or nothing where guessing pauses or there is no guess."""
        known = len(self._ids)
        if most <= 0:
            return []
        if self._looking.allows(known) and (found := self._looked_up(most)):
            self._judge, due = self._looking, LEAST_ACCEPTED
        elif self._drafter is not None and self._drafting.allows(known):
            found = self._drafter.guess(self._ids, most)
            self._judge, due = self._drafting, CHECKING + self._drafter.cost
        else:
            return []
        self._judge.guessed(due)
        return found

    def _looked_up(self, most: int) -> list[int]:
        """Return what stood behind the last gram when it occurred before, or nothing.

        What reaches the end of the text goes on as it began there, as a loop does.
        """
        at = self._behind.get(tuple(self._ids[-GRAM:])) if self._looks_up else None
        if at is None:
            return []
        seen = self._ids[at:]
        return [seen[i % len(seen)] for i in range(min(GUESSES, most))]
