"""A comparison as one HTML file: it says all, names nothing on a network, and trusts no text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gptcore.measure.compare import Compare
from gptcore.measure.report import comparison_page
from gptcore.measure.timing import Cell
from gptcore.provenance import provenance
from gptcore.records import Run, RunKind, RunState, now
from tests.measure.desk import FakeDesk, variant

CELLS = (Cell(prompt_tokens=8, new_tokens=4), Cell(prompt_tokens=4, new_tokens=2, batch=2))


@pytest.fixture
def run(data_folder: Path) -> Run:
    work = Compare(
        variants=(variant(0), variant(1)),
        cells=CELLS,
        stop={"min_pairs": 6, "max_pairs": 6},
        block_s=0.0,
        delay_ratio=1.0,
        noise_floor=1.05,
        noise_floor_at="2026-01-02",
    )
    return Run(
        id="c0ffee",
        kind=RunKind.COMPARE,
        state=RunState.DONE,
        created_at=now(),
        result=work.perform(FakeDesk()),
    )


class Read(HTMLParser):
    """The text of a page, and what it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_it_holds_every_verdict_with_interval_and_provenance(run: Run) -> None:
    read = Read(comparison_page(run, provenance("sha256:abc", 1)))
    assert run.result is not None
    for one in run.result["comparisons"]:
        assert f"{one['ratio']:.3f}" in read.text
        assert f"{one['low']:.3f} – {one['high']:.3f}" in read.text
    assert "tiny-1 fp32 against tiny-0 fp32" in read.text
    assert "Noise floor of this machine: 1.050, measured 2026-01-02" in read.text
    assert "sha256:abc" in read.text
    label = run.result["energy_label"].partition(":")[0]
    assert f"Energy ({label})" in read.text


def test_it_opens_without_a_network(run: Run) -> None:
    page = comparison_page(run, None)
    read = Read(page)
    assert read.fetched == []
    assert not read.tags & {"script", "link", "iframe", "img", "object"}
    assert not re.search(r"url\(|@import|https?://", page)


def test_names_from_elsewhere_are_text(run: Run) -> None:
    result: dict[str, Any] = {**(run.result or {})}
    result["sides"] = [{**one, "model": "<script>alert(1)</script>"} for one in result["sides"]]
    page = comparison_page(Run(**{**_fields(run), "result": result}), None)
    assert "script" not in Read(page).tags


def _fields(run: Run) -> dict[str, Any]:
    return {name: getattr(run, name) for name in Run.__dataclass_fields__}
