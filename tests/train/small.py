"""A training that takes a second: a small text, a small shape, few steps."""

from pathlib import Path

from gptcore.train.events import Event, Stepped
from gptcore.train.order import Order, job
from gptcore.train.settings import Training
from gptcore.train.trainer import Job, Outcome, train

SENTENCE = "the small fox ran over a hill and saw that old river near two grey stones"
WORDS = SENTENCE.split()
QUICK = Training(
    steps=12, batch=8, warmup=2, learning_rate=3e-3, validate_every=6, validation_windows=8
)


def small_text(folder: Path, lines: int = 400, name: str = "text.txt") -> Path:
    """Write a text of lines that differ, always the same."""
    file = folder / name
    rows = (
        " ".join(WORDS[(at * step + step) % len(WORDS)] for step in range(1, 9)) + ".\n"
        for at in range(lines)
    )
    file.write_text("".join(rows))
    return file


def small_order(text: Path, settings: Training = QUICK, **changes: object) -> Order:
    """Return an order for it."""
    shape = {"layers": 2, "width": 32, "heads": 2, "context": 16}
    return Order.model_validate({"text": str(text), "settings": settings, **shape, **changes})


def small_job(
    folder: Path, settings: Training = QUICK, *, resume: bool = False, **changes: object
) -> Job:
    """Return the job of a training in ``folder``; its text lies beside it."""
    text = folder.parent / "text.txt"
    if not text.exists():
        small_text(folder.parent)
    return job(small_order(text, settings, **changes), folder, resume=resume)


def run(
    folder: Path, settings: Training = QUICK, *, resume: bool = False, **options: object
) -> tuple[list[Event], Outcome]:
    """Train in ``folder``; return every event and the outcome."""
    events: list[Event] = []
    what = small_job(folder, settings, resume=resume)
    return events, train(what, folder, resume=resume, observe=events.append, **options)


def losses(events: list[Event]) -> dict[int, float]:
    """Return the training loss by step."""
    return {one.step: one.loss for one in events if isinstance(one, Stepped)}


def changed(settings: Training, **values: object) -> Training:
    """Return settings with other values, checked again."""
    return Training.model_validate(settings.model_dump() | values)
