"""The work on a device: keep variants loaded, generate, look at logits. Imports torch lazily.

Used by the host process, and by the command line in its own.
"""

from __future__ import annotations

import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gptcore import parallel
from gptcore.catalogue import Catalogue
from gptcore.device import free_bytes, limit_spinning, trim_heap
from gptcore.errors import Cancelled, DoesNotFit, GptcoreError, InvalidInput, InvalidWeights
from gptcore.fit import fit
from gptcore.host.lock import device_lock
from gptcore.host.sitting import Job, Sitting, decode_cost, ended, finish, judged
from gptcore.host.wire import READING
from gptcore.measure.calibration import named_text, rows, with_text
from gptcore.measure.memory import PeakMemory, dropping, weight_bytes
from gptcore.measure.peaks import peak_bandwidth
from gptcore.passes.base import PassContext
from gptcore.processes import Processes
from gptcore.recipe import Variant
from gptcore.records import (
    Measurement,
    Numbers,
    Request,
    Run,
    RunState,
    Token,
    now,
)
from gptcore.spec import PRESETS
from gptcore.work import Loaded, Work

if TYPE_CHECKING:
    from gptcore.engine import Generation
    from gptcore.model import GPT
    from gptcore.weights import Checkpoint

MAX_LOADED = 4
"""Variants kept loaded at most; the least recently used goes first."""
PEAK_ROOM = 4
"""The bandwidth is measured where this many times the weights of a step are free."""
LEAST_SHARE = 0.02
"""A pass that is done so far says nothing yet of how long it will take."""


@dataclass(slots=True)
class Watcher:
    """What the caller wants to hear, and how it says stop."""

    cancelled: Callable[[], bool] = lambda: False
    on_phase: Callable[[str, float | None], None] = lambda phase, progress: None
    on_token: Callable[[Token], None] = lambda token: None
    on_numbers: Callable[[Numbers], None] = lambda numbers: None
    on_partial: Callable[[Mapping[str, Any]], None] = lambda result: None
    on_measured: Callable[[Measurement], object] = lambda measurement: None


