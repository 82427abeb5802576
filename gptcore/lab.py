"""The façade that conducts: catalogue, host, store and monitor behind one object. No torch.

A page, the command line and a notebook all talk to a ``Lab``; see ``docs/architecture.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptcore.catalogue import ModelEntry
from gptcore.device import Device
from gptcore.recipe import Recipe, Variant
from gptcore.records import Message, Request, Run, Sampling, Token


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a variant fits into the free memory of its device, and what would."""

    fits: bool
    needed_bytes: int
    """Weights at the placement's precision + the cache for ``context_tokens`` + working space."""
    free_bytes: int | None
    sentence: str
    """Ready to show: what is needed against what is free, and what would fit."""
    suggestions: tuple[tuple[str, str], ...] = ()
    """(model, precision) pairs that would fit, the nearest first."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What there is to draw of a run at this moment."""

    run: Run
    """``run.text`` is the whole text so far; ``run.numbers`` is there once it is done."""
    tokens: tuple[Token, ...]
    """All so far (forced ones first). Alternatives are filled once the run has ended."""
    phase: str
    """One short sentence: "waiting: 2nd in line", "loading weights", "reading the prompt", …"""
    place: int | None = None
    """Place in the queue, 1 is next; None once it runs."""
    progress: float | None = None
    """0 to 1 where known."""


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
    """Everything that a page or the command line can ask for."""

    def close(self) -> None:
        """End the hosts and the monitor; what is running becomes interrupted."""

    # What there is

    def models(self) -> tuple[ModelEntry, ...]:
        """Return the catalogue: installed models first, then presets with random weights."""

    def devices(self) -> tuple[Device, ...]:
        """Return the devices, absent ones with their reason."""

    def variant(
        self,
        model: str,
        precision: str = "fp32",
        device: str = "cpu",
        threads: int = 0,
        recipe: Recipe = Recipe(),
    ) -> Variant:
        """Return the variant that a person picked; int8 and int4 become passes.

        Raises:
            UnknownModel, InvalidInput, DeviceAbsent: with the way out.
        """

    def fit(self, variant: Variant, context_tokens: int | None = None) -> Fit:
        """Return whether ``variant`` fits into free memory, allocating nothing."""

    # Generating

    def generate(self, variant: Variant, request: Request, *, session: str | None = None) -> str:
        """Queue a generation and return its run id at once; watch it with ``snapshot``.

        Args:
            variant: what to generate with.
            request: validated already.
            session: the browser session that looks at it; see ``watch``.

        Raises:
            DoesNotFit, StoreError, ContextOverflow: nothing was queued.
        """

    def snapshot(self, run_id: str) -> Snapshot | None:
        """Return the state of a run, live or from the store; None if nobody knows it."""

    def cancel(self, run_id: str) -> None:
        """Ask a run to end; it does within one token. Ended runs are left alone."""

    def watch(self, run_id: str, session: str) -> None:
        """Note that ``session`` looks at the run, so that a reload keeps it alive."""

    def next_logits(
        self, variant: Variant, request: Request, answer_ids: Sequence[int] = ()
    ) -> str:
        """Queue a forward pass over prompt + ``answer_ids`` and return its run id."""

    def next_logits_of(self, run_id: str) -> NextLogits | None:
        """Return the logits that ``next_logits`` computed, once its run is done."""

    def rank(
        self, variant: Variant, logits: NextLogits, sampling: Sampling, count: int = 20
    ) -> tuple[Ranked, ...]:
        """Return the likeliest next tokens with their probability after each sampler.

        Pure arithmetic on stored logits: no forward pass.
        """

    def count_tokens(self, model: str, prompt: str, messages: Sequence[Message] = ()) -> int:
        """Return the number of prompt tokens, chat template included."""

    # Models

    def add_model(self, source: str | Path, name: str | None = None) -> str:
        """Bring a folder, GGUF file or hub name into the catalogue; returns the run id."""

    def delete_model(self, name: str) -> None:
        """Remove an installed model from disk and unload it everywhere."""

    def unload(self, device: str) -> None:
        """Free the memory of what the host of ``device`` has loaded."""

    # Service

    def health(self) -> Health:
        """Return whether database and hosts are well."""

    def prune_watchers(self, is_connected: Callable[[str], bool]) -> None:
        """Cancel generations that no connected session has looked at for 15 s."""
