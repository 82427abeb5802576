"""``bench`` and ``compare``: what the pages measure, as text or as one JSON object."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product
from typing import Any

from gptcore.cli.terminal import (
    add_other_arguments,
    add_variant_arguments,
    catalogue,
    other_variant_of,
    perform,
    say,
    variant_of,
)
from gptcore.errors import InvalidInput
from gptcore.exchange import Format, Parcel, export
from gptcore.measure.bench import TARGETS, Bench
from gptcore.measure.compare import Compare
from gptcore.measure.statistics import StopRule
from gptcore.measure.timing import Cell
from gptcore.provenance import provenance
from gptcore.recipe import Variant
from gptcore.records import Measurement, Run
from gptcore.sentences import one_line

MAX_CELLS = 64


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench``."""
    add_variant_arguments(parser)
    add_grid_arguments(parser)
    parser.add_argument(
        "--targets", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)} (default: all)"
    )
    for name in ("repetitions", "seconds", "loads", "warmup", "seed"):
        field = Bench.model_fields[name]
        parser.add_argument(
            f"--{name}",
            type=type(field.default),
            default=field.default,
            help=f"{field.description} (default {field.default})",
        )
    parser.add_argument(
        "--llama-bench-json",
        action="store_true",
        help="print the lines of llama-bench -o jsonl instead",
    )


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``compare``."""
    add_variant_arguments(parser)
    add_other_arguments(parser)
    add_grid_arguments(parser)
    add_stop_arguments(parser)
    parser.add_argument(
        "--delay-ratio", type=float, default=0.0, help="slow the other side by this share"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses tokens and order")
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        help="a condition in which the sides may differ, such as threads; may be repeated",
    )


def add_stop_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say when a comparison ends."""
    for name, kind in (
        ("half_width", float),
        ("min_pairs", int),
        ("max_pairs", int),
        ("seconds", float),
    ):
        field = StopRule.model_fields[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=field.default,
            help=f"{field.description} (default {field.default})".replace("%", "%%"),
        )


def stop_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``StopRule`` that the options give."""
    return {
        name: getattr(options, name) for name in ("half_width", "min_pairs", "max_pairs", "seconds")
    }


def add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three axes of a grid; each takes one number or several with commas."""
    for name, default, what in (
        ("prompt-tokens", "128", "tokens read at once"),
        ("new-tokens", "32", "tokens written one by one"),
        ("batch", "1", "sequences worked on together"),
    ):
        parser.add_argument(f"--{name}", default=default, help=f"{what}: 1 or 1,4,8")


def cells_of(options: argparse.Namespace) -> tuple[Cell, ...]:
    """Return the grid.

    Raises:
        InvalidInput: an axis is no list of whole numbers, or there are too many cells.
    """
    axes = [
        _numbers(f"--{name.replace('_', '-')}", getattr(options, name))
        for name in ("prompt_tokens", "new_tokens", "batch")
    ]
    cells = tuple(
        Cell(prompt_tokens=prompt, new_tokens=new, batch=batch)
        for prompt, new, batch in product(*axes)
    )
    if len(cells) > MAX_CELLS:
        raise InvalidInput(f"The grid has {len(cells)} cells; the most is {MAX_CELLS}: give fewer.")
    return cells


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one variant over a grid.

    Raises:
        GptcoreError: as ``perform``.
    """
    variant = variant_of(options, catalogue())
    work = Bench.model_validate(
        {
            "variant": variant,
            "cells": cells_of(options),
            "targets": tuple(filter(None, options.targets.replace(" ", "").split(","))),
            **{
                name: getattr(options, name)
                for name in ("repetitions", "seconds", "loads", "warmup", "seed")
            },
        }
    )
    run = perform(work, options)
    assert run.result is not None
    result = {**run.result, **_conditions(variant), "run_id": run.id}
    if options.llama_bench_json:
        options.json = False
        say(llama_bench_lines(run, variant), end="")
    elif not options.json:
        for line in bench_lines(result):
            say(line)
    return result


def llama_bench_lines(run: Run, variant: Variant) -> str:
    """Return the prefills and decodes of a bench as llama-bench prints its tests."""
    assert run.result is not None
    measured = tuple(
        Measurement(run.id, f"{label(one)} {one['name']}", tuple(one["observations"]))
        for one in run.result["measurements"]
        if "batch" in one
    )
    made = provenance(variant.weights_id, variant.placement.resolved_threads)
    parcel = Parcel(run, measured, variant=variant.model_dump(mode="json"), provenance=made)
    return export([parcel], Format.LLAMA_BENCH).data.decode()


def label(cell: Mapping[str, Any]) -> str:
    """Return the few letters that name the cell of a measurement."""
    return Cell.model_validate({name: cell[name] for name in Cell.model_fields}).label


def bench_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table for a terminal: median, 5 % and 95 % of each number, and shares of peaks."""
    yield f"{'':<30}{'n':>5}{'median':>12}{'p05':>12}{'p95':>12}  unit"
    for one in result["measurements"]:
        cell = (
            f"{one['prompt_tokens']}+{one['new_tokens']} b{one['batch']} " if "batch" in one else ""
        )
        yield (
            f"{cell + one['name'].removesuffix('_tokens_per_s').removesuffix('_s'):<30}"
            f"{one['n']:>5}{one['median']:>12.5g}{one['p05']:>12.5g}{one['p95']:>12.5g}"
            f"  {one['unit']}"
        )
    for cell in result["cells"]:
        for target in ("prefill", "decode"):
            if target in cell:
                yield from _ceiling_lines(cell, target)


