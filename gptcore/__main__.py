"""``python -m gptcore``: the laboratory without a browser.

Exit status: 0 done, 2 the input was wrong (one sentence on standard error).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from gptcore import __version__
from gptcore.catalogue import Catalogue, ModelEntry
from gptcore.device import devices, require_device
from gptcore.errors import DeviceBusy, GptcoreError, InvalidInput
from gptcore.fit import gib
from gptcore.host.worker import Watcher, Worker
from gptcore.paths import models_dir
from gptcore.provenance import owner, provenance
from gptcore.recipe import SHORTHANDS, Recipe, Variant, place
from gptcore.records import MAX_SEED, Message, Request, Run, RunKind, RunState, new_id, now
from gptcore.store import open_store

PRECISIONS = ("fp32", "bf16", "fp16", *SHORTHANDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], dict[str, Any]] = options.command
    try:
        result = command(options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        print(f"{where}: {first['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        return 2
    except DeviceBusy as error:
        print(f"{error} --wait waits for it.", file=sys.stderr)
        return 2
    except GptcoreError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result, ensure_ascii=False, indent=1))
    return 0


def models_list(options: argparse.Namespace) -> dict[str, Any]:
    """List the catalogue."""
    entries = _catalogue().entries()
    if not options.json:
        for one in entries:
            size = gib(one.stored_bytes) if one.stored_bytes else "—"
            count = f"{one.spec.parameters:,}" if one.spec else "—"
            print(f"{one.name:<18}{one.kind:<11}{count:>17}{size:>11}  {one.problem or one.title}")
    return {"models": [_entry_json(one) for one in entries]}


def models_show(options: argparse.Namespace) -> dict[str, Any]:
    """Show one model."""
    shown = _entry_json(_catalogue().entry(options.name))
    if not options.json:
        for key, value in shown.items():
            print(f"{key:<18}{json.dumps(value, ensure_ascii=False)}")
    return shown


def models_pull(options: argparse.Namespace) -> dict[str, Any]:
    """Bring a model into the catalogue."""
    catalogue = _catalogue()
    progress = _progress_line if sys.stderr.isatty() and not options.json else lambda ratio: None
    if options.source == "smollm2-135m":
        name = catalogue.pull_smollm2(progress)
    else:
        name = catalogue.add(options.source, options.name, progress)
    if not options.json:
        print(f"{name} is ready.")
    return _entry_json(catalogue.entry(name))


def devices_list(options: argparse.Namespace) -> dict[str, Any]:
    """List the devices, absent ones with their reason."""
    found = devices()
    if not options.json:
        for one in found:
            print(f"{one.id:<8}{one.name}" + (f": absent, {one.absent}" if one.absent else ""))
    return {"devices": [dataclasses.asdict(one) for one in found]}


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Generate text in this process, and keep the run in the database."""
    request = _request(options)
    catalogue = _catalogue()
    variant = _variant(options, catalogue)
    worker = Worker(options.device, catalogue, wait=options.wait)
    run = Run(
        id=new_id(),
        kind=RunKind.GENERATE,
        state=RunState.RUNNING,
        created_at=now(),
        model=variant.model,
        precision=variant.precision,
        device=options.device,
        variant_hash=variant.hash,
        settings=request.model_dump(mode="json"),
        owner=owner(),
    )
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if not options.json:
            print(text, end="", flush=True)

    def on_phase(phase: str, progress: float | None) -> None:
        if phase.startswith("waiting"):
            print(phase, file=sys.stderr)

    watcher = Watcher(on_token=lambda token: write(token.text), on_phase=on_phase)
    run, tokens = worker.generate(run, variant, request, watcher, sent_at=time.monotonic())
    if not options.no_save:
        store = open_store()
        store.add_variant(
            variant.hash,
            variant.model_dump(mode="json"),
            provenance(variant.weights_id, variant.placement.resolved_threads),
        )
        store.add_run(run)
        store.finish_run(run, tokens)
        store.close()
    if run.state is not RunState.DONE or run.numbers is None:
        raise InvalidInput(run.error or f"The run was {run.state}.")
    if not options.json:
        print()
    numbers = run.numbers
    return {
        "text": run.text,
        "token_ids": [token.id for token in tokens],
        **dataclasses.asdict(numbers),
        "model": variant.model,
        "precision": variant.precision,
        "device": options.device,
        "threads": variant.placement.resolved_threads,
        "seed": request.seed,
        "variant": variant.hash,
        "run_id": None if options.no_save else run.id,
    }


def _catalogue() -> Catalogue:
    return Catalogue(models_dir())