class Worker:
    """Owns a device; every method does one piece of work and returns."""

    def __init__(
        self,
        device: str,
        catalogue: Catalogue,
        *,
        wait: bool = True,
        clock: Callable[[], float] = time.monotonic,
        processes: Processes | None = None,
    ) -> None:
        """Own a device.

        Args:
            device: of this process.
            catalogue: has the models.
            wait: for a device that another process holds.
            clock: seconds.
            processes: that hold every model together with this one, each a share of it.
        """
        limit_spinning()
        self._processes = processes or Processes()
        self.device = device
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._catalogue = catalogue
        self._wait = wait
        self._clock = clock
        self._peaks: dict[str, float] = {}
        """Measured bytes a second, by variant; see ``peak_bandwidth``."""

    def generate(
        self, run: Run, variant: Variant, request: Request, watcher: Watcher, *, sent_at: float
    ) -> tuple[Run, tuple[Token, ...]]:
        """Generate alone, and return the finished run with all its tokens.

        What a user can cause ends the run as failed or cancelled; it is not raised.

        Args:
            run: as queued.
            variant: what to generate with.
            request: what to generate.
            watcher: hears phases, tokens, and the numbers so far.
            sent_at: when the request was sent, on the monotonic clock of this machine.
        """
        done: list[tuple[Run, tuple[Token, ...]]] = []
        errors: list[Exception] = []

        def on_ended(run: Run, tokens: tuple[Token, ...]) -> None:
            done.append((run, tokens))

        job = Job(run, request, watcher, sent_at, on_ended, errors.append)
        self.generate_together(variant, job, lambda: None)
        if errors:
            raise errors[0]
        return done[0]

    def generate_together(
        self, variant: Variant, first: Job, arrived: Callable[[], Job | None]
    ) -> Job | None:
        """Generate side by side with whatever comes until all have ended; jobs hear it themselves.

        Args:
            variant: of all jobs.
            first: waits for the device and for the variant; the others need not.
            arrived: returns one more job if there is one; asked between two steps.

        Returns:
            A job that arrived and was not begun, because it needs more memory than texts side by
            side may take: it is to come first now.
        """
        started_at = now()
        sitting: Sitting | None = None
        later: Job | None = None
        try:
            with self._lock("generate", first.watcher):
                queue_s = self._clock() - first.sent_at
                with PeakMemory(self.device) as memory:
                    peak = memory.part()
                    is_loaded, before = variant.hash in self.loaded, self._clock()
                    loaded = self.load(variant, first.watcher, request=first.request)
                    load_s = 0.0 if is_loaded else self._clock() - before
                    sitting = Sitting(
                        loaded,
                        memory,
                        clock=self._clock,
                        peaks=self._peaks,
                        learn=partial(self._learn_peak, loaded),
                    )
                    sitting.join(
                        first, started_at=started_at, queue_s=queue_s, load_s=load_s, peak=peak
                    )
                    while len(sitting):
                        while later is None and (job := arrived()) is not None:
                            if not sitting.join(job):
                                later = job
                        if later is not None and later.watcher.cancelled():
                            error = Cancelled("Cancelled while it waited for room.")
                            finish(later, variant, now(), (), error)
                            later = None
                        sitting.step()
        except Exception as error:
            if sitting is None:
                finish(first, variant, started_at, (), error)
            else:
                sitting.fail(error)
        return later

    def perform(self, run: Run, work: Work, watcher: Watcher) -> Run:
        """Do a piece of work, and return the finished run with its result.

        What a user can cause ends the run as failed or cancelled, with the last partial result.
        """
        started_at, state = now(), RunState.DONE
        problem: GptcoreError | None = None
        desk = _Desk(self, run.id, watcher)
        try:
            with self._lock(str(work.kind), watcher):
                desk.result = dict(work.perform(desk))
        except Exception as error:
            state, problem = judged(error, work.variants_used()[0])
        return replace(ended(run, started_at, (), state, problem), result=desk.result)

    def next_logits(
        self,
        variant: Variant,
        request: Request,
        answer_ids: Sequence[int],
        watcher: Watcher,
    ) -> tuple[tuple[int, ...], np.ndarray]:
        """Return the ids of prompt + answer and the logits after them, (V,) float32."""
        with self._lock("look at the next token", watcher):
            loaded = self.load(variant, watcher, request=request)
            watcher.on_phase(READING, None)
            prompt, _ = loaded.engine.prompt_ids(request)
            ids = (*prompt, *answer_ids)
            return ids, loaded.engine.next_logits(ids, cancelled=watcher.cancelled)

    def load(self, variant: Variant, watcher: Watcher, *, request: Request | None = None) -> Loaded:
        """Return the variant in memory, loading it if it is not there.

        Raises:
            DoesNotFit: checked before anything is allocated.
            InvalidWeights: the weights are not those the variant names, or are damaged.
            InvalidInput: a pass cannot run here.
        """
        import torch

        torch.set_num_threads(variant.placement.resolved_threads)
        if variant.hash in self.loaded:
            self.loaded.move_to_end(variant.hash)
            return self.loaded[variant.hash]
        self._make_room(variant, request)
        watcher.on_phase("loading weights", 0.0)
        began = self._clock()
        try:
            loaded = self._built(variant, watcher)
        except BaseException as error:
            # The half-made model hangs on the frames of the traceback, and goes with them.
            traceback.clear_frames(error.__traceback__)
            self.unload(variant.hash)
            raise
        loaded.load_s = self._clock() - began
        self.loaded[variant.hash] = loaded
        return loaded

    def unload(self, *hashes: str) -> None:
        """Free the memory of the variants of these hashes, or of every loaded one."""
        import gc

        for one in hashes or tuple(self.loaded):
            self.loaded.pop(one, None)
        gc.collect()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()
        trim_heap()

    def _lock(self, purpose: str, watcher: Watcher) -> AbstractContextManager[None]:
        if not self._processes.first:
            return nullcontext()  # the first one holds the device for all
        return device_lock(
            self.device,
            purpose,
            wait=self._wait,
            cancelled=watcher.cancelled,
            on_wait=lambda holder: watcher.on_phase(f"waiting: {self.device} has {holder}", None),
        )

    def _make_room(self, variant: Variant, request: Request | None) -> None:
        tokens = request.max_new_tokens + 1024 if request else 1024
        tokens = min(tokens, variant.spec.context)
        while True:
            if len(self.loaded) < MAX_LOADED:
                checked = fit(variant, tokens)
                if checked.fits:
                    return
                if not self.loaded:
                    raise DoesNotFit(checked.sentence)
            self.loaded.popitem(last=False)
            if not self.loaded:
                self.unload()

    def _built(self, variant: Variant, watcher: Watcher) -> Loaded:
        from gptcore.engine import Engine

        model, context, done, source = self._begun(variant, watcher)
        if blocked := variant.blocked_by:
            raise InvalidInput(blocked)
        seconds: dict[str, float] = {}
        with PeakMemory(self.device) as memory:
            for one in variant.recipe.passes[done:]:
                began = self._clock()
                if one.needs_calibration and context.calibration_ids is None:
                    self._calibrate(context, variant)
                context.progress = _telling(one.title, watcher, self._clock)
                model = one.apply(model, context)
                seconds[one.name] = seconds.get(one.name, 0.0) + self._clock() - began
        model.eval()
        if self._processes.count > 1:
            model = parallel.split(model, self.device)
        assert context.tokenizer is not None
        engine = Engine(model, context.tokenizer, clock=self._clock)
        trim_heap()
        resident_bytes, step_bytes = weight_bytes(model)
        return Loaded(
            variant=variant,
            engine=engine,
            resident_bytes=resident_bytes,
            step_bytes=step_bytes,
            coverage=context.coverage,
            load_s=0.0,
            passes_s=seconds,
            passes_peak_bytes=memory.peak_bytes or None,
            source=source.directory if source else None,
            source_precision=source.source_precision if source else "random",
        )

    def _begun(
        self, variant: Variant, watcher: Watcher
    ) -> tuple[GPT, PassContext, int, Checkpoint | None]:
        """Return the model to apply the recipe to, and how many of its passes that has behind it.

        Passes of the runtime are never behind it: a finished variant keeps them as recipe.
        """
        from gptcore import artifact, weights
        from gptcore.tokenizer import byte_tokenizer

        drop = dropping()

        def progress(ratio: float) -> None:
            if watcher.cancelled():
                raise Cancelled("Cancelled while the weights were being loaded.")
            watcher.on_phase("loading weights", ratio)
            drop(ratio)

        placement = variant.placement
        if self._processes.count > 1:  # none of them need have room for all of it on its device
            placement = placement.model_copy(update={"device": "cpu"})
        context = PassContext(placement=placement, progress=progress)
        model_name = variant.model
        if not self._has_random(variant) and (made := self._catalogue.artifact(model_name)):
            if continues(variant, made.variant):
                context.coverage |= made.coverage
                context.tokenizer = artifact.tokenizer_of(made)
                done = len(made.variant.weights_only.recipe.passes)
                origin = self._catalogue.checkpoint(variant.model)
                return artifact.load(made, progress), context, done, origin
            model_name = made.variant.model
        if variant.weights_id.startswith("random:"):
            seed = int(variant.weights_id.removeprefix("random:"))
            model = weights.build_random(variant.spec, placement, seed, progress)
            context.tokenizer = byte_tokenizer(variant.spec.vocabulary)
            return model, context, 0, None
        checkpoint = self._catalogue.checkpoint(model_name, progress)
        if checkpoint.weights_id != variant.weights_id:
            raise InvalidWeights(
                f"The weights of {model_name} changed on disk since they were chosen: "
                "choose the model again."
            )
        context.tokenizer = self._catalogue.tokenizer(model_name)
        as_stored = variant.recipe.converts
        model = weights.build(checkpoint, placement, progress, as_stored=as_stored)
        return model, context, 0, checkpoint

    def _has_random(self, variant: Variant) -> bool:
        """Whether the weights are made up, and the model's name is that of a shape."""
        return variant.weights_id.startswith("random:") and variant.model in PRESETS

    def _calibrate(self, context: PassContext, variant: Variant) -> None:
        """Give the passes their text, as the tokenizer reads it now."""
        wanted = with_text(variant.recipe, paths=True).calibration
        assert wanted is not None
        assert context.tokenizer is not None
        text = named_text(wanted, paths=True)
        context.calibration_ids = rows(
            text.content, wanted, context.tokenizer, variant.spec_after.context
        )
        context.calibration_hash = text.hash

    def _learn_peak(self, loaded: Loaded, generation: Generation) -> None:
        """Measure the bandwidth against which the decode is held, where it is not known yet."""
        tpot_s, step_bytes = decode_cost(loaded, generation)
        free = free_bytes(self.device)
        if tpot_s and (free is None or free > PEAK_ROOM * loaded.step_bytes):
            peak = peak_bandwidth(
                self.device,
                loaded.step_bytes,
                loaded.variant.placement.resolved_threads,
                at_least=step_bytes / tpot_s,
            )
            self._peaks[loaded.variant.hash] = peak.bytes_per_s


