"""``runs list|show|export|import``: what is in the database, as text, JSON or files."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptcore.cli.terminal import say
from gptcore.errors import InvalidInput
from gptcore.host.wire import run_to_json
from gptcore.lab import Filter, Format, Lab
from gptcore.sentences import brief, one_line


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``runs list``."""
    parser.add_argument("--search", default="", help="in prompt, text, model, error, id, tags")
    parser.add_argument("--kind", action="append", default=[], help="may be repeated")
    parser.add_argument("--state", action="append", default=[], help="may be repeated")
    parser.add_argument("--tag", action="append", default=[], help="may be repeated: all of them")
    parser.add_argument("--limit", type=int, default=50, help="default 50")
    parser.add_argument("--archived", action="store_true", help="the archived ones too")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``runs export``."""
    parser.add_argument("ids", nargs="*", help="of the runs; without any, all that ended")
    parser.add_argument("--format", default="json", choices=[str(one) for one in Format])
    parser.add_argument("--out", required=True, help="the file to write")


def listed(options: argparse.Namespace) -> dict[str, Any]:
    """List runs, newest first."""
    wanted = Filter(
        search=options.search,
        kinds=tuple(options.kind),
        states=tuple(options.state),
        tags=tuple(options.tag),
        archived=options.archived,
    )
    with Lab.open(monitor=False) as lab:
        found, count = lab.history(wanted, limit=max(0, options.limit))
    if not options.json:
        for one in found:
            said = one_line(one.error or one.prompt, 60)
            moment = f"{one.created_at:%Y-%m-%d %H:%M}"
            say(f"{one.id}  {moment}  {one.kind:<9}{one.state:<12}{one.model:<18}{said}")
        say(f"{len(found)} of {count} runs")
    runs = [{**asdict(one), "created_at": one.created_at.isoformat()} for one in found]
    return {"runs": runs, "count": count}


def show(options: argparse.Namespace) -> dict[str, Any]:
    """Show one run with its measurements, notes and provenance.

    Raises:
        InvalidInput: there is no such run.
    """
    with Lab.open(monitor=False) as lab:
        found = lab.snapshot(options.id)
        if found is None:
            raise InvalidInput(f"There is no run {brief(options.id)}; `runs list` shows them.")
        made = lab.run_provenance(found.run)
        shown = {
            **run_to_json(found.run),
            "measurements": {one.name: one.observations for one in lab.measurements(options.id)},
            "annotation": asdict(lab.annotation(options.id)),
            "provenance": asdict(made) if made else None,
        }
    if not options.json:
        for name, value in shown.items():
            say(f"{name:<16}{one_line(str(value), 400)}")
    return shown


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Write runs into a file.

    Raises:
        InvalidInput: a run is unknown, or the file cannot be written.
    """
    with Lab.open(monitor=False) as lab:
        ids = options.ids or [
            one.id for one in lab.history(Filter(archived=True), limit=1_000_000)[0]
        ]
        done = lab.export(ids, Format(options.format))
    try:
        Path(options.out).write_bytes(done.data)
    except OSError as error:
        raise InvalidInput(
            f"{brief(options.out)} cannot be written: {error.strerror}; choose another file."
        ) from None
    if not options.json:
        say(f"{done.runs} runs are in {options.out}.")
        if left := done.unfinished + done.without_tests:
            print(
                f"{left} runs were left out: {done.unfinished} had not ended, "
                f"{done.without_tests} have nothing that this format holds.",
                file=sys.stderr,
            )
    return {
        "file": options.out,
        "runs": done.runs,
        "unfinished": done.unfinished,
        "without_tests": done.without_tests,
    }


def bring_in(options: argparse.Namespace) -> dict[str, Any]:
    """Read runs from a file.

    Raises:
        InvalidInput: the file cannot be read, is damaged or foreign; nothing of it is kept.
    """
    try:
        data = Path(options.file).read_bytes()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise InvalidInput(f"{brief(options.file)} cannot be read: {said}.") from None
    with Lab.open(monitor=False) as lab:
        new, known = lab.import_runs(data)
    if not options.json:
        say(f"{new} runs were brought in; {known} were here already.")
    return {"new": new, "known": known}
