"""What is exported, brought in and exported again is the same to the byte, in all three formats."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import fields, replace
from datetime import timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from gptcore.errors import InvalidInput
from gptcore.exchange import Format, Parcel, Source, export, imported, read
from gptcore.exchange.csv_table import COLUMNS, NUMERIC, safe, unsafe
from gptcore.records import Annotation, Measurement, Provenance, RunState
from gptcore.store import open_store
from tests.exchange.examples import MADE, NUMBERS, bench, failed, generation

EVERY = [bench(), generation(), failed()]
WORST = (
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "  =1",
    "'",
    "'=1",
    "''json:1",
    '\'json:"x"',
    "＝1",
    '"quoted", and\r\nmore\nlines\r',
    "NUL \x00 in it",
    "half \ud800 of a pair",
    "two halves \ud83d\ude00 of one",
    "😀 ä \u2028 \ufeff",
    "\\u0000",
    "",
    " ",
)


def again(data: bytes, form: Format) -> bytes:
    return export(read(data).parcels, form).data


@pytest.mark.parametrize("form", Format)
def test_out_in_and_out_is_the_same_to_the_byte(form: Format) -> None:
    first = export(EVERY, form)
    assert again(first.data, form) == first.data
    assert first.runs == (2 if form is Format.LLAMA_BENCH else 3)


@pytest.mark.parametrize("form", Format)
@pytest.mark.parametrize("text", WORST, ids=ascii)
def test_any_text_survives_in_every_place_for_text(form: Format, text: str) -> None:
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    sent = generation(text=text, model=text, error=text, settings={"prompt": text, text: [text]})
    named = re.sub("[\ud800-\udfff]", "?", text) or "x"
    sent = replace(
        sent,
        annotation=Annotation(tags=(text, "b"), note=text),
        measurements=(Measurement(sent.run.id, named, (1.0,)),),
        provenance=replace(MADE, cpu=named),
        variant={"model": text},
    )
    data = export([sent], form).data
    (got,) = read(data).parcels
    assert got.run.text == got.run.model == whole
    assert got.annotation == Annotation(tags=(whole, "b"), note=whole)
    assert got.run.settings == {"prompt": whole, whole: [whole]}
    assert got.measurements[0].name == named
    assert got.provenance is not None
    assert got.provenance.cpu == named
    assert again(data, form) == data


@given(
    text=some.text(some.characters(codec=None), max_size=30),
    observations=some.lists(some.floats(), min_size=1, max_size=4),
    ratio=some.none() | some.floats(),
    count=some.integers(0, 2**31 - 1),
)
@settings(max_examples=60, deadline=None)
def test_any_values_survive(text, observations, ratio, count) -> None:
    sent = generation(
        text=text,
        numbers=replace(NUMBERS, mbu_ratio=ratio, new_tokens=count),
        settings={"a": [text, ratio, count, True, None]},
        result={"deep": [[{"x": observations}]]},
    )
    sent = replace(sent, measurements=(Measurement(sent.run.id, "itl_s", tuple(observations)),))
    for form in Format:
        data = export([sent], form).data
        assert again(data, form) == data
        (got,) = read(data).parcels
        assert got.measurements[0].observations == pytest.approx(observations, nan_ok=True, abs=0)
        assert got.run.numbers is not None
        assert got.run.numbers.new_tokens == count


@pytest.mark.parametrize("form", Format)
def test_every_field_comes_back(form: Format) -> None:
    """All that a run, its measurements and its provenance have, but what belongs to one lab."""
    sent = bench()
    (got,) = read(export([sent], form).data).parcels
    for one in fields(sent.run):
        if one.name not in ("owner", "result"):
            assert getattr(got.run, one.name) == getattr(sent.run, one.name), one.name
    assert got.run.result is not None
    assert {**got.run.result, "imported": None} == {**(sent.run.result or {}), "imported": None}
    assert set(got.measurements) == set(sent.measurements)
    assert (got.provenance, got.variant) == (sent.provenance, sent.variant)
    assert got.annotation == Annotation(tags=("nightly", "ä=1"), note="=HYPERLINK(1)")
    (told,) = read(export([generation()], form).data).parcels
    assert told.run.numbers == NUMBERS


@pytest.mark.parametrize("form", [Format.CSV, Format.JSON])
def test_what_comes_in_is_marked_with_its_source_and_its_provenance(form: Format) -> None:
    known, unknown = read(export([generation(), failed()], form).data).parcels[::-1]
    came = imported(known.run)
    assert came is not None
    assert (came.source.value, came.provenance, came.origin) == (form.value, MADE, None)
    nothing = imported(unknown.run)
    assert nothing is not None
    assert nothing.provenance is None
    assert imported(generation().run) is None


@pytest.mark.parametrize("form", Format)
def test_through_two_databases_it_is_the_same_to_the_byte(form: Format, tmp_path: Path) -> None:
    """The second laboratory knows the variant by another provenance; the run keeps its own."""
    first = export(EVERY, form).data
    with open_store(f"sqlite:///{tmp_path / 'other.db'}") as store:
        here = replace(MADE, cpu="another processor")
        store.add_variant("c" * 40, {"model": "smollm2-135m"}, here)
        for parcel in read(first).parcels:
            store.add_run(parcel.run)
            store.add_measurements(parcel.measurements)
            store.annotate(parcel.run.id, tags=parcel.annotation.tags, note=parcel.annotation.note)
        kept = []
        for run in store.runs():
            variant, made = store.variant(run.variant_hash or "", run.created_at) or (None, None)
            kept.append(
                Parcel(run, store.measurements(run.id), store.annotation(run.id), variant, made)
            )
    assert export(kept, form).data == first


def test_order_of_runs_and_zone_of_times_do_not_matter() -> None:
    zone = timezone(timedelta(hours=-3))
    moved = [
        replace(one, run=replace(one.run, created_at=one.run.created_at.astimezone(zone)))
        for one in EVERY
    ]
    for form in Format:
        assert export(moved[::-1], form).data == export(EVERY, form).data


def test_a_run_that_has_not_ended_is_left_out_and_counted() -> None:
    going = generation("60ing60ing60", state=RunState.RUNNING)
    found = export([going, generation()], Format.JSON)
    assert (found.runs, found.unfinished) == (1, 1)
    assert b"60ing" not in found.data


def test_nothing_at_all_is_a_file_too() -> None:
    for form in (Format.JSON, Format.CSV):
        data = export([], form).data
        assert read(data).parcels == ()
        assert again(data, form) == data
    assert export([], Format.LLAMA_BENCH).data == b""


def test_an_older_file_without_newer_fields_is_read() -> None:
    old = {"id": "a1", "kind": "generate", "state": "done", "created_at": "2026-01-01T00:00:00Z"}
    document = {"format": "gptlab-runs", "version": 1, "runs": [old]}
    (got,) = read(json.dumps(document).encode()).parcels
    assert (got.run.id, got.run.text, got.provenance) == ("a1", "", None)


# A table for spreadsheets


def table(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))


def test_no_cell_of_a_table_is_a_formula() -> None:
    nasty = [
        generation(f"a{at}", text=text, model=text, error=text, error_kind=text[:9])
        for at, text in enumerate(WORST)
    ]
    rows = table(export([*EVERY, *nasty], Format.CSV).data)
    assert len(rows) == 5 + 1 + 1 + len(WORST)
    for row in rows:
        for name, cell in row.items():
            if name not in NUMERIC:
                assert cell.lstrip(" ")[:1] not in tuple("=+-@\t\r\n＝＋－＠")


def test_numbers_stay_numbers_though_they_begin_with_a_minus() -> None:
    sent = generation(numbers=replace(NUMBERS, mbu_ratio=-3.2))
    sent = replace(sent, measurements=(Measurement(sent.run.id, "kl_nats", (-0.5, -1.5)),))
    (row,) = table(export([sent], Format.CSV).data)
    assert (row["mbu_ratio"], row["median"], row["n"]) == ("-3.2", "-1.0", "2")
    (got,) = read(export([sent], Format.CSV).data).parcels
    assert got.run.numbers is not None
    assert got.run.numbers.mbu_ratio == -3.2


@given(some.text(some.characters(codec=None), max_size=12))
def test_a_safe_cell_is_undone(text: str) -> None:
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    assert unsafe(safe(whole)) == whole


def test_a_table_has_a_row_for_each_measurement_with_its_summary() -> None:
    rows = table(export([bench()], Format.CSV).data)
    assert [row["measurement"] for row in rows] == sorted(one.name for one in bench().measurements)
    assert {row["id"] for row in rows} == {"b0b0b0b0b0b0"}
    load = next(row for row in rows if row["measurement"] == "load_s")
    assert (load["n"], load["median"], load["observations"]) == ("2", "1.375", "[1.5, 1.25]")
    assert [bool(row["settings"]) for row in rows] == [True] + [False] * 4
    assert tuple(rows[0]) == COLUMNS


def test_a_table_that_a_person_sorted_or_thinned_out_is_still_read() -> None:
    """Rows turned round, a column gone, numbers to 15 digits, other line ends: the same runs."""
    data = export(EVERY, Format.CSV).data
    rows = table(data)[::-1]
    out = io.StringIO()
    kept = [name for name in COLUMNS if name not in ("p95", "note")]
    writer = csv.DictWriter(out, kept, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        row["median"] = f"{float(row['median']):.15g}" if row["median"] else ""
        writer.writerow(row)
    got = {one.run.id: one for one in read(out.getvalue().encode()).parcels}
    for sent in EVERY:
        assert set(got[sent.run.id].measurements) == set(sent.measurements)
        assert got[sent.run.id].run.text == sent.run.text
    assert got["b0b0b0b0b0b0"].annotation.note == ""


# llama-bench's JSONL


def objects(data: bytes) -> list[dict]:
    return [json.loads(line) for line in data.splitlines()]


def test_a_bench_is_a_test_for_each_prefill_and_decode() -> None:
    found = {
        (one["n_prompt"], one["n_gen"], one["n_depth"], one["gptlab"]["batch"]): one
        for one in objects(export([bench()], Format.LLAMA_BENCH).data)
    }
    assert set(found) == {(128, 0, 0, 1), (0, 32, 128, 1), (0, 8, 16, 4)}
    prefill = found[128, 0, 0, 1]
    assert prefill["samples_ns"] == [100_000_000, 110_000_000, 105_000_000]
    assert (prefill["avg_ns"], prefill["stddev_ns"]) == (105_000_000, 5_000_000)
    assert prefill["samples_ts"] == pytest.approx([1280, 1163.636364, 1219.047619])
    assert prefill["avg_ts"] == pytest.approx(sum(prefill["samples_ts"]) / 3, abs=1e-6)
    assert (prefill["build_commit"], prefill["cpu_info"]) == ("01234567", "AMD EPYC 9R14")
    assert (prefill["backends"], prefill["n_threads"]) == ("CPU", 2)
    batched = found[0, 8, 16, 4]
    assert batched["avg_ts"] == pytest.approx(8 * 4 * 3)
    assert batched["stddev_ts"] == 0


def test_the_fields_are_those_of_llama_bench_in_its_order() -> None:
    from tests.exchange.examples import llama_bench_line

    (line, *_) = objects(export([bench()], Format.LLAMA_BENCH).data)
    shared = [name for name in line if name in llama_bench_line()]
    assert shared == list(llama_bench_line())
    for name, value in llama_bench_line().items():
        assert type(line[name]) is type(value), name


def test_a_generation_is_two_tests_of_one_repetition() -> None:
    prefill, decode = objects(export([generation()], Format.LLAMA_BENCH).data)
    assert (prefill["n_prompt"], prefill["samples_ns"]) == (12, [62_500_000])
    assert (decode["n_gen"], decode["n_depth"], decode["avg_ts"]) == (32, 12, 100.0)


def test_what_has_no_test_is_left_out_and_counted() -> None:
    found = export([failed(), generation()], Format.LLAMA_BENCH)
    assert (found.runs, found.without_tests) == (1, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[0].update(avg_ts=1.0), "Line 1: avg_ts is not what"),
        (lambda lines: lines[2].update(n_gen=999), "Line 3: n_gen is not what"),
        (lambda lines: lines.pop(1), "Line 2: n_"),
        (lambda lines: lines.pop(), "Line 1: lines of its run are missing"),
        (lambda lines: lines.pop(0), "'gptlab' holds no run"),
        (lambda lines: lines[0].update(gptlab=7), "'gptlab' holds no run"),
    ],
)
def test_a_changed_line_is_refused(change, said: str) -> None:
    lines = objects(export([bench()], Format.LLAMA_BENCH).data)
    change(lines)
    with pytest.raises(InvalidInput, match=said):
        read("\n".join(map(json.dumps, lines)).encode())


def test_lines_without_our_key_are_llama_benchs_own() -> None:
    lines = objects(export([bench()], Format.LLAMA_BENCH).data)
    for one in lines:
        del one["gptlab"]
    (got,) = read("\n".join(map(json.dumps, lines)).encode()).parcels
    came = imported(got.run)
    assert came is not None
    assert (came.source, came.provenance) == (Source.LLAMA_BENCH, None)
    assert {one.name for one in got.measurements} >= {"pp128 tg33 b1 decode_s"}


def test_nan_and_infinity_come_back() -> None:
    sent = bench()
    odd = Measurement(sent.run.id, "kl_nats", (math.nan, math.inf, -math.inf, 0.0, -0.0))
    data = export([replace(sent, measurements=(odd,))], Format.JSON).data
    json.loads(data, parse_constant=pytest.fail)
    (got,) = read(data).parcels
    assert str(got.measurements[0].observations) == "(nan, inf, -inf, 0.0, -0.0)"


def test_a_provenance_that_knows_little_comes_back_as_it_is() -> None:
    bare = Provenance("0.3", None, "3.12", None, "macOS", None, None, None, None)
    for form in Format:
        (got,) = read(export([replace(generation(), provenance=bare)], form).data).parcels
        assert got.provenance == bare
