"""``python -m gptcore``: the laboratory without a browser.

Exit status: 0 done, 1 a slowdown was found, 2 the input was wrong (one sentence on standard error),
130 stopped with Ctrl-C, 141 nobody reads the output any more. A generation that is stopped is kept
as cancelled.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while all this is being imported ends without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import io
import json
import secrets
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pydantic import ValidationError

from gptcore import __version__
from gptcore.catalogue import ModelEntry
from gptcore.cli import (
    corpus,
    evaluate,
    exporting,
    in_context,
    measuring,
    optimizing,
    regress,
    runs,
    train,
    tune,
)
from gptcore.cli.terminal import (
    REFUSED,
    Unread,
    add_variant_arguments,
    catalogue,
    json_option,
    kept,
    new_run,
    noticed_interrupt,
    progress_line,
    say,
    variant_of,
)
from gptcore.device import Placement, devices, free_bytes
from gptcore.errors import (
    Cancelled,
    DeviceBusy,
    GptcoreError,
    InvalidInput,
)
from gptcore.fit import gib
from gptcore.host.wire import error_from_json
from gptcore.host.worker import Watcher, Worker
from gptcore.plan import command as planning
from gptcore.processes import Processes, is_first, joined, several, started
from gptcore.recipe import Variant
from gptcore.records import (
    MAX_SEED,
    Message,
    Request,
    RunKind,
    RunState,
    Token,
)
from gptcore.sentences import one_line, sentence

MAX_ARGUMENTS = 1000
"""Python's own parser would take minutes for 100,000."""
STOPPED = 130
"""What shells report for a program that Ctrl-C ended."""
UNREAD = 141
"""What shells report for a program whose output nobody reads."""
PLAN_HELP = "what a size needs: memory, training, speed, capacity"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    _tolerate_any_text()
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) > MAX_ARGUMENTS:
        said = f"There are {len(given):,} arguments; the most is {MAX_ARGUMENTS:,}: give fewer."
        print(said, file=sys.stderr)
        return 2
    options = _parser().parse_args(given)
    options.words = given
    command: Callable[[argparse.Namespace], dict[str, Any]] = options.command
    try:
        result = command(options)
        if options.json:
            say(json.dumps(result, ensure_ascii=False, indent=1))
    except (ValidationError, DeviceBusy) as error:
        way_out = " Or wait for it, with --wait." if isinstance(error, DeviceBusy) else ""
        print(f"{sentence(error)}{way_out}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Cancelled):
        print("Stopped.", file=sys.stderr)
        return STOPPED
    except GptcoreError as error:
        print(error, file=sys.stderr)
        return 2
    except Unread:
        return UNREAD
    return int(getattr(options, "status", 0))


def models_list(options: argparse.Namespace) -> dict[str, Any]:
    """List the catalogue."""
    entries = catalogue().entries()
    if not options.json:
        for one in entries:
            size = gib(one.stored_bytes) if one.stored_bytes else "—"
            count = f"{one.spec.parameters:,}" if one.spec else "—"
            said = one.problem or one.title
            say(f"{one.name:<18}{one.kind:<11}{count:>17}{size:>11}  {one_line(said, 300)}")
    return {"models": [_entry_json(one) for one in entries]}


def models_show(options: argparse.Namespace) -> dict[str, Any]:
    """Show one model."""
    shown = _entry_json(catalogue().entry(options.name))
    if not options.json:
        for key, value in shown.items():
            say(f"{key:<20}{json.dumps(value, ensure_ascii=False)}")
    return shown


def models_pull(options: argparse.Namespace) -> dict[str, Any]:
    """Bring a model into the catalogue."""
    models = catalogue()
    progress = progress_line if sys.stderr.isatty() and not options.json else lambda ratio: None
    if options.source == "smollm2-135m":
        name = models.pull_smollm2(progress)
    else:
        name = models.add(options.source, options.name, progress)
    if not options.json:
        say(f"{name} is ready.")
    return _entry_json(models.entry(name))


def devices_list(options: argparse.Namespace) -> dict[str, Any]:
    """List the devices, absent ones with their reason, and what each does badly."""
    found = devices()
    free = {one.id: None if one.absent else free_bytes(one.id) for one in found}
    if not options.json:
        for one in found:
            memory = f", {gib(size)} free" if (size := free[one.id]) else ""
            say(f"{one.id:<8}{one.name}{f': absent, {one.absent}' if one.absent else memory}")
            for precision, caution in one.cautions:
                say(f"{'':<8}{precision}: {caution}")
    return {
        "devices": [
            {
                **dataclasses.asdict(one),
                "cautions": dict(one.cautions),
                "free_bytes": free[one.id],
            }
            for one in found
        ]
    }


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Generate text in this process, and keep the run in the database.

    Raises:
        Cancelled: Ctrl-C ended it; what was written until then is kept.
        Unread: as ``say``; it is kept too.
        GptcoreError: it was refused, or failed.
    """
    request = _request(options) if is_first() else None
    with (
        started(1 if several() else options.processes, options.words),
        joined(options.device) as (processes, options.device),
    ):
        if processes.count > 1 and not options.threads:
            options.threads = max(1, Placement().resolved_threads // processes.count)
        agreed = processes.agreed("" if request is None else request.model_dump_json())
        return _generated(options, Request.model_validate_json(agreed), processes)


def _generated(
    options: argparse.Namespace, request: Request, processes: Processes
) -> dict[str, Any]:
    models = catalogue()
    variant = variant_of(options, models)
    worker = Worker(options.device, models, wait=options.wait, processes=processes)
    if not processes.first:
        return _with_the_first(options, worker, variant, request)
    run = new_run(RunKind.GENERATE, variant, request.model_dump(mode="json"))
    ended: list[Unread] = []
    draws = sys.stdout is not None and sys.stdout.isatty()

    def write(token: Token) -> None:
        try:
            if not (options.json or ended):
                say(_drawable(token.text) if draws else token.text, end="")
        except Unread as error:
            ended.append(error)

    def on_phase(phase: str, progress: float | None) -> None:
        if phase.startswith("waiting"):
            print(phase, file=sys.stderr)

    with noticed_interrupt() as interrupted:
        watcher = Watcher(
            cancelled=lambda: bool(interrupted or ended), on_token=write, on_phase=on_phase
        )
        run, tokens = worker.generate(run, variant, request, watcher, sent_at=time.monotonic())
        error = error_from_json(run.error_kind, run.error or "") if run.error_kind else None
        if isinstance(error, REFUSED):
            raise error
        saved = not options.no_save and kept(run, tokens, variant)
    if tokens and not options.json and not ended:
        say("")
    if ended:
        raise ended[0]
    if error or run.numbers is None or run.state is not RunState.DONE:
        raise error or Cancelled("Stopped.")
    return {
        "text": run.text,
        "token_ids": [token.id for token in tokens],
        **dataclasses.asdict(run.numbers),
        **(run.result or {}),
        "model": variant.model,
        "precision": variant.precision,
        "device": options.device,
        "threads": variant.placement.resolved_threads,
        "seed": request.seed,
        "variant": variant.hash,
        "run_id": run.id if saved else None,
    }


def _with_the_first(
    options: argparse.Namespace, worker: Worker, variant: Variant, request: Request
) -> dict[str, Any]:
    """Compute this process's share of what the first one writes, keeps and says."""
    options.json = False
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the first that stops, and ends the others
    run = new_run(RunKind.GENERATE, variant, request.model_dump(mode="json"))
    run, _ = worker.generate(run, variant, request, Watcher(), sent_at=time.monotonic())
    if run.error_kind:
        raise error_from_json(run.error_kind, run.error or "")
    return {}


def _tolerate_any_text() -> None:
    """Print what the terminal's encoding lacks as an escape, where it would else be an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drawable(text: str) -> str:
    """Return text without what would steer a terminal; a random model writes such a lot."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(one) == "Cc" and one not in "\n\t"
        else one
        for one in text
    )


