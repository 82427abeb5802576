"""``export``: carry a variant away in the form of another program."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptcore.cli.terminal import (
    add_variant_arguments,
    catalogue,
    noticed_interrupt,
    progress_line,
    say,
    variant_of,
)
from gptcore.errors import Cancelled, InvalidInput
from gptcore.export import FORMS, export, form_of, formats
from gptcore.host.lock import device_lock
from gptcore.host.worker import Watcher, Worker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export``."""
    add_variant_arguments(parser)
    titles = "; ".join(f"{one.name}: {one.title}" for one in FORMS.values())
    parser.add_argument("--format", help=titles)
    parser.add_argument("--out", type=Path, help="the file, or the folder of hf; nothing is there")
    parser.add_argument("--list", action="store_true", help="say which formats can be had here")


def export_variant(options: argparse.Namespace) -> dict[str, Any]:
    """Write a variant in another program's form, and return what was written.

    Raises:
        Cancelled: Ctrl-C; nothing remains.
        GptcoreError: it was refused, or failed.
    """
    if options.list:
        return listed(options)
    if not options.format or options.out is None:
        raise InvalidInput(f"Say --format ({', '.join(FORMS)}) and --out, or --list.")
    form = form_of(options.format)
    if blocked := form.blocked_by():
        raise InvalidInput(f"{form.title} cannot be written: {blocked}.")
    variant = variant_of(options, catalogue())
    tells = sys.stderr.isatty() and not options.json
    with noticed_interrupt() as interrupted:

        def cancelled() -> bool:
            return bool(interrupted)

        def progress(share: float) -> None:
            if interrupted:
                raise Cancelled("Stopped.")
            if tells:
                progress_line(share)

        worker = Worker(options.device, catalogue(), wait=options.wait)
        with device_lock(options.device, "export", wait=options.wait, cancelled=cancelled):
            loaded = worker.load(variant, Watcher(cancelled=cancelled))
            result = export(loaded, options.format, options.out, progress)
    if not options.json:
        say(f"{result.path} ({result.bytes / 1e6:,.1f} MB, sha256 {result.sha256[:16]}…)")
        if result.note:
            say(result.note)
    return {**asdict(result), "path": str(result.path), "variant": variant.hash}


def listed(options: argparse.Namespace) -> dict[str, Any]:
    """Say which formats can be had here, and what the others lack."""
    found = formats()
    if not options.json:
        for one in found:
            said = f"not here: {one.blocked}" if one.blocked else one.form.description
            say(f"{one.form.name:<12}{one.form.title:<22}{said}")
    return {
        "formats": [
            {
                "name": one.form.name,
                "title": one.form.title,
                "description": one.form.description,
                "blocked": one.blocked,
            }
            for one in found
        ]
    }
