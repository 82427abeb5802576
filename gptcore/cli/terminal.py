"""A terminal as the place of work: what is printed, which variant is meant, work done here."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from gptcore.catalogue import Catalogue, as_path, open_catalogue, usual_model
from gptcore.device import require_device
from gptcore.errors import (
    Cancelled,
    DeviceAbsent,
    DeviceBusy,
    DoesNotFit,
    InvalidInput,
    StoreError,
    UnknownModel,
)
from gptcore.host.sharing import shared_device
from gptcore.host.wire import error_from_json
from gptcore.host.worker import Watcher, Worker
from gptcore.measure.calibration import with_text
from gptcore.provenance import owner, provenance
from gptcore.recipe import SHORTHANDS, Recipe, Variant, recipe_from_text
from gptcore.records import Measurement, Run, RunKind, RunState, Token, new_id, now
from gptcore.sentences import brief, one_line
from gptcore.store import open_store
from gptcore.work import Work

PRECISIONS = ("fp32", "bf16", "fp16", *SHORTHANDS)
REFUSED = (InvalidInput, DoesNotFit, DeviceAbsent, DeviceBusy)
"""What is refused before anything runs; there is nothing to keep in the database then."""
TELL_EVERY_S = 0.2


class Unread(Exception):
    """Whoever read our output has gone."""


def say(text: str, end: str = "\n") -> None:
    """Print on standard output at once.

    Raises:
        Unread: nobody reads it any more.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Unread from None


def progress_line(ratio: float) -> None:
    """Draw the share done over the one before, on standard error."""
    print(f"\r{ratio:4.0%}", end="" if ratio < 1 else "\n", file=sys.stderr, flush=True)


@contextlib.contextmanager
def noticed_interrupt() -> Iterator[list[int]]:
    """Note Ctrl-C in the list that is given out; a second one ends the program at once."""
    noticed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noticed:
            raise KeyboardInterrupt
        noticed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def yielding_device(device: str, purpose: str, *, wait: bool) -> Iterator[Callable[[], None]]:
    """Hold a device for long work, and give out what to call between two steps of it.

    That call lets others have the device for a while, and ends the work after Ctrl-C.

    Raises:
        DeviceBusy: it is taken at the beginning and ``wait`` is False.
        Cancelled: after Ctrl-C, from the beginning or from the call.
    """
    with (
        noticed_interrupt() as interrupted,
        shared_device(
            device,
            purpose,
            wait=wait,
            on_wait=lambda holder: print(f"waiting: {device} has {holder}", file=sys.stderr),
            cancelled=lambda: bool(interrupted),
        ) as share,
    ):

        def breathe() -> None:
            if interrupted:
                raise Cancelled("Stopped.")
            share()

        yield breathe


def catalogue() -> Catalogue:
    """Return the models of the data folder."""
    return open_catalogue()


def add_variant_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a variant, and whether to wait for its device."""
    usual = usual_model()
    parser.add_argument(
        "--model", default=usual, help=f"a catalogue name or any path (default {usual})"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: fp32, or as a finished variant was made"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--recipe", help="a JSON list of passes")
    parser.add_argument("--wait", action="store_true", help="wait for a device that is taken")
    parser.add_argument("--no-save", action="store_true", help="keep nothing in the database")


def add_other_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a second variant; what is not given is as in the first."""
    parser.add_argument("--against-model", help="the other side's model; default: the same")
    parser.add_argument("--against-precision", choices=PRECISIONS, help="default: the same")
    parser.add_argument("--against-threads", type=int, help="default: the same")
    parser.add_argument("--against-recipe", help="a JSON list of passes; default: the same")


def variant_of(options: argparse.Namespace, models: Catalogue) -> Variant:
    """Return the variant that ``add_variant_arguments`` let a person name.

    Raises:
        UnknownModel, InvalidInput, DeviceAbsent: with the way out.
    """
    require_device(options.device)
    recipe = recipe_option(options.recipe) if options.recipe else Recipe()
    try:
        variant = models.variant(
            options.model,
            precision=options.precision,
            device=options.device,
            threads=options.threads,
            recipe=recipe,
            paths=True,
        )
    except UnknownModel as error:
        if "/" not in options.model:
            raise
        raise UnknownModel(
            f"There is no model folder or .gguf file {brief(options.model)!r}; `models list` "
            "shows the names that need no path."
        ) from error
    return variant.model_copy(update={"recipe": with_text(variant.recipe, paths=True)})


