"""``eval few-shot`` and ``constrain``: learning from a prompt alone, and texts under a rule."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from gptcore.cli.terminal import add_variant_arguments, catalogue, perform, say, variant_of
from gptcore.errors import InvalidInput
from gptcore.explain.work import Explain, Held
from gptcore.measure.few_shot import FewShot
from gptcore.records import MAX_RULE_CHARS, Constraint


def add_few_shot_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eval few-shot``."""
    add_variant_arguments(parser)
    for name in ("items", "description", "most_items", "seed"):
        _add(parser, name, FewShot)
    for name in ("kinds", "shots"):
        field = FewShot.model_fields[name]
        default = ",".join(map(str, field.default))
        parser.add_argument(
            f"--{name}",
            default=default,
            help=f"{field.description} Separated by commas (default {default or 'all'}).",
        )


def add_constrain_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``constrain``."""
    add_variant_arguments(parser)
    parser.add_argument("--prompt", required=True, help="what is answered under the rule")
    parser.add_argument("--chat", action="store_true", help="the prompt is a chat's first turn")
    rules = parser.add_mutually_exclusive_group(required=True)
    rules.add_argument(
        "--choice", action="append", default=[], help="a text that may be; repeat for each"
    )
    rules.add_argument("--regex", default="", help=Constraint.model_fields["regex"].description)
    rules.add_argument("--json-schema", type=Path, metavar="FILE", help="a schema in a file")
    for name in ("temperature", "texts", "max_new_tokens", "seed"):
        _add(parser, name, Held)


def _add(parser: argparse.ArgumentParser, name: str, owner: type[BaseModel]) -> None:
    field = owner.model_fields[name]
    said = str(field.description).replace("%", "%%")
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        type=type(field.default),
        default=field.default,
        help=f"{said} (default {field.default!r})",
    )


def few_shot(options: argparse.Namespace) -> dict[str, Any]:
    """Ask the same items with several numbers of examples.

    Raises:
        GptcoreError, ValidationError: the input was wrong, or it failed.
    """
    shots = _listed(options.shots)
    if not all(one.isdigit() for one in shots):
        raise InvalidInput(f"--shots {options.shots[:60]!r} is no list of numbers, such as 0,1,4.")
    work = FewShot(
        variant=variant_of(options, catalogue()),
        items=options.items,
        kinds=_listed(options.kinds),
        description=options.description,
        shots=tuple(map(int, shots)),
        most_items=options.most_items,
        seed=options.seed,
    )
    return _done(work, options, few_shot_lines)


def constrain(options: argparse.Namespace) -> dict[str, Any]:
    """Write texts that follow a rule; exit status 1 where a finished one does not.

    Raises:
        GptcoreError, ValidationError: the input was wrong, or it failed.
    """
    work = Explain(
        what="constraint",
        variant=variant_of(options, catalogue()),
        prompt=options.prompt,
        chat=options.chat,
        held=Held(
            constraint=Constraint(
                choices=tuple(options.choice),
                regex=options.regex,
                json_schema=_read(options.json_schema) if options.json_schema else "",
            ),
            temperature=options.temperature,
            texts=options.texts,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
        ),
    )
    found = _done(work, options, constrain_lines)
    options.status = int(found["followed"] < found["finished"])
    return found


def few_shot_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Return the accuracies as text for a terminal."""
    yield f"{found['n']} questions, chance {found['chance_ratio']:.1%}"
    first = found["shots"][0]["shots"]
    for one in found["shots"]:
        yield (
            f"{one['shots']:>3} examples  {one['ratio']:.1%} ({one['low']:.1%} to "
            f"{one['high']:.1%})"
            + (f"  against {first}: {one['verdict']}, p = {one['p']:.3f}" if one["verdict"] else "")
        )


def constrain_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Return the texts, how many follow, and what holding them cost."""
    for one in found["texts"]:
        ended = "" if one["finished"] else "  (cut at the limit)"
        yield f"{one['text']}{ended}"
    yield (
        f"{found['followed']} of {found['finished']} finished texts follow the {found['rule']}; "
        f"{len(found['texts']) - found['finished']} were cut at the limit"
    )
    yield f"without it {sum(one['follows'] is True for one in found['free'])} of " + str(
        len(found["free"])
    )
    if found["mask_s"] and found["step_s"]:
        yield (
            f"compiled in {1000 * found['compile_s']:.3g} ms, tokenizer {found['prepare_s']:.3g} s "
            f"once; {1000 * found['mask_s']:.3g} ms a token of {1000 * found['step_s']:.3g} ms"
        )


def _done(work: FewShot | Explain, options: argparse.Namespace, lines: Any) -> dict[str, Any]:
    run = perform(work, options)
    assert run.result is not None
    found = {**run.result, "run_id": run.id}
    if isinstance(work, Explain):
        ended = [one for one in found["texts"] if one["finished"]]
        found["finished"] = len(ended)
        found["followed"] = sum(one["follows"] is True for one in ended)
    if not options.json:
        for line in lines(found):
            say(line)
    return found


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.replace(" ", "").split(",")))


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > 4 * MAX_RULE_CHARS:
            raise InvalidInput(f"{file.name} is too long for a schema: {MAX_RULE_CHARS:,} "
                               "characters are the most.")  # fmt: skip
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"The schema {str(file)[:200]!r} cannot be read: {error}.") from None
