"""What each pass does to a model's predictions and size, beside what it is meant to reach.

    python -m bench.passes --text FILE [--only "int4 gptq"] [--tokens 32768]

Perplexity is that of the text's first tokens, in windows of 512 without overlap and without a
first-of-text token, through the cache; it is given as a multiple of the same weights' in fp32. KL
is the mean over the first scored windows, from fp32's predictions. With ``--windows N`` only N
windows are scored, evenly spread over those tokens: a line says on how few tokens it was measured.
Sizes are what a file keeps, the embedding included, over the bytes of the fp32 weights. Passes are
calibrated on the end of the text, apart from what is scored, or on a file of its own. Seconds are
processor time: of the whole pass, and of its solvers, calibration's forward passes apart; on one
thread they are a core's.

Every line is kept in bench/results/ as soon as it is there, in the place of an older one of its
name; the table is then written anew, there and in bench/README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.results import RESULTS, into_readme
from gptcore import weights
from gptcore.catalogue import Catalogue
from gptcore.device import Placement, cpu_name, trim_heap
from gptcore.kernels.step import adopt
from gptcore.linears import stored_bytes
from gptcore.measure.corpora import evaluation_text
from gptcore.measure.memory import weight_bytes
from gptcore.measure.perplexity import Passage, Windowing, model_logits, nll_of, passage
from gptcore.model import GPT
from gptcore.passes import awq, calibrate, cluster, gptq, low_rank, prune, shrink
from gptcore.passes.base import Coverage, Pass, PassContext
from gptcore.passes.calibrate import text_hash
from gptcore.passes.cluster import Cluster
from gptcore.passes.drop_layers import DropLayers
from gptcore.passes.kv_cache import KVCacheBits
from gptcore.passes.low_rank import LowRank
from gptcore.passes.mixed_bits import MixedBits
from gptcore.passes.prune import Prune
from gptcore.passes.quantize import Int3, Int4, Int8, Int8Weights
from gptcore.passes.shrink import Shrink
from gptcore.passes.smooth import Int8Static
from gptcore.paths import models_dir
from gptcore.provenance import provenance
from gptcore.recipe import Recipe, Variant
from gptcore.spec import Precision
from gptcore.tokenizer import load_tokenizer

FULL_TOKENS = 32_768
KEPT_APART = FULL_TOKENS
"""Tokens that no pass is calibrated on, also where fewer are scored."""
UNIFORM_BITS = 4.5
"""Effective bits of 4-bit weights in groups of 64, which mixed bits are held to."""


@dataclass(frozen=True)
class Target:
    """A number of a line that must not be above a limit, or above a share of another line's."""

    what: str
    """A field of ``Line``."""
    at_most: float
    of: str = ""
    """Another line's name, whose same number ``at_most`` is multiplied with."""


@dataclass(frozen=True)
class Case:
    """A recipe, the precision underneath, and what is expected of it."""

    name: str
    passes: tuple[Pass, ...] = ()
    precision: Precision = "fp32"
    targets: tuple[Target, ...] = ()
    adopted: bool = False
    """Whether our own library computes it, as it does in the program; else torch."""


@dataclass
class Line:
    """What was measured of a case."""

    name: str
    recipe: str
    at: str
    commit: str | None
    tokens: int
    calibration_tokens: int
    """0 where the recipe needs no text."""
    base_perplexity: float
    perplexity_ratio: float
    """Times fp32's."""
    log_ratio_se: float
    """Standard error of the mean ln(perplexity ÷ fp32's), over windows."""
    kl: float
    """Mean over ``kl_tokens``, from fp32's predictions, in nats."""
    kl_tokens: int
    stored_ratio: float
    """Times fp32's bytes, embedding included."""
    resident_ratio: float
    converted_ratio: float | None
    """Stored bytes of what was converted, times its fp32 bytes."""
    effective_bits: float | None
    kv_ratio: float
    """Bytes of keys and values a token, times bf16's."""
    coverage_ratio: float | None
    seconds: float
    solver_s: float
    load: float
    """The machine's load average, which seconds of processor time suffer from a little."""
    windows: int = 0
    """How many windows were scored, evenly spread over the text's first tokens; 0: the first."""
    calibration_hash: str = ""
    """Of the token ids."""
    cpu: str = ""
    """On which the seconds were spent."""


