"""``python -m gptcore eval``: quality of a variant, alone or against another."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from gptcore.catalogue import Catalogue
from gptcore.cli.terminal import (
    add_other_arguments,
    add_variant_arguments,
    catalogue,
    other_variant_of,
    perform,
    say,
    variant_of,
)
from gptcore.measure.evaluate import Evaluate
from gptcore.measure.perplexity import Windowing
from gptcore.measure.works_quality import Tasks, Texts
from gptcore.recipe import Variant
from gptcore.records import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eval perplexity``."""
    add_variant_arguments(parser)
    add_other_arguments(parser)
    _add(parser, "text", Evaluate)
    for name in Windowing.model_fields:
        _add(parser, name, Windowing)
    for name in ("prompts", "new_tokens"):
        _add(parser, name, Evaluate)


def add_tasks_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eval tasks``."""
    add_variant_arguments(parser)
    add_other_arguments(parser)
    for name in ("items", "examples", "seed"):
        _add(parser, name, Tasks)
    parser.add_argument(
        "--kinds",
        default="",
        help="only items of these kinds, such as cloze,facts (default: all)",
    )


def add_texts_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eval texts``."""
    add_variant_arguments(parser)
    add_other_arguments(parser)
    parser.add_argument("--pairs", required=True, help=Texts.model_fields["pairs"].description)
    for name in ("max_new_tokens", "chat", "seed"):
        _add(parser, name, Texts)
    parser.add_argument(
        "--stop", action="append", default=[], help="end before this text; may be repeated"
    )


def _add(parser: argparse.ArgumentParser, name: str, owner: type[BaseModel]) -> None:
    field = owner.model_fields[name]
    said = str(field.description).replace("%", "%%")
    flag = f"--{name.replace('_', '-')}"
    if field.annotation is bool:
        parser.add_argument(flag, action="store_true", help=said)
    else:
        parser.add_argument(
            flag,
            type=type(field.default),
            default=field.default,
            help=f"{said} (default {field.default})",
        )


def perplexity(options: argparse.Namespace) -> dict[str, Any]:
    """Measure perplexity, and with one of ``--against-…`` the paired report; print or return it.

    Raises:
        GptcoreError, ValidationError: the input was wrong, or it failed.
    """
    models = catalogue()
    work = Evaluate(
        variant=variant_of(options, models),
        against=other_variant_of(options, models),
        text=options.text,
        windowing=Windowing(**{name: getattr(options, name) for name in Windowing.model_fields}),
        prompts=options.prompts,
        new_tokens=options.new_tokens,
    )
    run = perform(work, options)
    assert run.result is not None
    found = {**run.result, "source_precision": source_precision(models, work.variant)}
    if work.against is not None:
        other = {"source_precision": source_precision(models, work.against)}
        found["against"] = run.result["against"] | other
    if not options.json:
        for name, value in lines(found):
            say(f"{name:<22}{value}")
    return found


def tasks(options: argparse.Namespace) -> dict[str, Any]:
    """Ask multiple-choice items, and with one of ``--against-…`` a second variant the same.

    Raises:
        GptcoreError, ValidationError: the input was wrong, or it failed.
    """
    work = Tasks(
        variants=_variants(options),
        items=options.items,
        kinds=tuple(filter(None, options.kinds.replace(" ", "").split(","))),
        examples=options.examples,
        seed=options.seed,
    )
    return _said(perform(work, options), options, task_lines)


def texts(options: argparse.Namespace) -> dict[str, Any]:
    """Let a variant write, score its texts, and with one of ``--against-…`` a second one's.

    Raises:
        GptcoreError, ValidationError: the input was wrong, or it failed.
    """
    work = Texts(
        variants=_variants(options),
        pairs=options.pairs,
        max_new_tokens=options.max_new_tokens,
        stop=tuple(options.stop),
        chat=options.chat,
        seed=options.seed,
    )
    return _said(perform(work, options), options, text_lines)


def _variants(options: argparse.Namespace) -> tuple[Variant, ...]:
    models = catalogue()
    other = other_variant_of(options, models)
    first = variant_of(options, models)
    return (first,) if other is None else (first, other)


def _said(
    run: Run,
    options: argparse.Namespace,
    lines: Callable[[Mapping[str, Any]], Iterator[tuple[str, str]]],
) -> dict[str, Any]:
    assert run.result is not None
    if not options.json:
        for name, value in lines(run.result):
            say(f"{name:<24} {value}")
    return {**run.result, "run_id": run.id}


