"""What a training says while it runs, and who may listen: a log, TensorBoard."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOG = "log.jsonl"


@dataclass(frozen=True, slots=True)
class Stepped:
    """One update of the weights."""

    step: int
    """Updates done, this one included."""
    loss: float
    """Mean cross-entropy over the batch before the update, nats a token."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    seconds: float
    """Of this step."""
    tokens_per_s: float
    mfu_ratio: float | None
    """(6N + 12·L·H·Q·T) · tokens/s ÷ the measured peak; None where that is not known."""
    memory_bytes: int | None
    """Largest resident set so far (CPU) or largest allocation (CUDA)."""


@dataclass(frozen=True, slots=True)
class Validated:
    """The model held against the validation text."""

    step: int
    loss: float
    """Mean cross-entropy, nats a token."""
    bits_per_byte: float
    """loss / ln 2 · tokens / UTF-8 bytes of the validation text."""
    best: bool
    """Whether no validation before was as good."""
    seconds: float
    energy_j: float | None
    """Since the training, or its part since a resume, began."""
    energy_label: str
    sample: str
    """What the model wrote, empty where it was not asked to."""


@dataclass(frozen=True, slots=True)
class Noted:
    """Something that a person should know."""

    step: int
    text: str


Event = Stepped | Validated | Noted
Observer = Callable[[Event], None]
KINDS: Mapping[str, type[Stepped] | type[Validated] | type[Noted]] = {
    one.__name__.lower(): one for one in (Stepped, Validated, Noted)
}


class Log:
    """The events in a file, one line each; what lies behind a resumed step is dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        self.file = folder / LOG
        kept = [event for event in read_log(folder) if event.step <= step]
        fresh = self.file.with_suffix(".new")
        fresh.write_text("".join(map(_line, kept)))
        fresh.replace(self.file)

    def __call__(self, event: Event) -> None:
        """Add an event."""
        with self.file.open("a", encoding="utf-8") as out:
            out.write(_line(event))


def read_log(folder: Path) -> list[Event]:
    """Return the events of a training's folder; a line that was cut off is left out."""
    found: list[Event] = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / LOG).read_text(encoding="utf-8").splitlines():
            try:
                value: dict[str, Any] = json.loads(line)
                found.append(KINDS[value.pop("event")](**value))
            except (ValueError, KeyError, TypeError):
                continue
    return found


def _line(event: Event) -> str:
    return json.dumps({"event": type(event).__name__.lower(), **asdict(event)}) + "\n"


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[Observer]:
    """Give out an observer that writes event files which TensorBoard opens."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def observe(event: Event) -> None:
            match event:
                case Stepped():
                    for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_s"):
                        writer.add_scalar(f"train/{name}", getattr(event, name), event.step)
                    if event.mfu_ratio is not None:
                        writer.add_scalar("train/mfu_ratio", event.mfu_ratio, event.step)
                case Validated():
                    writer.add_scalar("validation/loss", event.loss, event.step)
                    writer.add_scalar("validation/bits_per_byte", event.bits_per_byte, event.step)
                    if event.sample:
                        writer.add_text("sample", f"```\n{event.sample}\n```", event.step)
                    writer.flush()
                case Noted():
                    writer.add_text("note", event.text, event.step)

        yield observe
