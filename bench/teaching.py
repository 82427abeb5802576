"""What a teacher is worth: a student beside its control, and a model healed that lost layers.

    python -m bench.teaching student [--work DIR]
    python -m bench.teaching heal --text FILE [--work DIR]

``student`` leaves three of six blocks out of the model that ships and lets the rest learn from the
corpus, the whole model being the teacher. ``heal`` leaves three blocks out of SmolLM2, as the pass
chooses them, and lets the rest learn from a text behind its first 32,768 tokens, which are scored.
The control begins with the same weights, takes the same sequences in the same order at the same
rates, and has no teacher. Both run at once, each on half of the threads, by the command line that a
person would use. Every model is scored on the same windows of a text that none of them learned
from; an interval is that of a ratio over windows.

What was trained stays in ``--work``, and is not trained again.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.passes import FULL_TOKENS, spread
from bench.results import conditions, keep
from gptcore.catalogue import open_catalogue
from gptcore.measure.corpora import evaluation_text
from gptcore.measure.divergence import Paired, divergence, paired
from gptcore.measure.perplexity import Windowing, error_of_mean, model_logits, passage
from gptcore.tokenizer import load_tokenizer
from gptcore.train.origin import origin

Z = 1.96
"""Standard errors on each side of a ratio's logarithm: 95 %."""


@dataclass(frozen=True)
class Experiment:
    """A teacher, what the student begins with, how both learn, and what is promised."""

    teacher: str
    recipe: str
    settings: dict[str, str]
    at_most: float
    """Of the teacher's perplexity."""
    gain: float
    """By which the student has to beat its control."""


STUDENT = Experiment(
    teacher="tales-6m",
    recipe="drop_layers(layers=3)",
    settings={
        "steps": "300",
        "batch": "8",
        "optimizer": "muon",
        "learning-rate": "2e-3",
        "least-rate-ratio": "0.02",
        "warmup": "30",
        "validate-every": "100",
        "validation-windows": "60",
        "teaching-temperature": "1",
        "teaching-top": "64",
    },
    at_most=1.15,
    gain=0.05,
)
HEAL = Experiment(
    teacher="smollm2-135m",
    recipe="drop_layers(layers=3)",
    settings={
        "steps": "80",
        "batch": "2",
        "window": "256",
        "learning-rate": "3e-4",
        "warmup": "10",
        "validate-every": "40",
        "validation-windows": "16",
        "teaching-temperature": "1",
        "teaching-top": "64",
    },
    at_most=1.15,
    gain=0.0,
)
RATIOS = {"student": 0.9, "control": 0.0}
"""The teacher's share of the loss."""


def made(experiment: Experiment, folder: Path) -> Path:
    """Return the variant that both begin with."""
    if not folder.is_dir():
        command = ["optimize", "--model", experiment.teacher, "--recipe", experiment.recipe]
        run([*command, "--no-save", "--wait", "--out", str(folder)])
    return folder


def run(arguments: list[str]) -> None:
    """Run one of this program's commands."""
    done = subprocess.run(command_of(arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])


def command_of(arguments: list[str]) -> list[str]:
    """Return what runs one of this program's commands."""
    return [sys.executable, "-W", "ignore", "-m", "gptcore", *arguments]


def trained(
    experiment: Experiment, start: Path, text: Path | None, work: Path, threads: int
) -> None:
    """Train student and control side by side, where they are not there yet."""
    running = {}
    for name, ratio in RATIOS.items():
        if (work / name / "model").is_dir():
            continue
        command = ["train", "--json", "--to", str(work / name), "--start", str(start)]
        command += ["--teacher", experiment.teacher, "--teaching-ratio", str(ratio)]
        command += ["--threads", str(threads)]
        command += [] if text is None else ["--text", str(text)]
        for key, value in experiment.settings.items():
            command += [f"--{key}", value]
        # Either believes that it has the processor to itself: each has its own cores.
        own = {**os.environ, "GPTLAB_LOCKS": str(work / f"{name}-locks")}
        log = (work / f"{name}.log").open("w")
        running[name] = subprocess.Popen(
            command_of(command), stdout=log, stderr=subprocess.STDOUT, env=own
        )
    for name, process in running.items():
        if process.wait():
            raise SystemExit((work / f"{name}.log").read_text().strip().splitlines()[-1])


def behind(text: Path, model: str, work: Path) -> Path:
    """Return a file of what stands behind the tokens that are scored."""
    tokenizer = load_tokenizer(open_catalogue().checkpoint(model).directory)
    content = evaluation_text(str(text), paths=True).content
    scored = tokenizer.decode(tokenizer.encode(content)[:FULL_TOKENS])
    assert content.startswith(scored)
    file = work / "behind.txt"
    file.write_text(content[len(scored) :], encoding="utf-8")
    return file


