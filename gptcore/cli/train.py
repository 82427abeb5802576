"""``python -m gptcore train``: train a model from a text, the corpus, or another model."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gptcore.cli.terminal import catalogue, say, yielding_device
from gptcore.device import Placement, require_device
from gptcore.errors import InvalidInput, StoreError
from gptcore.processes import Processes, joined, several
from gptcore.train.child import new_folder
from gptcore.train.events import Event, Noted, Observer, Stepped, Validated
from gptcore.train.order import Order, job, read_order
from gptcore.train.settings import Training
from gptcore.train.trainer import Outcome, train

EVENTS = "events"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train``; those of order and settings come from their fields."""
    parser.add_argument("--to", type=Path, help="the training's folder (default: a new one)")
    parser.add_argument("--resume", action="store_true", help="go on with the one in --to")
    parser.add_argument("--add", metavar="NAME", help="add the result to the catalogue")
    parser.add_argument("--minutes", type=float, help="begin no step after so long")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--tensorboard", action="store_true", help="write event files too")
    parser.add_argument("--mlflow", action="store_true", help="keep the curves as a run of MLflow")
    parser.add_argument("--wait", action="store_true", help="wait for a device that is taken")
    for owner in (Order, Training):
        for name, field in owner.model_fields.items():
            if name != "settings":
                _add(parser, name, field)


def _add(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    default = "" if field.default == "" else f" (default {field.default})"
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        metavar=name.upper(),
        help=f"{field.description}{default}".replace("%", "%%"),
    )


def train_model(options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what was reached; Ctrl-C leaves a checkpoint first.

    Raises:
        GptcoreError, ValidationError: the input was wrong, or it failed.
        Cancelled: Ctrl-C.
    """
    require_device(options.device)
    if options.minutes is not None and options.minutes <= 0:
        raise InvalidInput("--minutes must be above 0.")
    if options.resume and options.to is None:
        raise InvalidInput("Say which training goes on: --to FOLDER.")
    if options.to is None and several():
        raise InvalidInput("Several processes need one folder by name: give --to FOLDER.")
    folder = options.to or new_folder()
    order = ordered(options, folder)
    placement = Placement(device=options.device, threads=options.threads)
    import torch

    torch.set_num_threads(placement.resolved_threads)
    with joined(options.device) as (processes, device), contextlib.ExitStack() as held:
        breathe = held.enter_context(_shared(device, processes, options.wait))
        observe = held.enter_context(_observers(options, processes, folder, order))
        if processes.first:
            what = job(order, folder, resume=options.resume)
        processes.wait()
        if not processes.first:
            what = job(order, folder, resume=True)
        outcome = train(
            what,
            folder,
            device=device,
            resume=options.resume,
            processes=processes,
            peak_flop_per_s=_peak(device, order.settings.precision, processes, placement),
            observe=observe,
            breathe=breathe,
            deadline_s=None if options.minutes is None else 60 * options.minutes,
        )
        name = None
        if processes.first and options.add:
            name = catalogue().add(outcome.model, options.add, lambda ratio: None)
    if not options.json and processes.first:
        for line in lines(outcome, name):
            say(line)
    return {
        **asdict(outcome),
        "model": str(outcome.model),
        "name": name,
        "folder": str(folder),
        "parameters": what.spec.parameters,
        "train_tokens": what.data.train.tokens,
        "validation_tokens": what.data.validation.tokens,
    }


def ordered(options: argparse.Namespace, folder: Path) -> Order:
    """Return the order: the options that were given, over those of a resumed training.

    Raises:
        ValidationError: an option is not allowed.
        InvalidInput: there is nothing to resume.
    """
    before = read_order(folder) if options.resume else Order()
    settings = before.settings.model_dump() | _given(options, Training)
    chosen = before.model_dump() | _given(options, Order)
    return Order.model_validate(chosen | {"settings": Training.model_validate(settings)})


def lines(outcome: Outcome, name: str | None) -> Iterator[str]:
    """Return the outcome as text for a terminal."""
    reasons = {
        "steps": "All steps are done",
        "patience": "It got no better for too long",
        "time": "The time is over",
    }
    yield (
        f"{reasons[outcome.ended]}: {outcome.steps:,} steps, {outcome.tokens:,} tokens, "
        f"{outcome.seconds:,.0f} s."
    )
    yield (
        f"Best validation loss {outcome.best_loss:.4f} ({outcome.best_bits_per_byte:.4f} bits per "
        f"byte) at step {outcome.best_step:,}."
    )
    if outcome.energy_j is not None:
        yield f"Energy {outcome.energy_j:,.0f} J, {outcome.energy_label}."
    yield f"The model is in {outcome.model}" + (
        f", and in the catalogue as {name}." if name else "."
    )


def _given(options: argparse.Namespace, owner: type[BaseModel]) -> dict[str, Any]:
    found = {name: getattr(options, name, None) for name in owner.model_fields}
    return {name: value for name, value in found.items() if value is not None}


def _peak(device: str, precision: str, processes: Processes, placement: Placement) -> float | None:
    if not processes.first:
        return None
    from gptcore.measure.peaks import peak_flops

    found = peak_flops(device, precision, placement.resolved_threads)
    return None if found is None else found.flop_per_s


@contextlib.contextmanager
def _shared(device: str, processes: Processes, wait: bool) -> Iterator[Callable[[], None]]:
    """Hold the device in the first process, and give out what to call before each step."""
    if not processes.first:
        yield lambda: None
        return
    with yielding_device(device, "train", wait=wait) as breathe:
        yield breathe


@contextlib.contextmanager
def _observers(
    options: argparse.Namespace, processes: Processes, folder: Path, order: Order
) -> Iterator[Observer]:
    """Give out one observer for all who listen."""
    with contextlib.ExitStack() as opened:
        listening: list[Observer] = []
        if processes.first and not options.json:
            listening.append(Terminal())
        if processes.first and options.tensorboard:
            from gptcore.train.events import tensorboard

            try:
                listening.append(opened.enter_context(tensorboard(folder / EVENTS)))
            except OSError as error:
                raise StoreError(
                    f"The event files could not be written to {folder}: {error.strerror}."
                ) from None
        if processes.first and options.mlflow:
            from gptcore.train.events import mlflow

            chosen = order.model_dump(exclude={"settings"}) | order.settings.model_dump()
            warn = partial(print, file=sys.stderr)
            listening.append(opened.enter_context(mlflow(str(folder), chosen, warn)))

        def observe(event: Event) -> None:
            for one in listening:
                one(event)

        yield observe


class Terminal:
    """Prints a line at each validation and note, and every tenth second between."""

    def __init__(self) -> None:
        self._silent_s = 0.0

    def __call__(self, event: Event) -> None:
        """Print an event, or keep silent."""
        match event:
            case Stepped():
                self._silent_s += event.seconds
                if self._silent_s >= 10 or event.step == 1:
                    self._silent_s = 0.0
                    mfu = "" if event.mfu_ratio is None else f", MFU {event.mfu_ratio:.1%}"
                    say(
                        f"step {event.step:>7,}  loss {event.loss:.4f}  rate "
                        f"{event.learning_rate:.2e}  gradient {event.gradient_norm:.2f}  "
                        f"{event.tokens_per_s:,.0f} tokens/s{mfu}"
                    )
            case Validated():
                say(
                    f"step {event.step:>7,}  validation loss {event.loss:.4f}, "
                    f"{event.bits_per_byte:.4f} bits per byte{', the best' if event.best else ''}"
                )
                if event.sample:
                    say(event.sample)
            case Noted():
                say(event.text)
