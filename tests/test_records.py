"""Requests: what is allowed, and one clear sentence for each value that is not. No torch."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gptcore.records import (
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOPS,
    Measurement,
    Message,
    Request,
    Run,
    RunKind,
    RunState,
    Sampling,
    checked_text,
    new_id,
    now,
)
from gptcore.sentences import brief, name_of, one_line, sentence

HELLO = [{"role": "user", "content": "hello"}]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": ""}, "The prompt is empty: type some text."),
    "prompt and chat": ({"messages": HELLO}, "Give a prompt or messages, not both."),
    "10 MB prompt": (
        {"prompt": "a" * 10_000_000},
        "The prompt has 10,000,000 characters; the most is 400,000: shorten it.",
    ),
    "10 MB message": (
        {"prompt": "", "messages": [{"role": "user", "content": "a" * 10_000_000}]},
        "The prompt has 10,000,000 characters; the most is 400,000: shorten it.",
    ),
    "NUL": (
        {"prompt": "ab\x00c"},
        "The prompt holds a NUL character at position 2: remove it.",
    ),
    "NUL in a message": (
        {"prompt": "", "messages": [{"role": "user", "content": "\x00"}]},
        "The message holds a NUL character at position 0: remove it.",
    ),
    "NUL in a stop": (
        {"stop": ["x\x00"]},
        "The stop string holds a NUL character at position 1: remove it.",
    ),
    "high surrogate": (
        {"prompt": "ab\ud800"},
        "The prompt holds half of a surrogate pair, which is no character: remove it.",
    ),
    "low surrogate": (
        {"prompt": "\udfffab"},
        "The prompt holds half of a surrogate pair, which is no character: remove it.",
    ),
    "surrogate in a message": (
        {"prompt": "", "messages": [{"role": "user", "content": "\ud83d"}]},
        "The prompt holds half of a surrogate pair, which is no character: remove it.",
    ),
    "surrogate in a stop": (
        {"stop": ["\ud83d"]},
        "The stop string holds half of a surrogate pair at position 0, which is no character: "
        "remove it.",
    ),
    "prompt of another kind": ({"prompt": 7}, "The prompt is 7: Input should be a valid string."),
    "unknown role": (
        {"prompt": "", "messages": [{"role": "tool", "content": "x"}]},
        "Role is tool; there are: 'system', 'user' or 'assistant'.",
    ),
    "1001 messages": (
        {"prompt": "", "messages": HELLO * 1001},
        "Messages: there are 1,001; the most is 1,000.",
    ),
    "temperature -1": ({"temperature": -1}, "Temperature is -1; the least is 0."),
    "temperature 3": ({"temperature": 3}, "Temperature is 3; the most is 2."),
    "temperature NaN": ({"temperature": float("nan")}, "Temperature is nan; it must be a number."),
    "temperature infinite": (
        {"temperature": float("inf")},
        "Temperature is inf; it must be a number.",
    ),
    "temperature text": ({"temperature": "hot"}, "Temperature is hot; it must be a number."),
    "temperature None": ({"temperature": None}, "Temperature is None; it must be a number."),
    "top-k -1": ({"top_k": -1}, "Top-k is -1; the least is 0."),
    "top-k 1001": ({"top_k": 1001}, "Top-k is 1001; the most is 1,000."),
    "top-k 1.5": ({"top_k": 1.5}, "Top-k is 1.5; it must be a whole number."),
    "top-p 0": ({"top_p": 0}, "Top-p is 0; it must be above 0."),
    "top-p 1.01": ({"top_p": 1.01}, "Top-p is 1.01; the most is 1."),
    "min-p -0.1": ({"min_p": -0.1}, "Min-p is -0.1; the least is 0."),
    "penalty 0": ({"repetition_penalty": 0}, "Repetition penalty is 0; the least is 0.5."),
    "seed -1": ({"seed": -1}, "Seed is -1; the least is 0."),
    "seed 2**70": (
        {"seed": 2**70},
        f"Seed is 1180591620717411303424; the most is {MAX_SEED:,}.",
    ),
    "seed 10**400": ({"seed": 10**400}, f"the most is {MAX_SEED:,}."),
    "seed text": ({"seed": "x" * 10_000}, "it must be a whole number."),
    "limit 0": ({"max_new_tokens": 0}, "New tokens is 0; the least is 1."),
    "limit 10**9": ({"max_new_tokens": 10**9}, "New tokens is 1000000000; the most is 100,000."),
    "100,000 stops": (
        {"stop": ["x"] * 100_000},
        "Stop strings: there are 100,000; the most is 16.",
    ),
    "empty stop": ({"stop": [""]}, "A stop string has 0 characters; 1 to 200 are allowed."),
    "long stop": (
        {"stop": ["x" * 201]},
        "A stop string has 201 characters; 1 to 200 are allowed.",
    ),
    "stop no list": ({"stop": "END"}, "Stop strings is END; it must be a list."),
    "forced ids text": ({"forced_ids": ["x"]}, "Forced ids is x; it must be a whole number."),
    "100,001 forced ids": (
        {"forced_ids": [1] * 100_001},
        "Forced ids: there are 100,001; the most is 100,000.",
    ),
    "alternatives 21": ({"alternatives": 21}, "Alternatives is 21; the most is 20."),
    "overflow": ({"overflow": "wrap"}, "Prompt too long is wrap; there are: 'refuse' or 'cut'."),
    "ignore_eos": (
        {"ignore_eos": "perhaps"},
        "Ignore end of text is perhaps; it must be true or false.",
    ),
    "an unknown field": ({"beam": 4}, "There is no Beam; there are: "),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_a_bad_value_is_refused_in_one_clear_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Request.model_validate({"prompt": "hello", **changes})
    text = sentence(refused.value)
    assert text.endswith(".")
    assert len(text) < 350
    assert not re.search(r"[\n\x00]|Traceback|pydantic|validation error", text)
    assert text == said or text.endswith(said) or text.startswith(said)


ALLOWED: list[dict[str, Any]] = [
    {},
    {"prompt": "a" * MAX_PROMPT_CHARS},
    {"prompt": "\n\t\x1b\u202e\u200d👩‍👩‍👧 中文 \x7f"},
    {"prompt": " "},
    {"prompt": "", "messages": HELLO},
    {"prompt": "", "messages": HELLO * 1000},
    {"temperature": 0},
    {"temperature": 2},
    {"temperature": 5e-324},
    {"temperature": "0.5"},
    {"top_k": 1000, "top_p": 1e-9, "min_p": 1, "repetition_penalty": 2},
    {"seed": 0},
    {"seed": MAX_SEED},
    {"max_new_tokens": 1},
    {"max_new_tokens": 100_000},
    {"stop": ["x" * MAX_STOP_CHARS] * MAX_STOPS},
    {"forced_ids": [0, 5]},
]


@pytest.mark.parametrize("changes", ALLOWED, ids=lambda value: str(value)[:40])
def test_a_value_at_its_limit_is_allowed(changes: dict[str, Any]) -> None:
    request = Request.model_validate({"prompt": "hello", **changes})
    text = json.dumps(request.model_dump(mode="json"))
    assert Request.model_validate(json.loads(text)) == request


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(
                st.none(),
                st.booleans(),
                st.integers(),
                st.floats(),
                st.text(st.characters(codec=None), max_size=20),
                st.lists(st.text(st.characters(codec=None), max_size=3), max_size=20),
                st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
            )
            for name in (*Request.model_fields, "unknown")
        },
    )
)
def test_anything_is_either_a_request_or_one_sentence(given_: dict[str, Any]) -> None:
    """Whatever passes can be stored as JSON and written as UTF-8."""
    try:
        request = Request.model_validate(given_)
    except ValidationError as error:
        text = sentence(error)
        assert text.endswith(".")
        assert "\n" not in text
        text.encode()
    else:
        written = json.dumps(request.model_dump(mode="json"), allow_nan=False, ensure_ascii=False)
        assert Request.model_validate(json.loads(written.encode())) == request


def test_samplers_stand_in_the_order_in_which_they_apply() -> None:
    assert list(Sampling.model_fields) == [
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
    ]


def test_every_setting_has_a_title_or_is_a_text_and_has_help() -> None:
    for name, field in Request.model_fields.items():
        assert field.title or name in ("prompt", "messages", "forced_ids"), name
        assert field.description, name


def test_the_sampling_of_a_request_is_its_samplers_alone() -> None:
    request = Request(prompt="x", temperature=0.3, top_k=7, seed=5)
    assert request.sampling == Sampling(temperature=0.3, top_k=7)
    assert type(request.sampling) is Sampling


@pytest.mark.parametrize("value", [Request(prompt="x"), Message(role="user", content="x")])
def test_what_a_user_typed_is_frozen(value: Any) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(value, next(iter(type(value).model_fields)), 0)
    assert hash(value) == hash(value.model_copy())


def test_checked_text_says_where_half_a_pair_stands() -> None:
    assert checked_text("fine 🦊", "prompt") == "fine 🦊"
    with pytest.raises(
        ValueError, match=r"^the prompt holds half of a surrogate pair at position 3"
    ):
        checked_text("abc\udc00", "prompt")


def test_run_states_are_final_but_for_two() -> None:
    assert [state for state in RunState if not state.final] == [RunState.QUEUED, RunState.RUNNING]


def test_a_run_is_frozen_and_its_time_is_utc() -> None:
    run = Run(new_id(), RunKind.GENERATE, RunState.QUEUED, now())
    assert run.created_at.utcoffset().total_seconds() == 0
    with pytest.raises(FrozenInstanceError):
        run.state = RunState.DONE


def test_ids_are_short_safe_and_never_the_same() -> None:
    ids = {new_id() for _ in range(10_000)}
    assert len(ids) == 10_000
    assert all(re.fullmatch(r"[0-9a-f]{12}", one) for one in ids)


def test_a_measurement_has_observations() -> None:
    assert Measurement("r", "ttft_s", (0.1,)).observations == (0.1,)
    with pytest.raises(AssertionError, match="ttft_s"):
        Measurement("r", "ttft_s", ())


# How a sentence is made


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (("temperature",), "Temperature"),
        (("max_new_tokens",), "New tokens"),
        (("stop", 3), "Stop strings"),
        (("messages", 0, "content"), "The prompt"),
        (("messages", 0, "role"), "Role"),
        (("some_field",), "Some field"),
        ((), "The request"),
        ((4,), "The request"),
    ],
)
def test_a_field_is_named_as_a_person_knows_it(place: tuple[int | str, ...], name: str) -> None:
    assert name_of(place) == name


def test_a_repeated_value_is_short_and_in_one_line() -> None:
    assert brief("a\nb\x00c") == "a b c"
    assert brief("") == "empty"
    assert brief("\n") == "empty"
    assert brief(None) == "None"
    assert len(brief("x" * 10**7)) == 40
    assert one_line("x" * 81) == "x" * 79 + "…"