def _request(options: argparse.Namespace) -> Request:
    prompt = _standard_input() if options.prompt == "-" else options.prompt
    messages: Any = ()
    if options.messages:
        example = '[{"role": "user", "content": "Hello"}]'
        messages = json_option("--messages", options.messages, example)
    elif options.chat and prompt:
        messages, prompt = (Message(role="user", content=prompt),), ""
    return Request.model_validate(
        {
            "prompt": prompt,
            "messages": messages,
            "stop": options.stop,
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


def _standard_input() -> str:
    if sys.stdin is None:
        raise InvalidInput(
            "--prompt - reads standard input, which is closed: give the text itself."
        )
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"Standard input is no UTF-8: byte {error.start:,} cannot be read. Convert it first."
        ) from None


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
        "ships": entry.ships,
        "note": entry.note,
        "problem": entry.problem,
        "path": str(entry.path) if entry.path else None,
        "variant": entry.variant.model_dump(mode="json") if entry.variant else None,
        "spec": spec.model_dump(mode="json") if spec else None,
    }


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and where help is, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        print(f"{one_line(message, 300)} (help: {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m gptcore", description="A laboratory for GPT models.")
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
    add_variant_arguments(one)
    one.add_argument("--prompt", default="", help="the text to continue; - reads standard input")
    one.add_argument("--chat", action="store_true", help="put the prompt as a user's message")
    one.add_argument("--messages", help="a whole chat, as a JSON list of {role, content}")
    one.add_argument("--seed", type=int, help=f"0 to {MAX_SEED}; without it a fresh one")
    one.add_argument("--forced-ids", default="", help="token ids that open the answer: 12,7,…")
    one.add_argument(
        "--stop", action="append", default=[], help="end before this text; may be repeated"
    )
    one.add_argument("--ignore-eos", action="store_true", help="go on past the end of text")
    one.add_argument(
        "--processes", type=int, default=1, help="split the model over so many processes"
    )
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

    measured = _command(
        commands, "bench", measuring.bench, "measure load, prefill, decode and whole requests"
    )
    measuring.add_bench_arguments(measured)
    compared = _command(
        commands, "compare", measuring.compare, "measure two variants in turn: who is faster"
    )
    measuring.add_compare_arguments(compared)
    regressed = _command(
        commands, "regress", regress.regress, "measure beside a baseline: is it slower now"
    )
    regress.add_arguments(regressed)

    made = _command(commands, "optimize", optimizing.optimize, "make a variant by a recipe")
    optimizing.add_optimize_arguments(made)
    proven = _command(
        commands, "prove", optimizing.prove, "hold a variant against its baseline on every axis"
    )
    optimizing.add_prove_arguments(proven)
    carried = _command(
        commands, "export", exporting.export_variant, "write a variant for another program"
    )
    exporting.add_arguments(carried)

    searched = _command(commands, "tune", tune.tune, "search recipes for a model under limits")
    tune.add_arguments(searched)

    evaluations = commands.add_parser("eval", help="measure quality").add_subparsers(
        required=True, metavar="WHAT"
    )
    scored = _command(
        evaluations, "perplexity", evaluate.perplexity, "perplexity, alone or against another"
    )
    evaluate.add_arguments(scored)
    asked = _command(
        evaluations, "tasks", evaluate.tasks, "multiple-choice items, alone or against another"
    )
    evaluate.add_tasks_arguments(asked)
    judged = _command(
        evaluations, "texts", evaluate.texts, "BLEU, chrF, ROUGE, METEOR of written texts"
    )
    evaluate.add_texts_arguments(judged)
    shown = _command(
        evaluations, "few-shot", in_context.few_shot, "accuracy over the examples in the prompt"
    )
    in_context.add_few_shot_arguments(shown)
    held = _command(commands, "constrain", in_context.constrain, "texts that follow a rule")
    in_context.add_constrain_arguments(held)

    kept_runs = commands.add_parser("runs", help="what is in the database")
    verbs = kept_runs.add_subparsers(required=True, metavar="VERB")
    runs.add_list_arguments(_command(verbs, "list", runs.listed, "list runs, newest first"))
    _command(verbs, "show", runs.show, "show one run").add_argument("id")
    runs.add_export_arguments(_command(verbs, "export", runs.export, "write runs into a file"))
    brought = _command(verbs, "import", runs.bring_in, "read runs from a file")
    brought.add_argument("file")

    planned = _command(commands, "plan", lambda chosen: planning.plan(chosen, say), PLAN_HELP)
    planning.add_arguments(planned)

    texts = commands.add_parser("corpus", help="the corpus that the shipped model learns from")
    verbs = texts.add_subparsers(required=True, metavar="VERB")
    written = _command(verbs, "write", corpus.write_texts, "let a teacher write more texts")
    corpus.add_write_arguments(written)
    joined = _command(verbs, "join", corpus.join_texts, "bring texts from other folders into it")
    corpus.add_join_arguments(joined)
    learned = _command(
        verbs, "learn", corpus.learn_tales, "train the model that ships, and write its card"
    )
    corpus.add_learn_arguments(learned)
    shown = _command(verbs, "sheet", corpus.show_sheet, "say what it holds")
    corpus.add_sheet_arguments(shown)

    trained = _command(commands, "train", train.train_model, "train a model of one's own")
    train.add_arguments(trained)
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