def task_lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return the answers of one or two variants as text for a terminal."""
    yield "items", f"{found['items']}, {found['items_hash'][:19]}, {found['examples']} examples"
    for letter, one in _sides(found):
        yield letter, f"{one['model']}, {one['precision']}, {one['recipe']}, {one['device']}"
        for kind in (one["overall"], *one["kinds"]):
            yield (
                f"  {kind['kind']}",
                f"{_accuracy(kind['accuracy'])}; by byte {_accuracy(kind['accuracy_normalised'])}; "
                f"chance {kind['chance_ratio']:.1%}",
            )
    if found["against"]:
        flips = found["flips"]
        yield (
            "B against A",
            f"{flips['verdict']}: {flips['difference']:+.1%}, only A right {flips['only_a']}, only "
            f"B right {flips['only_b']}, of {flips['n']} (p = {flips['p']:.3f})",
        )


def text_lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return the scores of one or two variants as text for a terminal."""
    for letter, one in _sides(found):
        yield letter, f"{one['model']}, {one['precision']}, {one['recipe']}, {one['device']}"
        for score in one["scores"]:
            low, high = score["low"], score["high"]
            interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
            yield (
                f"  {score['title']}",
                f"{score['value']:.2f} of {score['scale']}{interval}, {score['signature']}",
            )
        yield "  pairs", f"{one['n']}, of which {one['cut_off']} were cut off at the limit"
        for note in one["notes"]:
            yield "  note", note
    for one in found.get("differences", ()):
        yield f"B against A, {one['title']}", f"{one['difference']:+.2f}: {one['verdict']}"


def _sides(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "A" if found["against"] else "variant", found
    if found["against"]:
        yield "B", found["against"]


def _accuracy(one: Mapping[str, Any]) -> str:
    return f"{one['ratio']:.1%} ({one['low']:.1%} to {one['high']:.1%}, n = {one['n']})"


def source_precision(models: Catalogue, variant: Variant) -> str | None:
    """Return what the weights were stored in where they come from, None for random ones."""
    if variant.weights_id.startswith("random:"):
        return None
    return models.checkpoint(variant.model).source_precision


def lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return the result as text for a terminal: what, and how much."""
    identity = found["identity"]
    other = found.get("against")
    yield "A" if other else "variant", _variant(found)
    yield "perplexity", _perplexity(found)
    yield "bits per byte", _number(found["bits_per_byte"])
    if other:
        yield "B", _variant(other)
        yield "perplexity of B", _perplexity(other)
        yield from _differences(found)
    yield "scored tokens", f"{found['scored_tokens']:,} of {found['text_tokens']:,}"
    begins = "nothing" if identity["bos"] is None else f"token {identity['bos']}"
    yield (
        "windows",
        f"{found['windows']:,} of {identity['window']:,} tokens, stride {identity['stride']:,}, "
        f"{begins} before each",
    )
    yield "text", f"{found['text']}, {identity['text'][:19]}"


def _differences(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield (
        "ln(PPL B / PPL A)",
        f"{found['log_ppl_ratio_mean']:+.5f} ± {_number(found['log_ppl_ratio_se'])}",
    )
    tail = "" if found["kl_p999"] is None else f", 99.9 % {found['kl_p999']:.4g}"
    yield (
        "KL(A‖B) in nats",
        f"mean {found['kl_mean']:.4g}, median {found['kl_median']:.4g}, "
        f"99 % {found['kl_p99']:.4g}{tail}",
    )
    yield "likeliest is the same", f"{found['same_top_ratio']:.2%} of tokens"
    yield (
        "p of the true token",
        f"mean {found['delta_p_mean']:+.4%}, RMS {found['delta_p_rms']:.4%}",
    )
    if greedy := found["greedy"]:
        firsts = ", ".join("none" if at is None else str(at) for at in greedy["first_divergent"])
        yield (
            "greedy agreement",
            f"{greedy['agreement_ratio']:.1%} of {greedy['new_tokens']} tokens after "
            f"{greedy['prompts']} prompts; first divergent token: {firsts}",
        )
    if found["alternated"]:
        yield "memory", "the two do not fit together and were loaded in turn"


def _variant(about: Mapping[str, Any]) -> str:
    stored = f", weights stored as {about['source_precision']}" if about["source_precision"] else ""
    return (
        f"{about['model']}, {about['precision']}, {about['recipe']}, {about['device']}"
        f"{stored or ', random weights'}"
    )


def _perplexity(found: Mapping[str, Any]) -> str:
    error = found["nll_se"]
    spread = "" if error is None else f" ± {found['perplexity'] * error:.2g} (standard error)"
    return f"{found['perplexity']:,.4f}{spread}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
