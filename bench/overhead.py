"""What streaming, watching and recording cost: a text through the lab against one without it.

With: ``Lab``, as the pages use it. A host process writes the text and sends every token; this
process draws its state eight times a second, as the playground does, watches the machine once a
second, and keeps run and readings in a database. Without: the same worker in a process of its own,
which nobody listens to and which keeps nothing. The same request in turns, in an order drawn anew;
what is compared is seconds a token behind the first.

    python -m bench.overhead [--precision int8] [--threads 2] [--pairs 24]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.decode import SMOLLM2
from bench.results import conditions, keep
from bench.sides import ROOT, pin
from gptcore.catalogue import Catalogue
from gptcore.lab import Lab
from gptcore.measure.statistics import compare
from gptcore.paths import models_dir
from gptcore.recipe import Variant
from gptcore.records import Request, Run, RunKind, RunState, new_id, now

DRAWN_EVERY_S = 0.12
"""As the playground draws a text that is being written."""
PROMISED = 0.02
REQUEST = Request(prompt="Once upon a time", temperature=0.8, seed=1, ignore_eos=True)


def variant_of(precision: str, threads: int) -> Variant:
    """Return SmolLM2 as it is."""
    return Catalogue(models_dir()).variant(SMOLLM2, precision=precision, threads=threads)


def plain(precision: str, threads: int, new_tokens: int) -> None:
    """Write the text for every line that comes, and answer with its seconds a token."""
    from gptcore.host.worker import Watcher, Worker

    catalogue, variant = Catalogue(models_dir()), variant_of(precision, threads)
    worker = Worker("cpu", catalogue)
    request = REQUEST.model_copy(update={"max_new_tokens": new_tokens})
    for _ in sys.stdin:
        run = Run(id=new_id(), kind=RunKind.GENERATE, state=RunState.QUEUED, created_at=now())
        done, _ = worker.generate(run, variant, request, Watcher(), sent_at=time.monotonic())
        assert done.numbers is not None, done.error
        print(json.dumps(done.numbers.tpot_s), flush=True)


def through(lab: Lab, variant: Variant, request: Request) -> float:
    """Write the text through the lab, looking at it all the while; return seconds a token."""
    run_id = lab.generate(variant, request, session="bench")
    while True:
        found = lab.snapshot(run_id)
        assert found is not None
        if found.run.state.final:
            assert found.run.numbers is not None, found.run.error
            assert found.run.numbers.tpot_s is not None
            return found.run.numbers.tpot_s
        time.sleep(DRAWN_EVERY_S)


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    if options.plain:
        plain(options.precision, options.threads, options.new_tokens)
        return
    pin(os.cpu_count() or 1)
    load_before = os.getloadavg()
    command = [sys.executable, "-m", "bench.overhead", "--plain", "--precision", options.precision]
    command += ["--threads", str(options.threads), "--new-tokens", str(options.new_tokens)]
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    variant = variant_of(options.precision, options.threads)
    request = REQUEST.model_copy(update={"max_new_tokens": options.new_tokens})
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        lab = Lab.open(f"sqlite:///{Path(folder) / 'lab.db'}", monitor=True)
        answers, questions = child.stdout, child.stdin

        def without() -> float:
            print(file=questions, flush=True)
            return float(json.loads(answers.readline()))

        sides: dict[str, Callable[[], float]] = {
            "without": without,
            "with": lambda: through(lab, variant, request),
        }
        draw = random.Random(0)
        for turn in range(options.pairs + 1):
            for side in draw.sample(list(sides), 2):
                found = sides[side]()
                if turn:  # the first is for warming up
                    seconds[side].append(found)
        lab.close()
        child.stdin.close()
    found = compare(seconds["without"], seconds["with"])
    result = {
        **conditions(options.threads, load_before),
        "precision": options.precision,
        "new_tokens": options.new_tokens,
        "seconds_per_token": seconds,
        "ratio": found.ratio,
        "low": found.low,
        "high": found.high,
    }
    table = markdown(result)
    print(table)
    if options.write:
        keep("overhead", result, table)


def markdown(result: dict[str, object]) -> str:
    """Return the sentence that says it."""
    machine, load = result["machine"], result["load_average"]
    assert isinstance(machine, dict)
    assert isinstance(load, dict)
    ratio, low, high = (float(str(result[name])) for name in ("ratio", "low", "high"))
    return (
        f"{str(result['at'])[:10]}, {machine['cpu']}, {result['threads']} thread(s), {SMOLLM2} "
        f"{result['precision']}, {result['new_tokens']} tokens a text; load "
        f"{load['before'][0]:.1f} before and {load['after'][0]:.1f} after.\n\n"
        f"A token through the lab takes {ratio:.3f} × as long ({low:.3f} to {high:.3f}); promised: "
        f"at most {1 + PROMISED:.2f}.\n"
    )


if __name__ == "__main__":
    main()