def perplexity(limit: float, of: str = "") -> Target:
    """Return a target of perplexity."""
    return Target("perplexity_ratio", limit, of)


def stored(limit: float) -> Target:
    """Return a target of bytes in a file."""
    return Target("stored_ratio", limit)


SOLVED = Target("solver_s", 30.0)
"""What the solvers of all projections may take on a core."""
SPARSE_BITS = 17.0
"""Of a weight that is stored sparse: half of the weights in 32 bits, and a bit for each."""


def two_of_four(method: Any) -> Prune:
    """Return a pass that makes two of every four neighbours zero."""
    return Prune(method=method, pattern="2:4")


CASES = (
    Case("bf16", (), "bf16", (Target("kl", 0.005), stored(0.5))),
    Case("int8 dynamic", (Int8(),), targets=(perplexity(1.03), stored(0.27))),
    Case("int8, our library", (Int8(),), targets=(perplexity(1.03),), adopted=True),
    Case(
        "int8, our library, 8-bit activations",
        (Int8(activation_bits=8),),
        targets=(perplexity(1.03),),
        adopted=True,
    ),
    Case("int8 weights only", (Int8Weights(),), "bf16"),
    Case("int4 g64 round", (Int4(),), "bf16", (Target("converted_ratio", 0.18),)),
    Case(
        "int4 g64 GPTQ",
        (Int4(method="gptq"),),
        "bf16",
        (Target("kl", 0.7, "int4 g64 round"), Target("converted_ratio", 0.18), SOLVED),
    ),
    Case("int4 g64 AWQ", (Int4(method="awq"),), "bf16", (Target("converted_ratio", 0.18),)),
    Case("int4 g64 GPTQ, embedding", (Int4(method="gptq", embedding=True),), "bf16"),
    Case("3-bit g64 round", (Int3(),), "bf16", (Target("effective_bits", 3.5),)),
    Case(
        "3-bit g64 GPTQ",
        (Int3(method="gptq"),),
        "bf16",
        (perplexity(0.6, "3-bit g64 round"), Target("effective_bits", 3.5), SOLVED),
    ),
    Case("3-bit g64 AWQ", (Int3(method="awq"),), "bf16", (Target("effective_bits", 3.5),)),
    Case("50 % magnitude", (Prune(method="magnitude"),)),
    Case(
        "50 % Wanda",
        (Prune(method="wanda"),),
        targets=(
            perplexity(2.0),
            perplexity(0.5, "50 % magnitude"),
            Target("effective_bits", SPARSE_BITS),
        ),
    ),
    Case(
        "50 % SparseGPT",
        (Prune(),),
        targets=(
            perplexity(1.75),
            perplexity(0.5, "50 % magnitude"),
            Target("effective_bits", SPARSE_BITS),
            SOLVED,
        ),
    ),
    Case("2:4 magnitude", (two_of_four("magnitude"),)),
    Case("2:4 Wanda", (two_of_four("wanda"),)),
    Case("2:4 SparseGPT", (two_of_four("sparsegpt"),), targets=(perplexity(3.0), SOLVED)),
    Case("one layer dropped", (DropLayers(layers=1),)),
    Case("three layers dropped", (DropLayers(layers=3),), targets=(perplexity(1.45),)),
    Case("neurons to 90 %", (Shrink(),)),
    Case("head groups, two of three", (Shrink(neurons=1.0, groups=0.67),)),
    Case("SVD to 80 %, plain", (LowRank(method="plain", pivoted=False),)),
    Case(
        "SVD to 80 %, whitened",
        (LowRank(pivoted=False),),
        targets=(
            perplexity(2.6),
            perplexity(0.01, "SVD to 80 %, plain"),
            Target("converted_ratio", 0.8),
        ),
    ),
    Case(
        "SVD to 80 %, pivoted",
        (LowRank(),),
        targets=(
            perplexity(2.6),
            perplexity(0.01, "SVD to 80 %, plain"),
            Target("converted_ratio", 0.801),
        ),
    ),
    Case("SVD of all to 80 %", (LowRank(share=0.745),), targets=(perplexity(2.6), stored(0.8))),
    Case("16 clusters, even", (Cluster(weighted=False, compensated=False),)),
    Case(
        "16 clusters, weighted",
        (Cluster(compensated=False),),
        targets=(perplexity(1.4), stored(0.18)),
    ),
    Case("16 clusters, compensated", (Cluster(),), targets=(perplexity(1.4), stored(0.18))),
    Case("16 clusters a tensor", (Cluster(scope="tensor"),), targets=(stored(0.18),)),
    Case("int8 static, unsmoothed", (Int8Static(smoothing=0.0),)),
    Case(
        "int8 static, smoothed",
        (Int8Static(),),
        targets=(perplexity(1.30), perplexity(0.65, "int8 static, unsmoothed"), stored(0.27)),
    ),
    Case(
        "KV cache int8",
        (KVCacheBits(bits=8),),
        targets=(perplexity(1.005), Target("kv_ratio", 0.535)),
    ),
    Case(
        "KV cache int4",
        (KVCacheBits(bits=4),),
        targets=(perplexity(1.25), Target("kv_ratio", 0.285)),
    ),
    Case(
        "mixed bits, GPTQ",
        (MixedBits(effective_bits=UNIFORM_BITS, method="gptq"),),
        "bf16",
        (Target("kl", 1.0, "int4 g64 GPTQ"), Target("converted_ratio", UNIFORM_BITS / 32)),
    ),
)
"""All lines of the table; a target counts stored bytes of the whole, embedding included."""


