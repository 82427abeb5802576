"""``python -m gptcore corpus``: write more of the corpus, and say what it holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptcore import weights
from gptcore.catalogue import SHIPPED
from gptcore.cli.terminal import catalogue, say, yielding_device
from gptcore.cli.train import Terminal
from gptcore.corpus import quantized
from gptcore.corpus.join import join
from gptcore.corpus.shards import Ledger, corpus_dir
from gptcore.corpus.sheet import page, sheet
from gptcore.corpus.write import Plan, Progress, recipe, write
from gptcore.device import Placement, require_device
from gptcore.errors import InvalidInput
from gptcore.paths import data_dir
from gptcore.tokenizer import load_tokenizer
from gptcore.train import tales
from gptcore.train.events import Observer

SHEET = "README.md"


def add_write_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``corpus write``; those of ``Plan`` come from its fields."""
    parser.add_argument("--to", type=Path, help="the folder of the shards (default data/corpus)")
    parser.add_argument("--model", default="smollm2-135m", help="the teacher; it must know chat")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--tokens", type=int, help="stop after so many tokens that were kept")
    parser.add_argument("--close", action="store_true", help="put what is pending into a shard")
    for name, field in Plan.model_fields.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=name.upper(),
            help=f"{field.description} (default {field.default})".replace("%", "%%"),
        )


def add_sheet_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``corpus sheet``."""
    parser.add_argument("--to", type=Path, help="the folder of the shards (default data/corpus)")
    parser.add_argument("--keep", action="store_true", help=f"write it into {SHEET} there too")


def add_join_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``corpus join``."""
    parser.add_argument("folders", nargs="+", type=Path, help="folders that were written to")
    parser.add_argument("--to", type=Path, help="the folder of the shards (default data/corpus)")


