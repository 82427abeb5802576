"""What pruning, low rank, clustering and smaller shapes do to perplexity and size.

    python bench/passes.py --text FILE [--only prune,low_rank] [--out TABLE.md]

Every line is one recipe on the installed SmolLM2, whose weights are those of a 4-bit file: what
changes weights further is held against a model that was rounded before. Perplexity is that of the
text's first tokens, in windows of 512 without overlap and without a first-of-text token, as a
multiple of the unchanged model's in fp32. The calibration text is the file's end, apart from what
is scored, or a file of its own. Sizes are stored bytes against fp32, the embedding included.
Seconds are those of one core's work where one thread is used: all of the pass, and of it what the
solvers take, calibration's forward passes apart.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gptcore.passes.base import Pass
from gptcore.passes.cluster import Cluster
from gptcore.passes.drop_layers import DropLayers
from gptcore.passes.low_rank import LowRank
from gptcore.passes.prune import Prune
from gptcore.passes.shrink import Shrink

WINDOW = 512


@dataclass(frozen=True, slots=True)
class Case:
    """A recipe of one pass, and what is expected of it."""

    one: Pass
    at_most: float | None = None
    """Times the unchanged perplexity."""
    size_at_most: float | None = None
    """Times the unchanged stored bytes."""


def two_of_four(method: str) -> Prune:
    """Return a pass that makes two of every four neighbours zero."""
    return Prune(method=method, pattern="2:4")  # type: ignore[arg-type]


CASES = (
    Case(Prune(method="magnitude")),
    Case(Prune(method="wanda"), 2.0),
    Case(Prune(method="sparsegpt"), 1.75),
    Case(two_of_four("magnitude")),
    Case(two_of_four("wanda")),
    Case(two_of_four("sparsegpt"), 3.0),
    Case(DropLayers(layers=1)),
    Case(DropLayers(layers=3), 1.45),
    Case(Shrink(neurons=0.9)),
    Case(Shrink(neurons=1.0, groups=0.67)),
    Case(LowRank(method="plain", pivoted=False)),
    Case(LowRank(pivoted=False), 2.6),
    Case(LowRank(), 2.6),
    Case(Cluster(weighted=False, compensated=False)),
    Case(Cluster(compensated=False), 1.4, 0.18),
    Case(Cluster(), 1.4, 0.18),
    Case(Cluster(scope="tensor"), None, 0.18),
)


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True, help="what is scored")
    parser.add_argument("--tokens", type=int, default=32_768, help="its first tokens")
    parser.add_argument("--calibration", type=Path, help="another file (default: the text's rest)")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--only", default="", help="names of passes, with commas between")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the table there too")
    options = parser.parse_args()

    from gptcore.device import limit_spinning

    limit_spinning()
    import torch

    from gptcore import weights
    from gptcore.catalogue import Catalogue
    from gptcore.device import Placement
    from gptcore.linears import stored_bytes
    from gptcore.measure.corpora import evaluation_text
    from gptcore.measure.memory import weight_bytes
    from gptcore.measure.perplexity import Windowing, model_logits, passage, score, summary
    from gptcore.passes import calibrate, cluster, low_rank, prune, shrink
    from gptcore.passes.base import PassContext
    from gptcore.passes.calibrate import text_hash
    from gptcore.paths import models_dir
    from gptcore.tokenizer import load_tokenizer

    placement = Placement(threads=options.threads)
    torch.set_num_threads(placement.resolved_threads)
    checkpoint = Catalogue(models_dir()).checkpoint(options.model)
    tokenizer = load_tokenizer(checkpoint.directory)
    text = evaluation_text(str(options.text), paths=True)
    scored = passage(text, tokenizer, Windowing(window=WINDOW, max_tokens=options.tokens))
    if options.calibration:
        rest = tokenizer.encode(options.calibration.read_text(encoding="utf-8"))
    else:
        rest = tokenizer.encode(text.content)[options.tokens :]
    rows = min(options.calibration_tokens, len(rest)) // WINDOW
    ids = torch.tensor(rest[: rows * WINDOW]).view(rows, WINDOW)

    def perplexity(model: Any) -> float:
        return summary(scored, list(score(scored, model_logits(model)))).nll_mean

    exact = weights.build(checkpoint, placement)
    base, size = perplexity(exact), weight_bytes(exact)[0]
    del exact
    lines = [
        f"{options.model}, weights of {checkpoint.source_precision}: perplexity "
        f"{math.exp(base):.3f} "
        f"on {len(scored.ids):,} tokens of {text.name} ({text.hash[:19]}); calibrated on "
        f"{ids.numel():,} tokens ({text_hash(ids)[:19]}); torch {torch.__version__}, "
        f"{placement.resolved_threads} thread(s).",
        "",
        "| pass | × perplexity | at most | × stored | at most | × resident | bits a weight | "
        "coverage | s | solvers s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for case in CASES:
        if options.only and case.one.name not in options.only.split(","):
            continue
        model = weights.build(checkpoint, placement)
        context = PassContext(placement=placement, calibration_ids=ids)
        began = time.process_time()
        with Stopwatch(
            (calibrate, "inverse_factor"),
            (prune, "sparsegpt"),
            (prune, "kept"),
            (low_rank, "factors"),
            (cluster, "tables"),
            (cluster, "compensated"),
            (shrink, "cut_inputs"),
        ) as solvers:
            model = case.one.apply(model, context)
        seconds = time.process_time() - began
        coverage = context.coverage[case.one.name]
        cells = (
            f"`{case.one}`",
            f"{math.exp(perplexity(model) - base):.3f}",
            "" if case.at_most is None else f"{case.at_most}",
            f"{stored_bytes(model) / size:.4f}",
            "" if case.size_at_most is None else f"{case.size_at_most}",
            f"{weight_bytes(model)[0] / size:.4f}",
            f"{coverage.effective_bits or 0:.2f}",
            f"{coverage.ratio:.3f}",
            f"{seconds:.0f}",
            f"{solvers.seconds:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        del model
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
