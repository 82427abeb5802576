"""The History page over 10,000 runs in a real Chromium: first paint, and filters.

Each time is taken by the browser's own clock, from the click or key (for first paint: from asking
for the address) to the frame in which the table is there and its caption says what was asked for.
A warm visit is what a person has who uses the program; at the first one the browser has nothing of
the program yet, and the server opens the database. Beside them stands the time to the title of
another page, which is about what Streamlit itself takes here.

It needs requirements-test.txt and Chromium. The result is printed, and written to bench/results/
and into bench/README.md.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from playwright.sync_api import BrowserContext, Page, sync_playwright

from bench.results import keep
from gptcore.device import cores, cpu_name
from gptcore.records import Measurement, Numbers, Run, RunKind, RunState
from gptcore.store import Store, open_store
from gptcore.store.history import Filter
from tests.conftest import chromium
from tests.e2e.conftest import BROWSER_OPTIONS, Server

RUNS = 10_000
WORDS = ("the", "fox", "read", "books", "by", "a", "river", "and", "said", "nothing", "at", "all")
MODELS = ("smollm2-135m", "gpt2", "gpt2-medium", "gpt3-350m")
PAINT_S, FILTER_S = 1.5, 0.3


def fill(store: Store, runs: int) -> None:
    """Write runs as a year of use leaves them: most are generations, some have notes."""
    drawn = random.Random(0)
    for number in range(runs):
        at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=45 * number)
        kind = drawn.choices((RunKind.GENERATE, RunKind.BENCH, RunKind.COMPARE), (90, 5, 5))[0]
        prompt = " ".join(drawn.choices(WORDS, k=drawn.randint(5, 60)))
        if number % 400 == 0:
            prompt += " zebra"
        wrong = drawn.random() < 0.04
        numbers = Numbers(
            len(prompt.split()), 100, "length", 0.0, 0.0, drawn.lognormvariate(-2, 0.5), 0.01, 2.0,
            200.0, 100.0, 2**30, 0.5,
        )  # fmt: skip
        run = Run(
            id=f"{number:012x}",
            kind=kind,
            state=RunState.FAILED if wrong else RunState.DONE,
            created_at=at,
            started_at=at,
            ended_at=at + timedelta(seconds=2),
            model=drawn.choice(MODELS),
            precision=drawn.choice(("fp32", "int8", "bf16")),
            device="cpu",
            settings={"prompt": prompt, "temperature": 0.8, "seed": number},
            text=" ".join(drawn.choices(WORDS, k=120)),
            error="The model produced NaN." if wrong else None,
            error_kind="NumericalError" if wrong else None,
            numbers=numbers if kind is RunKind.GENERATE else None,
            result=None if kind is RunKind.GENERATE else {"cells": [{"observations": [0.1] * 200}]},
        )
        store.add_run(run)
        if kind is not RunKind.GENERATE:
            store.add_measurements([Measurement(run.id, "decode_s", (0.1,) * 24)])
        if number % 50 == 0:
            store.annotate(run.id, tags=("weekly",), note="looked at", pinned=number % 2000 == 0)


PAINTED = """(caption) => {
  const main = document.querySelector('[data-testid="stMain"]');
  const shown = main && [...main.querySelectorAll('[data-testid="stCaptionContainer"]')]
    .some((one) => one.innerText.includes(caption));
  return shown && main.querySelector('[data-testid="stDataFrame"] canvas') && performance.now();
}"""
TITLED = "() => document.querySelector('[data-testid=\"stMain\"] h1') && performance.now()"


def painted(page: Page, runs: int) -> float:
    """Wait until the table is there with so many runs, and return the browser's time in s."""
    caption = f"of {runs:,} ·"
    return float(page.wait_for_function(PAINTED, arg=caption, polling="raf").json_value()) / 1000


def titled(page: Page) -> float:
    """Wait until the title is there, and return the seconds since the address was asked for."""
    return float(page.wait_for_function(TITLED, polling="raf").json_value()) / 1000


def timed(page: Page, act: Callable[[], object], runs: int) -> float:
    """Return the seconds from a click or key to the table with so many runs."""
    began = float(page.evaluate("performance.now()")) / 1000
    act()
    return painted(page, runs) - began


def visit(context: BrowserContext, server: Server, counts: Mapping[str, int]) -> dict[str, float]:
    """Return the times of one visit, each page in a new tab."""
    page = context.new_page()
    page.goto(server.link("plan"), wait_until="commit")
    found = {"another page": titled(page)}
    page.close()
    page = context.new_page()
    page.goto(server.link("history"), wait_until="commit")
    found["first paint"] = painted(page, counts["all"])
    page.wait_for_timeout(500)
    field = page.get_by_role("textbox", name="Search")
    for name, text in (("search", "zebra"), ("search cleared", "")):
        field.fill(text)
        left = counts["zebra" if text else "all"]
        found[name] = timed(page, partial(field.press, "Enter"), left)
        page.wait_for_timeout(300)
    page.get_by_role("combobox", name="State").click()
    option = page.get_by_role("option", name="Failed", exact=True)
    option.wait_for()
    found["filter by state"] = timed(page, option.click, counts["failed"])
    page.close()
    return found


def counts_of(store: Store, runs: int) -> dict[str, int]:
    """Return how many runs each filter leaves."""

    def count(**fields: Any) -> int:
        return store.history(Filter(**fields), limit=1)[1]

    return {"all": runs, "zebra": count(search="zebra"), "failed": count(states=("failed",))}


def visits(server: Server, counts: Mapping[str, int], rounds: int) -> dict[str, list[float]]:
    """Return the times of each kind, in the order in which they were taken."""
    found: dict[str, list[float]] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=list(BROWSER_OPTIONS), headless=True
        )
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        for number in range(rounds + 1):
            for name, seconds in visit(context, server, counts).items():
                found.setdefault(name if number else f"{name}, the first time", []).append(seconds)
        browser.close()
    return found


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="print, and write no file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gptlab-bench-") as folder:
        server = Server(Path(folder))
        with open_store(f"sqlite:///{server.data / 'lab.db'}") as store:
            fill(store, options.runs)
            try:
                server.start()
                load = os.getloadavg()[0]
                found = visits(server, counts_of(store, options.runs), options.rounds)
            finally:
                server.stop()
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {cpu_name()}, {cores()} cores, load {load:.1f} "
        f"before it; {options.runs:,} runs, {options.rounds} visits.",
        "",
        "| what | median, ms | least | most | promised |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, times in found.items():
        promise = {"first paint": f"{1000 * PAINT_S:.0f}", "another page": ""}.get(
            name, "" if "first time" in name else f"{1000 * FILTER_S:.0f}"
        )
        cells = " | ".join(f"{1000 * one:.0f}" for one in (median(times), min(times), max(times)))
        lines.append(f"| {name} | {cells} | {promise} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if not options.dry:
        keep("history", found, text)


if __name__ == "__main__":
    main()