def spread(read: Passage, count: int) -> Passage:
    """Return a passage of so many of its windows, evenly spread; of all where that is 0.

    Windows are read apart from one another, so that each gives what it gives in the whole.
    """
    every = read.windows
    if not count or count >= len(every):
        return read
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, count).round().astype(int)]
    at = np.concatenate([np.arange(one.begin, one.end) for one in chosen])
    return replace(read, ids=read.ids[at], sizes=read.sizes[at])


class Stopwatch:
    """Adds up the processor time of some functions while a ``with`` block lasts."""

    def __init__(self, *functions: tuple[Any, str]) -> None:
        self.seconds = 0.0
        self._functions = functions

    def __enter__(self) -> Stopwatch:
        self._kept = [getattr(owner, name) for owner, name in self._functions]
        for (owner, name), function in zip(self._functions, self._kept, strict=True):
            setattr(owner, name, self._timed(function))
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), function in zip(self._functions, self._kept, strict=True):
            setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - began

        return timed


def solvers() -> Stopwatch:
    """Return what times the solvers of all passes."""
    return Stopwatch(
        (calibrate, "inverse_factor"),
        (gptq.Inputs, "of"),
        (gptq, "solve"),
        (awq, "channel_scales"),
        (prune, "sparsegpt"),
        (prune, "kept"),
        (low_rank, "factors"),
        (cluster, "tables"),
        (cluster, "compensated"),
        (shrink, "cut_inputs"),
    )


