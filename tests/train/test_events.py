"""The log and TensorBoard's event files hold what was observed."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event as Written
from tensorboardX.record_writer import masked_crc32c

from gptcore.errors import InvalidInput
from gptcore.train.events import Log, Noted, Stepped, Validated, mlflow, read_log, tensorboard

STEPPED = Stepped(
    step=3,
    loss=2.5,
    learning_rate=1e-3,
    gradient_norm=0.7,
    seconds=0.1,
    tokens_per_s=1000.0,
    mfu_ratio=None,
    memory_bytes=10**9,
)
VALIDATED = Validated(
    step=4,
    loss=2.25,
    bits_per_byte=3.2,
    best=True,
    seconds=1.0,
    energy_j=None,
    energy_label="unavailable: no counter",
    sample="Once upon\na time",
)
NOTED = Noted(step=5, text="the loss is nan")


def events_of(file: Path) -> list[Written]:
    """Read TensorBoard's format: length, its checksum, an event, its checksum."""
    content, at, found = file.read_bytes(), 0, []
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        body = content[at + 12 : at + 12 + size]
        sums = content[at + 8 : at + 12], content[at + 12 + size : at + 16 + size]
        for part, checksum in zip((content[at : at + 8], body), sums, strict=True):
            assert int.from_bytes(checksum, "little") == masked_crc32c(part)
        found.append(Written.FromString(body))
        at += 16 + size
    return found


def test_the_log_gives_every_event_back(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    for event in (STEPPED, VALIDATED, NOTED):
        log(event)
    assert read_log(tmp_path) == [STEPPED, VALIDATED, NOTED]


def test_a_resume_drops_what_lies_behind_its_step(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    for event in (STEPPED, VALIDATED, NOTED):
        log(event)
    Log(tmp_path, 4)
    assert read_log(tmp_path) == [STEPPED, VALIDATED]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    log(STEPPED)
    log(VALIDATED)
    content = log.file.read_bytes()
    log.file.write_bytes(content[:-20])
    assert read_log(tmp_path) == [STEPPED]


def test_there_is_no_log_before_the_first_event(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []


def test_event_files_hold_the_curves(tmp_path: Path) -> None:
    with tensorboard(tmp_path) as observe:
        for event in (STEPPED, VALIDATED, NOTED):
            observe(event)
    (file,) = tmp_path.iterdir()
    assert "tfevents" in file.name
    values = {
        (one.tag, event.step): one for event in events_of(file) for one in event.summary.value
    }
    assert values["train/loss", 3].simple_value == 2.5
    assert values["validation/loss", 4].simple_value == 2.25
    assert values["validation/bits_per_byte", 4].simple_value == pytest.approx(3.2)
    assert ("train/mfu_ratio", 3) not in values
    assert any("Once upon" in str(one.tensor.string_val) for one in values.values())


class ServerGone(Exception):
    """Stands for MlflowException."""


@dataclass
class Client:
    """Stands for MlflowClient: keeps what it is sent, and can lose its server."""

    metrics: list[Any] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    ended: str | None = None
    there: bool = True

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return "1"

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        return SimpleNamespace(info=SimpleNamespace(run_id="run"))

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        if not self.there:
            raise ServerGone("no route to the server")
        assert len(metrics) <= 1000
        self.metrics += metrics
        self.params |= {one.key: one.value for one in params}

    def set_terminated(self, run: str, status: str) -> None:
        self.ended = status


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    one = Client()

    def module(name: str, **content: object) -> None:
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    def metric(key: str, value: float, timestamp: int, step: int) -> SimpleNamespace:
        return SimpleNamespace(key=key, value=value, step=step)

    def param(key: str, value: str) -> SimpleNamespace:
        return SimpleNamespace(key=key, value=value)

    def opened() -> Client:
        if not one.there:
            raise ServerGone("no route to the server")
        return one

    module("mlflow", MlflowClient=opened)
    module("mlflow.entities", Metric=metric, Param=param)
    module("mlflow.exceptions", MlflowException=ServerGone)
    return one


def nothing(text: str) -> None:
    raise AssertionError(text)


def test_mlflow_gets_the_curves_and_the_settings(client: Client) -> None:
    with mlflow("mine", {"steps": 20}, nothing) as observe:
        for _ in range(600):
            observe(STEPPED)
        assert client.metrics == []
        observe(VALIDATED)
        assert len(client.metrics) == 600 * 4 + 2
        observe(NOTED)
    assert {(one.key, one.step, one.value) for one in client.metrics} >= {
        ("train/loss", 3, 2.5),
        ("validation/bits_per_byte", 4, 3.2),
    }
    assert client.params == {"steps": "20"}
    assert client.ended == "FINISHED"


def test_a_training_that_fails_is_a_failed_run_of_mlflow(client: Client) -> None:
    def fails() -> None:
        with mlflow("mine", {}, nothing) as observe:
            observe(STEPPED)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert client.ended == "FAILED"
    assert client.metrics


def test_a_server_that_goes_away_ends_the_sending_alone(client: Client) -> None:
    said: list[str] = []
    with mlflow("mine", {}, said.append) as observe:
        client.there = False
        for _ in range(3):
            observe(VALIDATED)
    assert len(said) == 1
    assert "no route to the server" in said[0]


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_client_or_a_server_it_is_one_sentence(
    client: Client, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.there = False
    if not installed:
        monkeypatch.setitem(sys.modules, "mlflow", None)
    wanted = "no route to the server" if installed else "pip install mlflow-skinny"
    with pytest.raises(InvalidInput, match=wanted), mlflow("mine", {}, nothing):
        pass