def add_learn_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``corpus learn``."""
    parser.add_argument("--corpus", default="", help="the folder of the shards")
    parser.add_argument("--to", type=Path, help="the model's folder (default: beside the data)")
    parser.add_argument("--work", type=Path, help="keeps the trainings; named again, they go on")
    parser.add_argument("--teacher", default="smollm2-135m", help="reads the samples afterwards")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument(
        "--whole-only", action="store_true", help="leave out the parts of the corpus"
    )


def learn_tales(options: argparse.Namespace) -> dict[str, Any]:
    """Train the model that ships, describe it, and hold it against the one that ships.

    Ctrl-C leaves a checkpoint; the same command goes on with it.

    Raises:
        InvalidInput, StoreError, DoesNotFit, Cancelled: as their names say.
    """
    import torch

    placement = Placement(threads=options.threads)
    torch.set_num_threads(placement.resolved_threads)
    work = options.work or data_dir() / "trainings" / SHIPPED.name
    target = options.to or data_dir() / "made" / SHIPPED.name
    before = tales.read_judged(SHIPPED)
    observe: Observer = (lambda event: None) if options.json else Terminal()
    with yielding_device("cpu", "train", wait=True) as breathe:
        learned = []
        for part in (1.0,) if options.whole_only else tales.PASSES:
            one, model = tales.learn(options.corpus, work, part, observe=observe, breathe=breathe)
            learned.append(one)
            if part == 1:
                whole = model
        corpus = Path(options.corpus).expanduser() if options.corpus else corpus_dir()
        judged = tales.judge(whole, corpus, learned, catalogue(), options.teacher, breathe=breathe)
    target.parent.mkdir(parents=True, exist_ok=True)
    tales.publish(whole, target, judged)
    found = {"model": str(target), "test_bits_per_byte": judged.test_bits_per_byte}
    if not options.json:
        say(f"{target}: {judged.test_bits_per_byte:.4f} bits per byte on the test part.")
    if before is not None:
        ratio = judged.test_bits_per_byte / before["test_bits_per_byte"]
        found |= {"shipped_bits_per_byte": before["test_bits_per_byte"], "ratio": ratio}
        if not options.json:
            say(f"The one that ships has {before['test_bits_per_byte']:.4f}: × {ratio:.4f}.")
    return found


def write_texts(options: argparse.Namespace) -> dict[str, Any]:
    """Write texts until the time or the tokens are reached, and return what was done.

    Others may have the device between two steps. Ctrl-C ends it; only the batch at hand is lost.

    Raises:
        InvalidInput: an option is not allowed, or the teacher knows no chat.
        Cancelled, UnknownModel, StoreError: as their names say.
    """
    if options.minutes is None and options.tokens is None:
        raise InvalidInput("Say when to stop: --minutes 10, --tokens 100000, or both.")
    if any(one is not None and one <= 0 for one in (options.minutes, options.tokens)):
        raise InvalidInput("--minutes and --tokens must be above 0.")
    given = {name: getattr(options, name) for name in Plan.model_fields}
    plan = Plan.model_validate({name: one for name, one in given.items() if one is not None})
    require_device(options.device)
    with yielding_device(options.device, "corpus", wait=True) as breathe:
        return _written(options, plan, breathe)


def _written(
    options: argparse.Namespace, plan: Plan, breathe: Callable[[], None]
) -> dict[str, Any]:
    import torch

    placement = Placement(
        device=options.device,
        precision="bf16" if options.device.startswith("cuda") else "fp32",
        threads=options.threads,
    )
    torch.set_num_threads(placement.resolved_threads)
    checkpoint = catalogue().checkpoint(options.model)
    tokenizer = load_tokenizer(checkpoint.directory)
    if tokenizer.chat_template is None:
        raise InvalidInput(f"{options.model} knows no chat, so it cannot be asked for texts.")
    model = weights.build(checkpoint, placement)
    as_integers = quantized.suits(options.device)
    if as_integers:
        model = quantized.quantize(model)
    precision = "int8, activations in 8 bits" if as_integers else placement.precision
    made_by = recipe(plan, options.model, checkpoint.weights_id, precision)
    ledger = Ledger(options.to or corpus_dir(), made_by)

    def enough(done: Progress) -> bool:
        return (options.minutes is not None and done.seconds >= 60 * options.minutes) or (
            options.tokens is not None and done.kept_tokens >= options.tokens
        )

    def report(done: Progress) -> None:
        if not options.json:
            closed = f", closed {done.shard.name}" if done.shard else ""
            say(
                f"batch {done.batch - 1}: {done.kept:,} of {done.texts:,} texts kept, "
                f"{done.kept_tokens:,} tokens, {done.tokens / max(done.seconds, 1e-9):.0f} "
                f"tokens/s{closed}"
            )

    done = write(model, tokenizer, plan, ledger, enough=enough, breathe=breathe, report=report)
    closed = ledger.close() if options.close else done.shard
    return {
        **asdict(done),
        "shard": closed.name if closed else None,
        "tokens_per_s": done.tokens / max(done.seconds, 1e-9),
        "recipe": made_by,
    }


def join_texts(options: argparse.Namespace) -> dict[str, Any]:
    """Bring the texts of other folders into the corpus.

    Raises:
        InvalidInput, StoreError: as ``join`` says.
    """
    done = join(options.to or corpus_dir(), options.folders)
    if not options.json:
        refused = ", ".join(f"{count:,} {reason}" for reason, count in done.refused.items())
        say(
            f"{done.texts:,} texts added in {len(done.shards)} shards; left out: "
            f"{refused or 'none'}."
        )
    return asdict(done)


def show_sheet(options: argparse.Namespace) -> dict[str, Any]:
    """Return the corpus's statistics, and print them as a page.

    Raises:
        InvalidInput: there is no corpus, or a shard is damaged.
    """
    folder = options.to or corpus_dir()
    found = sheet(folder)
    text = page(found)
    if options.keep:
        (folder / SHEET).write_text(text)
    if not options.json:
        say(text)
    result: dict[str, Any] = json.loads(json.dumps(asdict(found)))
    return result
