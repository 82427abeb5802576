"""Where the benches keep what they measured: JSON and a table, and the table in a page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.sides import ROOT
from gptcore.provenance import provenance

RESULTS = ROOT / "bench" / "results"
README = ROOT / "bench" / "README.md"


def conditions(threads: int, load_before: tuple[float, float, float]) -> dict[str, Any]:
    """Return when, where and beside how much other work something was measured."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": threads,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": asdict(provenance(threads=threads)),
    }


def keep(name: str, result: Mapping[str, Any], table: str) -> None:
    """Write a result and its table under a name, and the table into bench/README.md."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table)
    into_readme(name, table)


def into_readme(name: str, table: str) -> None:
    """Put a table between the marks of its name in bench/README.md."""
    into_page(README, name, table)


def into_page(page: Path, name: str, table: str) -> None:
    """Put a table between the marks of its name in a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text()
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{table}{end}{after}")