def scored(
    experiment: Experiment, start: Path, text: str, work: Path, windows: int
) -> dict[str, tuple[Paired, ...]]:
    """Return every model's windows, each beside the teacher's."""
    catalogue = open_catalogue()
    tokenizer = load_tokenizer(catalogue.checkpoint(experiment.teacher).directory)
    windowing = Windowing(window=512, max_tokens=FULL_TOKENS)
    read = spread(passage(evaluation_text(text, paths=True), tokenizer, windowing), windows)
    names = {"start": str(start), **{name: str(work / name / "model") for name in RATIOS}}
    with torch.no_grad():
        models = [
            origin(catalogue, one).model("cpu") for one in (experiment.teacher, *names.values())
        ]
        found = list(paired(read, *map(model_logits, models)))
    return dict(zip(names, zip(*found, strict=True), strict=True))


def ratio(one: list[np.ndarray]) -> dict[str, float]:
    """Return a ratio of perplexities and its interval, from differences of the costs of tokens."""
    mean, error = float(np.concatenate(one).mean()), error_of_mean(one)
    assert error is not None
    low, high = mean - Z * error, mean + Z * error
    return {"ratio": math.exp(mean), "low": math.exp(low), "high": math.exp(high)}


def rows_of(sides: dict[str, tuple[Paired, ...]]) -> list[dict[str, Any]]:
    """Return perplexity and divergence of each model, the teacher first."""
    first = next(iter(sides.values()))
    nats = np.concatenate([one.nll_a for one in first]).mean()
    rows: list[dict[str, Any]] = [{"model": "teacher", "perplexity": math.exp(nats)}]
    for name, pairs in sides.items():
        report = divergence(pairs)
        rows.append(
            {
                "model": name,
                "perplexity": math.exp(np.concatenate([one.nll_b for one in pairs]).mean()),
                "against_teacher": ratio([one.nll_b - one.nll_a for one in pairs]),
                "kl": report.kl_mean,
                "same_top_ratio": report.same_top_ratio,
                "tokens": report.tokens,
            }
        )
    return rows


def markdown(result: dict[str, Any], experiment: Experiment) -> str:
    """Return the table, and what was promised."""
    rows, gained = result["rows"], result["against_control"]
    settings = ", ".join(f"{key} {value}" for key, value in experiment.settings.items())
    lines = [
        f"{result['at'][:10]}, {result['machine']['cpu']}. {experiment.teacher}, "
        f"{experiment.recipe}, scored on {rows[1]['tokens']:,} tokens of {result['text']}; "
        f"the teacher's share of the loss {RATIOS['student']}, {settings}. "
        f"{result['trained_tokens']:,} tokens learned by each.",
        "",
        "| model | perplexity | × the teacher's (95 %) | KL from the teacher | same top |",
        "|---|---|---|---|---|",
        f"| teacher | {rows[0]['perplexity']:.3f} | | | |",
    ]
    lines += [
        f"| {one['model']} | {one['perplexity']:.3f} | {told(one['against_teacher'])} | "
        f"{one['kl']:.4f} | {one['same_top_ratio']:.1%} |"
        for one in rows[1:]
    ]
    reached = next(one for one in rows if one["model"] == "student")["against_teacher"]["ratio"]
    lines += [
        "",
        f"The student's perplexity is {told(gained)} of its control's. Promised: at most "
        f"{experiment.at_most} × the teacher's, {verdict(reached <= experiment.at_most)}"
        + (
            f"; {experiment.gain:.0%} below its control's, "
            f"{verdict(gained['ratio'] <= 1 - experiment.gain)}."
            if experiment.gain
            else "."
        ),
    ]
    return "\n".join(lines) + "\n"


def told(one: dict[str, float]) -> str:
    """Return a ratio with its interval."""
    return f"{one['ratio']:.3f} × ({one['low']:.3f}–{one['high']:.3f})"


def verdict(met: bool) -> str:
    """Return whether a promise was kept, in a word."""
    return "met" if met else "**missed**"


def main() -> None:
    """Train what is not trained, score, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("student", "heal"))
    parser.add_argument("--text", type=Path, help="a file of UTF-8, for heal")
    parser.add_argument("--work", type=Path, help="a folder that keeps what was trained")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=0, help="scored, evenly spread; 0: all")
    parser.add_argument("--dry", action="store_true", help="print, and write no file")
    options = parser.parse_args()
    experiment = STUDENT if options.what == "student" else HEAL
    if options.what == "heal" and options.text is None:
        parser.error("heal needs --text FILE")
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        start = made(experiment, work / "start")
        learned, text = None, "tales-test"
        if options.what == "heal":
            learned, text = behind(options.text, experiment.teacher, work), str(options.text)
        trained(experiment, start, learned, work, max(1, options.threads // 2))
        sides = scored(experiment, start, text, work, options.windows)
    settings = experiment.settings
    window = int(settings.get("window", 512))
    result = {
        **conditions(options.threads, load),
        "what": options.what,
        "text": "the corpus's test part" if options.what == "student" else options.text.name,
        "trained_tokens": int(settings["steps"]) * int(settings["batch"]) * window,
        "rows": rows_of(sides),
        "against_control": ratio(
            [
                one.nll_b - other.nll_b
                for one, other in zip(sides["student"], sides["control"], strict=True)
            ]
        ),
    }
    table = markdown(result, experiment)
    print(table)
    if not options.dry:
        keep(f"teaching-{options.what}", result, table)


if __name__ == "__main__":
    main()
