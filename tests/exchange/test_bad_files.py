"""Damaged, huge and foreign files: one sentence, and nothing half read."""

from __future__ import annotations

import json
import random

import pytest

from gptcore.errors import InvalidInput
from gptcore.exchange import MAX_BYTES, MAX_VALUES, Format, export, read
from tests.exchange.examples import LLAMA_BENCH, bench, failed, generation, guidellm, lines, vllm

GOOD = {form.value: export([bench(), generation(), failed()], form).data for form in Format} | {
    "theirs": lines(*LLAMA_BENCH),
    "vllm": json.dumps(vllm(detailed=True)).encode(),
    "guidellm": json.dumps(guidellm()).encode(),
}


def document(**changes: object) -> bytes:
    """Return a JSON file of one run with other fields."""
    run = json.loads(export([generation()], Format.JSON).data)["runs"][0] | changes
    return json.dumps({"format": "gptlab-runs", "version": 1, "runs": [run]}).encode()


def table(old: str, new: str) -> bytes:
    """Return a table with something else in it."""
    data = GOOD["csv"].decode("utf-8-sig")
    assert old in data
    return data.replace(old, new, 1).encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "The file is empty"),
        (b"\xef\xbb\xbf \n", "The file is empty"),
        (b"\x89PNG\r\n\x1a\n", "no text in UTF-8: byte 1"),
        (b"GGUF\x03\x00\x00\x00", "neither JSON nor a table"),
        (b"hello", "neither JSON nor a table"),
        (b"name,value\n1,2\n", "neither JSON nor a table"),
        (b"{", "damaged JSON"),
        (b'{"format": "gptlab-runs", "version": 1, "runs": [', "damaged JSON"),
        (b'{"a": 1}\n{"a": ', "damaged JSON: line 2"),
        (b"{}", "JSON of another kind"),
        (b"[]", "JSON of another kind"),
        (b"[[1]]", "JSON of another kind"),
        (b'{"format": "gptlab-runs", "version": 2, "runs": []}', "has version 2"),
        (b'{"format": "gptlab-runs", "version": 1}', "no list of runs"),
        (b'{"format": "gptlab-runs", "version": 1, "runs": [1]}', "no list of runs"),
        (b'{"format": "gptlab-runs", "version": 1, "runs": [], "x": 1}', "holds 'x'"),
        (lines(LLAMA_BENCH[0], vllm()), "JSON of another kind"),
        (document(id="../../etc"), "Run 1 of the file: The id of a run is '../../etc'; it must be"),
        (document(id=None), "Id is"),
        (document(state="running"), "The run is running: only a run that ended"),
        (document(state="gone"), "The state of the run is 'gone'; there are: queued"),
        (
            document(kind="mine bitcoins"),
            "The kind of the run is 'mine bitcoins'; there are: generate",
        ),
        (document(created_at="2026-01-01T00:00:00"), "Created at is"),
        (document(created_at=None), "Created at is"),
        (document(surprise=1), "There is no Surprise"),
        (document(settings=[]), "Settings is"),
        (document(text=5), "A text is expected, not 5"),
        (document(numbers={"queue_s": 1}), "is missing"),
        (document(numbers={"warp": 9}), "There is no 'warp'"),
        (document(result={"imported": {}}), "The result must hold no 'imported'"),
        (document(measurements=[{"name": "a", "observations": []}]), "Observations"),
        (document(measurements=[{"name": "a", "observations": ["x"]}]), "must be a number"),
        (document(measurements=[{"name": "a", "observations": [1]}] * 2), "is there twice"),
        (
            document(provenance={"app_version": "1", "python": "3", "cores": 2**40}),
            "Git commit is missing",
        ),
        (document(variant_hash="f" * 65), "65 characters; the most is 64"),
        (
            table("b0b0b0b0b0b0,bench", "b0b0b0b0b0b0,evaluate"),
            "are of the same run and differ in kind",
        ),
        (table('"[1.5, 1.25]"', '"[1.5, 9.25]"'), "median is 1.375 and the observations give"),
        (table('"[1.5, 1.25]"', "1.5;1.25"), "no list of numbers"),
        (table('"[1.5, 1.25]"', '"{""a"": 1}"'), "no list of numbers"),
        (table(",1.375,", ',"1,375",'), "median is '1,375', which is not a number"),
        (table(",created_at,", ",created,"), "neither JSON nor a table"),
        (table(",text\r\n", ",tekst\r\n"), "a column 'tekst'"),
        (table(",text\r\n", ",note\r\n"), "has a column twice"),
        (table("fa11fa11fa11,", "fa11fa11fa11,,"), "cells where the header has"),
        (table("fa11fa11fa11,", "9e9e9e9e9e9e,"), "must stand in one of its rows, and stand in 2"),
    ],
)
def test_one_sentence_says_what_is_wrong(data: bytes, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(data)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_too_large_a_number_for_the_database_is_refused() -> None:
    run = json.loads(export([generation()], Format.JSON).data)["runs"][0]
    for name, value in (("prompt_tokens", 2**31), ("peak_memory_bytes", 2**63)):
        with pytest.raises(InvalidInput, match=f"(?i){name} is {value}; the most is"):
            read(document(numbers=run["numbers"] | {name: value}))
    read(document(numbers=run["numbers"] | {"peak_memory_bytes": 2**63 - 1}))


def test_a_run_twice_in_a_file_is_refused() -> None:
    with pytest.raises(InvalidInput, match="9e9e9e9e9e9e is in the file 2 times"):
        read(export([generation(), generation()], Format.JSON).data)


def test_a_huge_file_is_refused_by_its_size() -> None:
    with pytest.raises(InvalidInput, match=f"{MAX_BYTES + 1:,} bytes; the most is {MAX_BYTES:,}"):
        read(b" " * (MAX_BYTES + 1))


def test_a_small_file_of_millions_of_values_is_refused_before_it_is_parsed() -> None:
    """A list of empty lists takes twenty times its size in memory."""
    with pytest.raises(InvalidInput, match=r"about 8,\d{3},\d{3} values"):
        read(b"[" + b"[]," * (MAX_VALUES // 2 + 10) + b"[]]")


@pytest.mark.parametrize("depth", [70, 900, 100_000])
@pytest.mark.parametrize("pair", ["[]", ('{"a":', "}")])
def test_deep_nesting_is_refused_wherever_it_stands(depth: int, pair) -> None:
    deep = pair[0] * depth + ("1" if pair != "[]" else "") + pair[1] * depth
    hidden = GOOD["json"].replace(b'"result": null', f'"result": {{"x": {deep}}}'.encode())
    assert hidden != GOOD["json"]
    for data in (deep.encode(), hidden, b'{"a": 1}\n' + deep.encode()):
        with pytest.raises(InvalidInput, match="deep in each other"):
            read(data)


def test_deep_nesting_in_a_cell_is_refused() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    with pytest.raises(InvalidInput, match="Row 2: tags"):
        read(table(",[],", f",{deep},"))


@pytest.mark.parametrize("name", GOOD)
def test_a_file_cut_or_changed_anywhere_is_read_or_refused_and_never_breaks(name: str) -> None:
    good, luck = GOOD[name], random.Random(name)
    refused = 0
    for _ in range(100):
        at = luck.randrange(len(good))
        for bad in (
            good[:at],
            good[:at] + bytes([luck.randrange(256)]) + good[at + 1 :],
            good[:at] + good[at + luck.randrange(1, 40) :],
        ):
            try:
                arrived = read(bad)
            except InvalidInput:
                refused += 1
            else:
                for form in Format:
                    export(arrived.parcels, form)
    assert refused > 100


def test_a_good_run_before_a_bad_one_is_not_returned() -> None:
    runs = json.loads(GOOD["json"])
    runs["runs"][-1]["state"] = "gone"
    with pytest.raises(InvalidInput, match="Run 3 of the file"):
        read(json.dumps(runs).encode())
