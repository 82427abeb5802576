"""``optimize`` and ``prove``: make a variant by a recipe, and hold it against its baseline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from gptcore.cli.terminal import (
    add_variant_arguments,
    catalogue,
    perform,
    say,
    variant_of,
)
from gptcore.errors import InvalidInput
from gptcore.fit import gib
from gptcore.optimize.make import Optimize
from gptcore.optimize.proof import FULL_CELLS, QUICK_CELLS, QUICK_PAIRS, Goals, Prove
from gptcore.recipe import Recipe, Variant


def add_optimize_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``optimize``."""
    add_variant_arguments(parser)
    parser.add_argument("--out", default="", help="a folder to write the variant into")
    parser.add_argument("--name", default="", help="or the name under which the catalogue has it")
    parser.add_argument("--replace", action="store_true", help="what lies there already goes")
    parser.add_argument("--prove", action="store_true", help="measure what it changed afterwards")
    _add_proof_arguments(parser)


def add_prove_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prove``."""
    add_variant_arguments(parser)
    parser.add_argument("a", nargs="?", help="baseline: a model or a finished variant")
    parser.add_argument("b", nargs="?", help="a variant; without it --recipe makes one of A")
    _add_proof_arguments(parser)


def _add_proof_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one cell, no tasks, no damage map")
    for name in ("pairs", "text"):
        field = Prove.model_fields[name]
        parser.add_argument(
            f"--{name}",
            type=type(field.default),
            default=field.default,
            help=f"{field.description} (default {field.default})",
        )
    for name, field in Goals.model_fields.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            metavar="X",
            help=f"a goal: {field.title}. {field.description}".replace("%", "%%"),
        )


def optimize(options: argparse.Namespace) -> dict[str, Any]:
    """Make a variant by a recipe, keep it, and prove it where asked.

    Raises:
        GptcoreError: as ``perform``.
    """
    variant = variant_of(options, catalogue())
    proof = None
    if options.prove or any(one is not None for one in goals_of(options).model_dump().values()):
        proof = proof_of(options, baseline_of(variant), variant)
    work = Optimize.model_validate(
        {
            "variant": variant,
            "name": options.name,
            "out": options.out,
            "replace": options.replace,
            "proof": proof,
        }
    )
    run = perform(work, options)
    assert run.result is not None
    result = {**run.result, "run_id": run.id}
    if not options.json:
        for line in made_lines(result):
            say(line)
    _judge(options, result["proof"])
    return result


def prove(options: argparse.Namespace) -> dict[str, Any]:
    """Hold a variant against its baseline on every axis.

    Raises:
        GptcoreError: as ``perform``.
    """
    models = catalogue()
    if options.a:
        options.model = options.a
    if options.b:
        first = variant_of(argparse.Namespace(**{**vars(options), "recipe": None}), models)
        given = (
            {"model": options.b, "precision": None}
            if models.artifact(options.b)
            else {"model": options.b}
        )
        second = variant_of(argparse.Namespace(**{**vars(options), **given}), models)
    else:
        second = variant_of(options, models)
        first = baseline_of(second)
    if first.hash == second.hash:
        raise InvalidInput(
            "Both sides are the same variant: name a second one, or a --recipe that makes it."
        )
    run = perform(proof_of(options, first, second), options)
    assert run.result is not None
    result = {**run.result, "permalink": f"/optimize?proof={run.id}", "run_id": run.id}
    if not options.json:
        for line in proof_lines(result):
            say(line)
    _judge(options, result)
    return result


def baseline_of(variant: Variant) -> Variant:
    """Return what a recipe began with: the same weights without passes, in fp32 on a CPU."""
    precision = "fp32" if variant.placement.device == "cpu" else variant.placement.precision
    placement = variant.placement.model_copy(update={"precision": precision})
    return variant.model_copy(update={"recipe": Recipe(), "placement": placement})


def proof_of(options: argparse.Namespace, baseline: Variant, variant: Variant) -> Prove:
    """Return the proof that the options ask for."""
    return Prove.model_validate(
        {
            "baseline": baseline,
            "variant": variant,
            "cells": QUICK_CELLS if options.quick else FULL_CELLS,
            "pairs": QUICK_PAIRS if options.quick else options.pairs,
            "text": options.text,
            "tasks": not options.quick,
            "damage": not options.quick,
            "goals": goals_of(options),
        }
    )


def goals_of(options: argparse.Namespace) -> Goals:
    """Return the goals that were given."""
    return Goals(**{name: getattr(options, name) for name in Goals.model_fields})


def _judge(options: argparse.Namespace, card: Mapping[str, Any] | None) -> None:
    """Let the command end with 1 where a goal was not met, and say which."""
    if card is not None and card["accepted"] is False:
        failed = [one for one in card["goals"] if one["met"] is False]
        said = "; ".join(
            f"{one['title']} {one['limit']:g}, measured {one['measured']:.4g}" for one in failed
        )
        print(f"Goals were not met: {said}.", file=sys.stderr)
        options.status = 1


def made_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was made, then the proof if there is one."""
    coverage = result["coverage_ratio"]
    yield f"{result['artifact'] or 'not kept'}: made in {result['seconds']:.1f} s"
    yield (
        f"{gib(result['stored_bytes'])} on disk, {gib(result['resident_bytes'])} in memory, "
        f"{result['effective_bits']:.2f} bits a weight, coverage "
        f"{'unknown' if coverage is None else f'{coverage:.0%}'}"
    )
    if coverage == 0:
        yield "Nothing was converted: " + "; ".join(
            sorted({one["reason"] for one in result["skipped"]})
        )
    if result["proof"]:
        yield from proof_lines(result["proof"])


