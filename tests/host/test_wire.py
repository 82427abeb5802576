"""JSON lines between processes: what is written is read back, and what is broken is noticed."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.errors import KINDS, GptcoreError, InvalidInput
from gptcore.host.wire import (
    encode,
    error_from_json,
    run_from_json,
    run_to_json,
    token_from_json,
    token_to_json,
)
from gptcore.records import Alternative, Numbers, Run, RunKind, RunState, Token

PIPE_BYTES = 64 * 1024
"""What a pipe holds on Linux before its writer must wait."""
TOKEN = Token(
    index=3,
    id=17,
    text="é\n\u2028🦊\x00\x1b",
    logprob=-0.1,
    probability=0.9,
    seconds=0.25,
    alternatives=(Alternative(5, " a", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)), Alternative(6, "", ())),
    forced=True,
)
NUMBERS = Numbers(3, 4, "length", 0.0, 1.5, 0.1, 0.01, 0.2, 30.0, None, 123456, 0.5, 10, 2e9, 1)
RUN = Run(
    id="0123456789ab",
    kind=RunKind.GENERATE,
    state=RunState.FAILED,
    created_at=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
    model="tiny",
    settings={"prompt": "a\nb", "stop": ["x"]},
    started_at=datetime(2026, 1, 2, tzinfo=UTC),
    error_kind="invalid_input",
    error="It was wrong.",
    numbers=NUMBERS,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec=None)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec=None), max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=5), json_values, max_size=5))
def test_a_message_is_one_line_and_is_read_back(message: dict[str, object]) -> None:
    """Lone surrogates and line ends of any alphabet included."""
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert line.isascii()
    assert json.loads(line) == message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_json_number_is_refused(value: float) -> None:
    """Readers disagree about NaN, and some take it for 0."""
    with pytest.raises(ValueError, match="JSON"):
        encode({"deep": [{"value": value}]})


def test_a_line_longer_than_a_pipe_holds_arrives_whole() -> None:
    """25 times the pipe's buffer: the writer waits in the middle, and so does the reader."""
    reader, writer = os.pipe()
    messages = [{"n": n, "logits": [n / 7] * 160_000} for n in range(2)]
    assert len(encode(messages[1])) > 25 * PIPE_BYTES

    def write() -> None:
        with os.fdopen(writer, "wb") as out:
            for message in messages:
                out.write(encode(message))

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reader, "rb") as lines:
        read = [json.loads(line) for line in lines]
    thread.join()
    assert read == messages


@pytest.mark.parametrize("token", [TOKEN, replace(TOKEN, alternatives=(), text="", forced=False)])
def test_a_token_is_read_back(token: Token) -> None:
    assert token_from_json(json.loads(encode(token_to_json(token)))) == token


@pytest.mark.parametrize(
    "run",
    [
        RUN,
        replace(RUN, numbers=None, started_at=None, error=None, error_kind=None),
        replace(RUN, state=RunState.DONE, ended_at=RUN.created_at, text="the 🦊\n"),
        replace(RUN, settings={}, kind=RunKind.INSPECT, parent_id="ba9876543210"),
    ],
)
def test_a_run_is_read_back(run: Run) -> None:
    again = run_from_json(json.loads(encode(run_to_json(run))))
    assert again == run
    assert again.created_at.tzinfo is not None
    assert isinstance(again.state, RunState)
    assert isinstance(again.kind, RunKind)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_keeps_its_class_and_its_sentence(kind: str) -> None:
    error = error_from_json(kind, "Too much.")
    assert type(error) is KINDS[kind]
    assert (error.kind, str(error)) == (kind, "Too much.")


def test_an_error_of_a_kind_from_elsewhere_is_still_an_error() -> None:
    assert type(error_from_json("of_tomorrow", "Too much.")) is GptcoreError
    assert issubclass(KINDS["context_overflow"], InvalidInput)