def continues(variant: Variant, made: Variant) -> bool:
    """Return whether a finished variant is ``variant``, or what its recipe goes on from."""
    same = (variant.weights_id, variant.spec, variant.placement.precision)
    return same == (made.weights_id, made.spec, made.placement.precision) and (
        variant.recipe.begins_with(made.weights_only.recipe)
    )


def _telling(title: str, watcher: Watcher, clock: Callable[[], float]) -> Callable[[float], None]:
    """Return what tells the share of a pass that is done, and about how long the rest takes."""
    began, what, drop = clock(), f"applying {title[:1].lower()}{title[1:]}", dropping()

    def progress(ratio: float) -> None:
        if watcher.cancelled():
            raise Cancelled("Cancelled while a pass was running; the model is as it was.")
        spent = clock() - began
        left = spent / ratio - spent if ratio > LEAST_SHARE else None
        rest = "" if left is None or left < 1 else f", about {left:.0f} s left"
        watcher.on_phase(f"{what}{rest}", ratio)
        drop(ratio)

    progress(0.0)
    return progress


class _Desk:
    """The worker as a Work sees it."""

    def __init__(self, worker: Worker, run_id: str, watcher: Watcher) -> None:
        self.device = worker.device
        self.result: Mapping[str, Any] | None = None
        self._worker = worker
        self._run_id = run_id
        self._watcher = watcher

    def load(self, variant: Variant) -> Loaded:
        return self._worker.load(variant, self._watcher)

    def holds(self, variant: Variant) -> bool:
        return variant.hash in self._worker.loaded

    def unload(self, variant: Variant) -> None:
        if self.holds(variant):
            self._worker.unload(variant.hash)

    def phase(self, text: str, progress: float | None = None) -> None:
        self._watcher.on_phase(text, progress)

    def check(self) -> None:
        if self._watcher.cancelled():
            raise Cancelled("Cancelled.")

    def partial(self, result: Mapping[str, Any]) -> None:
        self.result = result
        self._watcher.on_partial(result)

    def measured(self, name: str, observations: Sequence[float]) -> None:
        self._watcher.on_measured(Measurement(self._run_id, name, tuple(observations)))