def proof_lines(card: Mapping[str, Any]) -> Iterator[str]:
    """Yield every axis as a line: both sides, ratio with interval, verdict; then quality."""
    yield f"{'':<34}{'A':>12}{'B':>12}{'B / A':>9}  {'95 % interval':<17}verdict"
    for one in card["axes"]:
        cell = one["cell"]
        name = one["title"]
        if cell:
            name += f" {cell['prompt_tokens']}+{cell['new_tokens']} b{cell['batch']}"
        if one["ratio"] is None:
            yield f"{name:<34}{'incomplete':>12}  {one['reason']}"
            continue
        interval = "counted" if one["p"] is None else f"{one['low']:.3f} to {one['high']:.3f}"
        label = f" ({one['label']})" if one["label"] else ""
        yield (
            f"{name:<34}{one['a']:>12.5g}{one['b']:>12.5g}{one['ratio']:>9.3f}  {interval:<17}"
            f"{one['verdict']}{label}"
        )
    quality = card.get("quality", {})
    if "kl_mean" in quality:
        error = quality["kl_se"]
        yield (
            f"KL {quality['kl_mean']:.5f}{'' if error is None else f' ± {error:.5f}'} nats a token,"
            f" perplexity {quality['perplexity'][0]:.3f} → {quality['perplexity'][1]:.3f} "
            f"(× {quality['perplexity_ratio']:.4f}), same top {quality['same_top_ratio']:.1%}"
        )
    if tasks := card.get("tasks"):
        was, now = tasks["overall"]["accuracy"], tasks["against"]["overall"]["accuracy"]
        yield (
            f"Tasks: {was['ratio']:.1%} → {now['ratio']:.1%} right of {now['n']}, "
            f"{tasks['flips']['verdict']}"
        )
    if even := card.get("break_even"):
        tokens = even["tokens"]
        yield (
            f"Break-even: {even['one_time_s']:.1f} s are earned back after {tokens:,.0f} tokens"
            if tokens is not None
            else "Break-even: never, as no time is saved a token"
        )
    if card.get("void"):
        yield card["void"]
    for goal in card["goals"]:
        state = {True: "met", False: "not met", None: "not known"}[goal["met"]]
        value = "—" if goal["measured"] is None else f"{goal['measured']:.4g}"
        yield f"Goal {goal['title']} {goal['limit']:g}: {value}, {state}"
    yield from card["problems"]