def recipe_option(text: str) -> Recipe:
    """Return the recipe of an option: passes as JSON or as calls, or a file with such.

    Raises:
        InvalidInput: it cannot be read, or is not allowed.
    """
    path = as_path(text)
    if path is None or not path.is_file():
        return recipe_from_text(text)
    try:
        return recipe_from_text(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"The recipe {brief(text)} cannot be read: {error}.") from None


def other_variant_of(options: argparse.Namespace, models: Catalogue) -> Variant | None:
    """Return the second variant, or None where nothing of it was named."""
    named = {
        name: value
        for name in ("model", "precision", "threads", "recipe")
        if (value := getattr(options, f"against_{name}")) is not None
    }
    if not named:
        return None
    if "model" in named and models.artifact(named["model"]):
        named = {"precision": None, "recipe": None, **named}  # it has its own
    return variant_of(argparse.Namespace(**{**vars(options), **named}), models)


def json_option(option: str, text: str, example: str) -> Any:
    """Return the JSON of an option, or refuse it with an example of what it may be."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"{option} is no JSON ({one_line(str(error))}); write a list such as {example}."
        ) from None


def perform(work: Work, options: argparse.Namespace) -> Run:
    """Do a piece of work in this process, keep it in the database, and return the finished run.

    Progress goes to standard error where that is a terminal. What Ctrl-C ended is kept with what
    was found until then.

    Raises:
        Cancelled: Ctrl-C.
        GptcoreError: it was refused, or failed.
    """
    variants = work.variants_used()
    worker = Worker(options.device, catalogue(), wait=options.wait)
    run = new_run(work.kind, variants[0], work.model_dump(mode="json"))
    measured: list[Measurement] = []
    told = 0.0

    def on_phase(phase: str, progress: float | None) -> None:
        nonlocal told
        waits = phase.startswith("waiting")
        if not (waits or sys.stderr.isatty()) or time.monotonic() - told < TELL_EVERY_S:
            return
        told = time.monotonic()
        share = "" if progress is None else f" {progress:.0%}"
        print(f"\r\x1b[K{phase}{share}" if not waits else phase, end="", file=sys.stderr)
        print("\n" if waits else "", end="", file=sys.stderr, flush=True)

    with noticed_interrupt() as interrupted:
        watcher = Watcher(
            cancelled=lambda: bool(interrupted), on_phase=on_phase, on_measured=measured.append
        )
        run = worker.perform(run, work, watcher)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    error = error_from_json(run.error_kind, run.error or "") if run.error_kind else None
    if isinstance(error, REFUSED) and run.result is None:
        raise error
    if not options.no_save:
        kept(run, (), *variants, measured=measured)
    if error or run.state is not RunState.DONE:
        raise error or Cancelled("Stopped.")
    return run


def new_run(kind: RunKind, variant: Variant, settings: dict[str, Any]) -> Run:
    """Return the run of a piece of work that this process is about to do."""
    return Run(
        id=new_id(),
        kind=kind,
        state=RunState.RUNNING,
        created_at=now(),
        model=variant.model,
        precision=variant.precision,
        device=variant.placement.device,
        variant_hash=variant.hash,
        settings=settings,
        owner=owner(),
    )


def kept(
    run: Run, tokens: Sequence[Token], *variants: Variant, measured: Sequence[Measurement] = ()
) -> bool:
    """Keep the run in the database; where that fails, say so: its result is there all the same."""
    try:
        store = open_store()
        try:
            for variant in variants:
                store.add_variant(
                    variant.hash,
                    variant.model_dump(mode="json"),
                    provenance(variant.weights_id, variant.placement.resolved_threads),
                )
            store.add_run(run)
            store.finish_run(run, tokens)
            store.add_measurements(measured)
        finally:
            store.close()
    except StoreError as error:
        print(f"This run could not be kept: {error}", file=sys.stderr)
        return False
    return True
