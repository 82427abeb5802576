"""The log and TensorBoard's event files hold what was observed."""

from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event as Written
from tensorboardX.record_writer import masked_crc32c

from gptcore.train.events import Log, Noted, Stepped, Validated, read_log, tensorboard

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