def _variant(options: argparse.Namespace, catalogue: Catalogue) -> Variant:
    require_device(options.device)
    recipe = Recipe()
    if options.recipe:
        try:
            recipe = Recipe.model_validate({"passes": json.loads(options.recipe)})
        except json.JSONDecodeError as error:
            raise InvalidInput(
                f'--recipe is no JSON ({error}); write a list such as [{{"pass": "int8"}}].'
            ) from None
    placement, recipe = place(options.precision, options.device, options.threads, recipe)
    spec, weights_id = catalogue.identity(options.model, paths=True)
    return Variant(
        model=options.model, spec=spec, weights_id=weights_id, placement=placement, recipe=recipe
    )


def _request(options: argparse.Namespace) -> Request:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if options.messages:
        try:
            messages = json.loads(options.messages)
        except json.JSONDecodeError as error:
            raise InvalidInput(f"--messages is no JSON: {error}.") from None
    else:
        messages = [Message(role="user", content=prompt)] if options.chat and prompt else []
    return Request.model_validate(
        {
            "prompt": "" if messages else prompt,
            "messages": messages,
            "stop": options.stop or (),
            "forced_ids": [one for one in options.forced_ids.split(",") if one],
            "seed": secrets.randbelow(2**31) if options.seed is None else options.seed,
            **{
                name: getattr(options, name)
                for name in (
                    "temperature",
                    "top_k",
                    "top_p",
                    "min_p",
                    "repetition_penalty",
                    "max_new_tokens",
                    "ignore_eos",
                    "overflow",
                    "alternatives",
                )
            },
        }
    )


def _entry_json(entry: ModelEntry) -> dict[str, Any]:
    spec = entry.spec
    return {
        "name": entry.name,
        "title": entry.title,
        "kind": entry.kind,
        "parameters": spec.parameters if spec else None,
        "parameters_by_part": spec.parameters_by_part if spec else None,
        "context_tokens": spec.context if spec else None,
        "stored_bytes": entry.stored_bytes,
        "source_precision": entry.source_precision,
        "licence": entry.licence,
        "provenance": entry.provenance,
        "chat": entry.chat,
        "note": entry.note,
        "problem": entry.problem,
        "path": str(entry.path) if entry.path else None,
        "spec": spec.model_dump(mode="json") if spec else None,
    }


def _progress_line(ratio: float) -> None:
    print(f"\r{ratio:4.0%}", end="" if ratio < 1 else "\n", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gptcore", description="A laboratory for GPT models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    models = commands.add_parser("models", help="the catalogue of models")
    verbs = models.add_subparsers(required=True, metavar="VERB")
    _command(verbs, "list", models_list, "list installed models and sizes")
    show = _command(verbs, "show", models_show, "show one model")
    show.add_argument("name")
    pull = _command(verbs, "pull", models_pull, "bring a model into the catalogue")
    pull.add_argument("source", help="smollm2-135m, a folder, a .gguf file, or a hub name")
    pull.add_argument("--name", help="what to call it")

    _command(commands, "devices", devices_list, "list the devices of this machine")

    one = _command(commands, "generate", generate, "generate text")
    one.add_argument("--model", default="smollm2-135m", help="a catalogue name or any path")
    one.add_argument("--precision", default="fp32", choices=PRECISIONS)
    one.add_argument("--device", default="cpu")
    one.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    one.add_argument("--recipe", help="a JSON list of passes")
    one.add_argument("--prompt", default="", help="the text to continue; - reads standard input")
    one.add_argument("--chat", action="store_true", help="put the prompt as a user's message")
    one.add_argument("--messages", help="a whole chat, as a JSON list of {role, content}")
    one.add_argument("--seed", type=int, help=f"0 to {MAX_SEED}; without it a fresh one")
    one.add_argument("--forced-ids", default="", help="token ids that open the answer: 12,7,…")
    one.add_argument("--stop", action="append", help="end before this text; may be repeated")
    one.add_argument("--ignore-eos", action="store_true", help="go on past the end of text")
    one.add_argument("--wait", action="store_true", help="wait for a device that is taken")
    one.add_argument("--no-save", action="store_true", help="keep nothing in the database")
    for name in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "max_new_tokens",
        "alternatives",
    ):
        field = Request.model_fields[name]
        one.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"{field.description} (default {field.default})".replace("%", "%%"),
        )
    one.add_argument("--overflow", default="refuse", choices=("refuse", "cut"))
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], Any], help: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=function)
    return parser


if __name__ == "__main__":
    sys.exit(main())