class Bench:
    """The model on disk, the texts, and what fp32 says of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.checkpoint = Catalogue(models_dir()).checkpoint(options.model)
        self.spec = self.checkpoint.spec
        tokenizer = load_tokenizer(self.checkpoint.directory)
        text = evaluation_text(str(options.text), paths=True)
        windowing = Windowing(window=options.window, max_tokens=options.tokens)
        self.passage = spread(passage(text, tokenizer, windowing), options.windows)
        if options.calibration:
            source = tokenizer.encode(options.calibration.read_text(encoding="utf-8"))
        else:
            source = tokenizer.encode(text.content)[max(KEPT_APART, options.tokens) :]
        rows = min(options.calibration_tokens, len(source)) // options.window
        ids = torch.tensor(source[len(source) - rows * options.window :])
        self.calibration = ids.view(rows, options.window)
        self.text = f"{text.name} ({text.hash[:19]})"
        self.kl_windows = options.kl_tokens // options.window
        self.base_bytes = self.spec.weights_bytes("fp32")
        self._reference: list[Tensor] = []
        self._base_nll: list[float] = []
        exact = self.built("fp32")
        self.score(exact)
        self.base_perplexity = math.exp(sum(self._base_nll) / self.scored)

    @property
    def scope(self) -> str:
        """What is scored of the text's first tokens, in words."""
        count, most = len(self.passage.windows), -(-self.options.tokens // self.options.window)
        return "" if count == most else f"{count} windows spread over "

    @property
    def scored(self) -> int:
        """Tokens that are scored."""
        return sum(one.end - one.first for one in self.passage.windows)

    def built(self, precision: Precision) -> GPT:
        """Return the model as it is, in that precision."""
        return weights.build(
            self.checkpoint, Placement(precision=precision, threads=self.options.threads)
        )

    def score(self, model: GPT) -> tuple[list[float], float, int]:
        """Return the nats of each window, and the mean KL from fp32 over so many tokens.

        The first model that is scored is what the others are held against.
        """
        logits, first = model_logits(model), not self._base_nll
        costs, kl, compared = [], 0.0, 0
        for place, window in enumerate(self.passage.windows):
            nats, at = 0.0, window.first
            begin = self.passage.first_logits(window)
            for part, chunk in enumerate(logits(self.passage.model_ids(window), begin)):
                targets = torch.from_numpy(self.passage.ids[at : at + len(chunk)])
                nats += float(nll_of(chunk, targets, at).sum())
                at += len(chunk)
                if place >= self.kl_windows:
                    continue
                now = chunk.log_softmax(-1)
                if first:
                    self._reference.append(now)
                else:
                    left = self._reference[place * self._parts + part]
                    kl += float((left.exp() * (left - now)).sum(dtype=torch.float64))
                    compared += len(now)
            if first and not place:
                self._parts = part + 1
            costs.append(nats)
        if first:
            self._base_nll = costs
        return costs, kl / max(1, compared), compared

    def line(self, case: Case) -> Line:
        """Apply a case's passes and measure what came of it."""
        placement = Placement(precision=case.precision, threads=self.options.threads)
        context = PassContext(
            placement=placement,
            calibration_ids=self.calibration,
            calibration_hash=text_hash(self.calibration),
        )
        model = self.built(case.precision)
        began = time.process_time()
        with solvers() as stopwatch:
            for one in case.passes:
                model = one.apply(model, context)
        seconds = time.process_time() - began
        if case.adopted and isinstance(left := adopt(model), str):
            raise SystemExit(f"Our library does not compute {case.name}: {left}")
        costs, kl, compared = self.score(model)
        apart = [now - was for now, was in zip(costs, self._base_nll, strict=True)]
        mean, windows = sum(apart) / self.scored, len(apart)
        spread = sum((one - sum(apart) / windows) ** 2 for one in apart)
        coverage = merged(list(context.coverage.values()))
        variant = Variant(
            model=self.options.model,
            spec=self.spec,
            weights_id=self.checkpoint.weights_id,
            placement=placement,
            recipe=Recipe(passes=case.passes),
        )
        return Line(
            name=case.name,
            recipe=" → ".join(map(repr, case.passes)) or case.precision,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=provenance().git_commit,
            tokens=len(self.passage.ids),
            calibration_tokens=self.calibration.numel()
            if any(one.needs_calibration for one in case.passes)
            else 0,
            base_perplexity=self.base_perplexity,
            perplexity_ratio=math.exp(mean),
            log_ratio_se=math.sqrt(spread * windows / max(1, windows - 1)) / self.scored,
            kl=kl,
            kl_tokens=compared,
            stored_ratio=stored_bytes(model) / self.base_bytes,
            resident_ratio=weight_bytes(model)[0] / self.base_bytes,
            converted_ratio=None if coverage is None else converted_ratio(coverage),
            effective_bits=None if coverage is None else coverage.effective_bits,
            kv_ratio=variant.kv_bytes_per_token / self.spec.kv_bytes_per_token("bf16"),
            coverage_ratio=None if coverage is None else coverage.ratio,
            seconds=seconds,
            solver_s=stopwatch.seconds,
            load=os.getloadavg()[0],
            cpu=cpu_name(),
            windows=len(self.passage.windows) if self.scope else 0,
            calibration_hash=text_hash(self.calibration)
            if any(one.needs_calibration for one in case.passes)
            else "",
        )


def merged(found: list[Coverage]) -> Coverage | None:
    """Return the coverage of a recipe of one pass, None where it tells of no weights."""
    return found[0] if found and found[0].converted_weights else None


def converted_ratio(coverage: Coverage) -> float | None:
    """Return the stored bytes of what was converted, times those of its fp32 weights."""
    bits = coverage.effective_bits
    return None if bits is None else bits / 32


def verdict(target: Target, line: Line, known: dict[str, Line]) -> str:
    """Return a target and what was measured, in words."""
    measured = getattr(line, target.what)
    label = LABELS[target.what]
    limit, words = target.at_most, f"{label} ≤ {target.at_most:g}"
    if target.of:
        words += f" of {target.of}"
        if target.of not in known:
            return f"{words}: not measured"
        limit *= getattr(known[target.of], target.what)
        words += f" ({limit:.4g})"
    if measured is None:
        return f"{words}: not measured"
    met = "met" if measured <= limit * (1 + 1e-9) else "**missed**"
    return f"{words}: {measured:.4g}, {met}"


LABELS = {
    "perplexity_ratio": "perplexity ×",
    "kl": "KL",
    "stored_ratio": "stored ×",
    "converted_ratio": "its layers ×",
    "effective_bits": "bits a weight",
    "kv_ratio": "KV ×",
    "solver_s": "solvers s",
}


def markdown(head: str, lines: dict[str, Line]) -> str:
    """Return the table, lines in the order of ``CASES``, with what it takes to read it."""
    rows = [
        head,
        "",
        "| pass | × perplexity (± se of ln) | KL | × stored | × resident | its layers × | "
        "bits a weight | KV × | coverage | calibrated on | s | solvers s | on | target: measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        if (line := lines.get(case.name)) is None:
            continue
        few = "" if line.tokens == FULL_TOKENS else f", {line.tokens:,} tokens"
        few += " spread over all" if line.windows else ""
        cells = (
            case.name,
            f"{line.perplexity_ratio:.4f} (± {line.log_ratio_se:.4f}){few}",
            f"{line.kl:.5f}",
            f"{line.stored_ratio:.4f}",
            f"{line.resident_ratio:.4f}",
            "" if line.converted_ratio is None else f"{line.converted_ratio:.4f}",
            "" if line.effective_bits is None else f"{line.effective_bits:.2f}",
            f"{line.kv_ratio:.3f}",
            "" if line.coverage_ratio is None else f"{line.coverage_ratio:.3f}",
            calibrated_on(line),
            f"{line.seconds:.0f}",
            f"{line.solver_s:.1f}",
            line.cpu,
            "; ".join(verdict(one, line, lines) for one in case.targets),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def calibrated_on(line: Line) -> str:
    """Return how many tokens a line's passes saw, and which."""
    if not line.calibration_tokens:
        return ""
    which = f" ({line.calibration_hash[7:15]})" if line.calibration_hash else ""
    return f"{line.calibration_tokens:,}{which}"


def kept(file: Path) -> dict[str, Line]:
    """Return the lines that were measured before, by name."""
    if not file.exists():
        return {}
    lines = json.loads(file.read_text())["lines"]
    return {one["name"]: Line(**one) for one in lines}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True, help="scored from its beginning")
    parser.add_argument("--tokens", type=int, default=FULL_TOKENS, help="scored")
    parser.add_argument("--windows", type=int, default=0, help="scored of these (default: all)")
    parser.add_argument("--kl-tokens", type=int, default=4096)
    parser.add_argument("--calibration", type=Path, help="another file (default: the text's end)")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="words that a line's name has")
    parser.add_argument("--missing", action="store_true", help="leave out lines already measured")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    file = options.results / "passes.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = kept(file)
    bench = Bench(options)
    machine = provenance()
    head = (
        f"{options.model}, weights of {bench.checkpoint.source_precision}: perplexity of fp32 "
        f"{bench.base_perplexity:.3f} on {bench.scope}the first {options.tokens:,} tokens of "
        f"{bench.text};"
        f" calibration text of {bench.calibration.numel():,} tokens "
        f"({text_hash(bench.calibration)[:19]}). {options.threads} thread(s), "
        f"torch {machine.torch}."
    )
    print(head, flush=True)
    for case in CASES:
        if options.only and not any(word in case.name for word in options.only):
            continue
        before = lines.get(case.name)
        if options.missing and before is not None and before.tokens >= len(bench.passage.ids):
            continue
        line = bench.line(case)
        lines = kept(file) | {case.name: line}
        told = {"conditions": head, "lines": [asdict(one) for one in lines.values()]}
        file.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        table = markdown(head, lines)
        file.with_suffix(".md").write_text(table)
        print(table.splitlines()[-len(lines) :][list(ordered(lines)).index(case.name)], flush=True)
        gc.collect()
        trim_heap()
    if options.results == RESULTS and lines:
        into_readme("passes", markdown(head, lines))


def ordered(lines: dict[str, Line]) -> Iterator[str]:
    """Yield the names of measured lines in the order of the table."""
    return (case.name for case in CASES if case.name in lines)


if __name__ == "__main__":
    main()