def _ceiling_lines(cell: Mapping[str, Any], target: str) -> Iterator[str]:
    held, name = cell[target], f"{cell['prompt_tokens']}+{cell['new_tokens']} b{cell['batch']}"
    mfu = "unknown" if held["mfu_ratio"] is None else f"{held['mfu_ratio']:.1%}"
    joules = held["energy"]["j_per_token"]
    energy = "unavailable" if joules is None else f"{joules:.3g} J a token"
    yield (
        f"{name} {target}: MBU {held['mbu_ratio']:.1%}, MFU {mfu}; {energy} "
        f"({held['energy']['label']})"
    )
    yield from held["problems"]


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure two variants in turn.

    Raises:
        GptcoreError: as ``perform``.
    """
    models = catalogue()
    first = variant_of(options, models)
    other = other_variant_of(options, models) or first
    run = perform(compare_work(options, first, other), options)
    assert run.result is not None
    result = {**run.result, **_conditions(first), "run_id": run.id}
    if not options.json:
        for line in compare_lines(result):
            say(line)
    return result


def compare_work(options: argparse.Namespace, first: Variant, other: Variant) -> Compare:
    """Return the comparison that the options ask for."""
    return Compare.model_validate(
        {
            "variants": (first, other),
            "cells": cells_of(options),
            "stop": stop_of(options),
            "delay_ratio": options.delay_ratio,
            "seed": options.seed,
            "accepted": tuple(options.accept),
        }
    )


def compare_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield who is who, then a sentence a cell and number."""
    for side in result["sides"]:
        yield f"{side['side']}: {side['model']} {side['precision']}, {side['recipe']}"
    yield result["residency"]
    for one in result["comparisons"]:
        cell = one["cell"]
        name = f"{cell['prompt_tokens']}+{cell['new_tokens']} b{cell['batch']} {one['metric']}"
        yield f"{name}: {one['sentence']}"
    if floor := result["noise_floor"]:
        yield f"Noise floor: a ratio below {floor['ratio']:.3f} is noise of this machine."


def _conditions(variant: Variant) -> dict[str, Any]:
    made = provenance(variant.weights_id, variant.placement.resolved_threads)
    return {
        "model": variant.model,
        "precision": variant.precision,
        "device": variant.placement.device,
        "variant": variant.hash,
        "provenance": asdict(made),
    }


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(one) for one in text.split(",")]
    except ValueError:
        raise InvalidInput(
            f"{option} is {one_line(text, 60)!r}; it must be a whole number, or several such as "
            "1,4,8."
        ) from None
    return list(dict.fromkeys(found))
