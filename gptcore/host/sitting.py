"""Texts of one loaded variant that are written side by side, each as a run of its own.

A text that is alone is written as if nobody could come; one that comes joins between two steps.
Every run keeps its own numbers, as its user saw them. Imports torch lazily.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING

from gptcore.device import free_bytes
from gptcore.errors import Cancelled, DoesNotFit, GptcoreError
from gptcore.host.wire import READING
from gptcore.measure.memory import PeakMemory, PeakPart
from gptcore.recipe import Variant
from gptcore.records import FinishReason, Numbers, Request, Run, RunState, Token, now
from gptcore.work import Loaded

if TYPE_CHECKING:
    from gptcore.batching import Advance
    from gptcore.engine import Generation
    from gptcore.host.worker import Watcher

NO_ROOM = "waiting for room in the cache"
CACHE_SHARE = 0.5
"""The caches of texts side by side may take this share of the memory that is free."""
CACHE_BYTES = 2**32
"""As above, where nobody can say what is free; and at most."""
NUMBERS_EVERY_S = 0.4
"""How often the numbers of a generation are told while it writes."""


@dataclass(frozen=True, slots=True)
class Job:
    """A generation that was ordered."""

    run: Run
    """As queued."""
    request: Request
    watcher: Watcher
    """Hears phases, tokens, and the numbers so far."""
    sent_at: float
    """When the request was sent, on the monotonic clock of this machine."""
    on_ended: Callable[[Run, tuple[Token, ...]], None]
    """Is given the finished run with all its tokens; what a user can cause ends it too."""
    on_error: Callable[[Exception], None]
    """Is given what is an error of this program."""


@dataclass(slots=True, eq=False)
class _Place:
    """A job that has sat down."""

    job: Job
    started_at: datetime
    queue_s: float
    load_s: float
    peak: PeakPart
    generation: Generation
    told_at: float
    waits: bool = False
    """Whether there was no room for it yet."""
    tokens: list[Token] = field(default_factory=list)


class Sitting:
    """The jobs of one variant, from the first that comes until the last has left.

    Args:
        loaded: what they are written by.
        memory: watches this process meanwhile.
        clock: of ``Job.sent_at``.
        peaks: measured bytes a second by variant.
        learn: is called with a text that was alone, when nobody else is there.
    """

    def __init__(
        self,
        loaded: Loaded,
        memory: PeakMemory,
        *,
        clock: Callable[[], float],
        peaks: dict[str, float],
        learn: Callable[[Generation], None],
    ) -> None:
        from gptcore.batching import Batch

        free = free_bytes(loaded.variant.placement.device)
        budget = CACHE_BYTES if free is None else min(CACHE_BYTES, int(free * CACHE_SHARE))
        self._loaded = loaded
        self._memory = memory
        self._clock = clock
        self._peaks = peaks
        self._learn = learn
        self._budget_bytes = budget
        self._batch = Batch(loaded.engine, budget_bytes=budget)
        self._places: dict[Generation, _Place] = {}

    def __len__(self) -> int:
        """How many have sat down and not left."""
        return len(self._places)

    def join(
        self,
        job: Job,
        *,
        started_at: datetime | None = None,
        queue_s: float | None = None,
        load_s: float = 0.0,
        peak: PeakPart | None = None,
    ) -> bool:
        """Let a job in, or end it; return False where it must come back when all others left.

        The latter is for a text that needs more memory than texts side by side may take.

        Args:
            job: what was ordered.
            started_at: when it was begun; now, if not given.
            queue_s: for how long it waited; until now, if not given.
            load_s: how long the variant's loading took thereafter.
            peak: of the memory since the job began; from now on, if not given.
        """
        started_at = started_at or now()
        queue_s = self._clock() - job.sent_at if queue_s is None else queue_s
        try:
            generation = self._loaded.engine.start(
                job.request, sent_at=job.sent_at, cancelled=job.watcher.cancelled, shortcuts=True
            )
        except Exception as error:
            finish(job, self._loaded.variant, started_at, (), error)
            return True
        needed = self._batch.needed_bytes(generation)
        if not self._places:
            self._batch.budget_bytes = max(self._budget_bytes, needed)
        if needed > self._batch.budget_bytes:
            job.watcher.on_phase(NO_ROOM, None)
            return False
        peak = peak or self._memory.part()
        place = _Place(job, started_at, queue_s, load_s, peak, generation, self._clock())
        self._places[generation] = place
        place.waits = not self._batch.has_room(generation)
        self._batch.add(generation)
        job.watcher.on_phase(NO_ROOM if place.waits else READING, None)
        return True

    def step(self) -> None:
        """Go one step on with every text."""
        for advance in self._batch.step():
            self._tell(self._places[advance.generation], advance)
        for place in self._places.values():
            if place.waits and place.generation.cache is not None:
                place.waits = False
                place.job.watcher.on_phase(READING, None)

    def fail(self, error: Exception) -> None:
        """End every text with an error that was none of theirs."""
        self._batch.close()
        for place in tuple(self._places.values()):
            self._leave(place, error)

    def _tell(self, place: _Place, advance: Advance) -> None:
        watcher = place.job.watcher
        for token in advance.tokens:
            place.tokens.append(token)
            watcher.on_token(token)
        if advance.ended:
            self._leave(place, advance.error)
        elif advance.tokens and self._clock() - place.told_at >= NUMBERS_EVERY_S:
            place.told_at = self._clock()
            watcher.on_numbers(self._numbers(place))

    def _leave(self, place: _Place, error: Exception | None) -> None:
        generation = place.generation
        del self._places[generation]
        place.peak.end()
        done = error is None and generation.finish_reason is not FinishReason.CANCELLED
        if done and not self._places and not generation.most_others:
            self._learn(generation)
        cancelled = generation.finish_reason is FinishReason.CANCELLED
        finish(
            place.job,
            self._loaded.variant,
            place.started_at,
            place.tokens,
            error,
            cancelled=cancelled,
            numbers=self._numbers(place),
            generation=generation,
        )

    def _numbers(self, place: _Place) -> Numbers:
        generation = place.generation
        tpot_s, step_bytes = decode_cost(self._loaded, generation)
        peak = self._peaks.get(self._loaded.variant.hash)
        last_s = generation.last_s
        known = len(generation.prompt_ids) + len(generation.request.forced_ids)
        read = known - generation.reused_tokens
        # A step that several shared read the weights for all of them.
        own = tpot_s is not None and not generation.most_others
        return Numbers(
            prompt_tokens=len(generation.prompt_ids),
            new_tokens=generation.new_tokens,
            finish_reason=str(generation.finish_reason or ""),
            queue_s=place.queue_s,
            load_s=place.load_s,
            ttft_s=generation.first_s,
            tpot_s=tpot_s,
            e2e_s=last_s if last_s is not None else self._clock() - place.job.sent_at,
            prefill_tokens_per_s=read / generation.prefill_s if generation.prefill_s else None,
            decode_tokens_per_s=1 / tpot_s if tpot_s else None,
            peak_memory_bytes=place.peak.peak_bytes or None,
            mbu_ratio=step_bytes / tpot_s / peak if own and tpot_s and peak else None,
            mbu_bytes_per_step=step_bytes if own else None,
            mbu_peak_bytes_per_s=peak if own else None,
            cut_tokens=generation.cut_tokens,
        )


def decode_cost(loaded: Loaded, generation: Generation) -> tuple[float | None, int]:
    """Return seconds per output token so far, and the bytes that were read for one on average."""
    n_out, first_s, last_s = generation.new_tokens, generation.first_s, generation.last_s
    decode_s = last_s - first_s if last_s is not None and first_s is not None else None
    read = len(generation.prompt_ids) + len(generation.request.forced_ids)
    kv = (read + n_out / 2) * loaded.variant.kv_bytes_per_token
    if not decode_s or n_out < 2:
        return None, int(loaded.step_bytes + kv)
    steps = min(1.0, generation.steps / (n_out - 1))
    return decode_s / (n_out - 1), int((loaded.step_bytes + kv) * steps)


def finish(
    job: Job,
    variant: Variant,
    started_at: datetime,
    tokens: Sequence[Token],
    error: Exception | None,
    *,
    cancelled: bool = False,
    numbers: Numbers | None = None,
    generation: Generation | None = None,
) -> None:
    """Tell a job how it ended."""
    state, problem = RunState.CANCELLED if cancelled else RunState.DONE, None
    if error is not None:
        try:
            state, problem = judged(error, variant)
        except Exception as ours:
            job.on_error(ours)
            return
    run = ended(job.run, started_at, tokens, state, problem)
    how = generation.how if generation else None
    job.on_ended(replace(run, numbers=numbers, result=how), tuple(tokens))


def judged(error: Exception, variant: Variant) -> tuple[RunState, GptcoreError]:
    """Return how an error ends a run, with what a user can do about it.

    Raises:
        Exception: the error itself, where it is one of this program.
    """
    if isinstance(error, Cancelled):
        return RunState.CANCELLED, error
    if isinstance(error, GptcoreError):
        return RunState.FAILED, error
    if not _out_of_memory(error):
        raise error
    return RunState.FAILED, DoesNotFit(
        f"{variant.model} in {variant.precision} ran out of memory on {variant.placement.device}; "
        "choose a smaller size, precision or limit."
    )


def ended(
    run: Run,
    started_at: datetime,
    tokens: Sequence[Token],
    state: RunState,
    error: GptcoreError | None,
) -> Run:
    """Return a run in its last state."""
    return replace(
        run,
        state=state,
        started_at=started_at,
        ended_at=now(),
        text="".join(token.text for token in tokens),
        error_kind=error.kind if error else None,
        error=str(error) if error else None,
    )


def _out_of_memory(error: Exception) -> bool:
    """Whether torch (which raises RuntimeError for it) or Python ran out of memory."""
    if not isinstance(error, MemoryError | RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text
