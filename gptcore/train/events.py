"""What a training says while it runs, and who may listen: a log, TensorBoard, MLflow."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptcore.errors import InvalidInput

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
    teaching: float | None = None
    """KL divergence from the teacher at the teaching temperature t, times t²; None without one."""


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


CURVES = ("loss", "learning_rate", "gradient_norm", "tokens_per_s", "mfu_ratio", "teaching")
"""Of every step; what is not known or not there is left out."""
EXPERIMENT = "gptlab"
MOST_SENT = 1000
"""Metrics that an MLflow server takes at once."""


def curves(event: Event) -> dict[str, float]:
    """Return an event's numbers under the names that TensorBoard and MLflow show."""
    match event:
        case Stepped():
            found = {f"train/{name}": getattr(event, name) for name in CURVES}
            return {name: value for name, value in found.items() if value is not None}
        case Validated():
            return {
                "validation/loss": event.loss,
                "validation/bits_per_byte": event.bits_per_byte,
            }
        case Noted():
            return {}


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[Observer]:
    """Give out an observer that writes event files which TensorBoard opens."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def observe(event: Event) -> None:
            for name, value in curves(event).items():
                writer.add_scalar(name, value, event.step)
            match event:
                case Validated():
                    if event.sample:
                        writer.add_text("sample", f"```\n{event.sample}\n```", event.step)
                    writer.flush()
                case Noted():
                    writer.add_text("note", event.text, event.step)

        yield observe


@contextlib.contextmanager
def mlflow(
    name: str, settings: Mapping[str, Any], warn: Callable[[str], None]
) -> Iterator[Observer]:
    """Give out an observer that keeps the curves as a run of MLflow, where its own settings say.

    Numbers are sent at each validation and at the end. A server that goes away ends the sending,
    not the training.

    Args:
        name: of the run.
        settings: kept as its parameters.
        warn: told in a sentence when the sending has ended.

    Raises:
        InvalidInput: the client is not installed, or its server cannot be reached.
    """
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise InvalidInput(
            "MLflow's client is not installed: pip install mlflow-skinny, or leave --mlflow out."
        ) from None
    try:
        client = MlflowClient()
        known = client.get_experiment_by_name(EXPERIMENT)
        experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT)
        run = client.create_run(experiment, run_name=name).info.run_id
        client.log_batch(run, params=[Param(k, str(v)[:500]) for k, v in settings.items()])
    except MlflowException as error:
        raise InvalidInput(
            f"MLflow cannot keep this training: {str(error)[:300]}. Set MLFLOW_TRACKING_URI, or "
            "leave --mlflow out."
        ) from None
    waiting: list[Any] = []
    gone = False

    def send(status: str | None = None) -> None:
        nonlocal gone
        try:
            while waiting and not gone:
                client.log_batch(run, metrics=waiting[:MOST_SENT])
                del waiting[:MOST_SENT]
            if status and not gone:
                client.set_terminated(run, status)
        except MlflowException as error:
            gone = True
            warn(f"MLflow takes no more numbers: {str(error)[:300]}. The training goes on.")

    def observe(event: Event) -> None:
        at = int(1000 * time.time())
        waiting.extend(Metric(k, v, at, event.step) for k, v in curves(event).items())
        if isinstance(event, Validated):
            send()

    try:
        yield observe
    except BaseException:
        send("FAILED")
        raise
    send("FINISHED")
