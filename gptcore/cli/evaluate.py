"""``python -m gptcore eval``: quality of a variant, alone or against another."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
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
from gptcore.recipe import Variant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eval perplexity``."""
    add_variant_arguments(parser)
    add_other_arguments(parser)
    _add(parser, "text", Evaluate)
    for name in Windowing.model_fields:
        _add(parser, name, Windowing)
    for name in ("prompts", "new_tokens"):
        _add(parser, name, Evaluate)


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
