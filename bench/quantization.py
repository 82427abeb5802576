"""What each way to quantize does to SmolLM2's predictions and size, in one table.

Perplexity is that of the first tokens of a text, in windows that do not overlap and without a
first-of-text token, through the cache; it is given as a multiple of our own fp32 model's. KL is the
mean over the text's first windows, from fp32's predictions. Sizes are what a file keeps, the
embedding included, over the bytes of the fp32 weights. The text that passes are calibrated on is
the end of the same file, or another one; never what is scored.

Every line is printed as soon as it is there; --only takes words that a line's name must hold.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from gptcore import weights
from gptcore.catalogue import Catalogue
from gptcore.device import Placement, cores, limit_spinning
from gptcore.linears import stored_bytes
from gptcore.measure.memory import trim_heap, weight_bytes
from gptcore.measure.perplexity import model_logits
from gptcore.model import GPT
from gptcore.passes.base import Pass, PassContext
from gptcore.passes.calibrate import text_hash
from gptcore.passes.kv_cache import KVCacheBits
from gptcore.passes.quantize import Int3, Int4, Int8, Int8Weights
from gptcore.passes.sensitivity import assign, scan
from gptcore.passes.smooth import Int8Static
from gptcore.paths import models_dir
from gptcore.spec import Precision
from gptcore.tokenizer import load_tokenizer

UNIFORM_BITS = 4.5
"""Effective bits of 4-bit weights in groups of 64."""


def lines() -> Iterator[tuple[str, Precision, tuple[Pass, ...]]]:
    """Yield name, precision underneath and passes of every line."""
    yield "bf16", "bf16", ()
    yield "int8 dynamic", "fp32", (Int8(),)
    yield "int8 static", "fp32", (Int8Static(smoothing=0.0),)
    yield "int8 static smoothed", "fp32", (Int8Static(),)
    yield "int8 weights", "bf16", (Int8Weights(),)
    for bits, kind in (("int4", Int4), ("int3", Int3)):
        yield f"{bits} g64 round", "bf16", (kind(),)
        yield f"{bits} g64 gptq", "bf16", (kind(method="gptq"),)
        yield f"{bits} g64 awq", "bf16", (kind(method="awq"),)
    yield "int4 g64 gptq with embedding", "bf16", (Int4(method="gptq", embedding=True),)
    yield "int4 g32 round", "bf16", (Int4(group=32),)
    yield "int4 g32 gptq", "bf16", (Int4(group=32, method="gptq"),)
    yield "kv cache int8", "fp32", (KVCacheBits(bits=8),)
    yield "kv cache int4", "fp32", (KVCacheBits(bits=4),)


class Bench:
    """The model on disk, the texts, and what fp32 says of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.checkpoint = Catalogue(models_dir()).checkpoint(options.model)
        tokenizer = load_tokenizer(self.checkpoint.directory)
        ids = torch.tensor(tokenizer.encode(Path(options.text).read_text()))
        window, wanted = options.window, options.calibration_tokens // options.window
        self.scored = ids[: options.tokens // window * window].view(-1, window)
        source = ids[len(self.scored) * window :]
        if options.calibration:
            source = torch.tensor(tokenizer.encode(Path(options.calibration).read_text()))
        wanted = min(wanted, len(source) // window)
        self.calibration = source[len(source) - wanted * window :].view(-1, window)
        self.threads = options.threads or cores()
        self.kl_windows = min(len(self.scored), options.kl_tokens // window)
        self.reference: list[Tensor] = []
        self.base_nll = 0.0
        self.base_bytes = self.checkpoint.spec.weights_bytes("fp32")

    def built(self, precision: Precision) -> GPT:
        """Return the model as it is, in that precision."""
        return weights.build(self.checkpoint, Placement(precision=precision, threads=self.threads))

    def applied(self, precision: Precision, passes: tuple[Pass, ...]) -> tuple[GPT, str]:
        """Return the model after some passes, and what they say of themselves."""
        model, said = self.built(precision), []
        context = PassContext(
            placement=Placement(precision=precision, threads=self.threads),
            calibration_ids=self.calibration,
            calibration_hash=text_hash(self.calibration),
        )
        for one in passes:
            model = one.apply(model, context)
            if found := context.coverage.get(one.name):
                bits = found.effective_bits
                said.append(f"coverage {found.ratio:.3f}, {bits:.3f} bits a weight")
                parts = (found.stored_bytes or 0) / (4 * found.converted_weights)
                said.append(f"linears and head {parts:.4f}×")
        return model.eval(), ", ".join(said)

    def score(self, model: GPT, *, reference: bool = False) -> tuple[float, float]:
        """Return the mean negative log-likelihood, and the mean KL from fp32, in nats."""
        logits, nll, kl = model_logits(model), 0.0, 0.0
        for place, row in enumerate(self.scored):
            chunks = [chunk.log_softmax(-1) for chunk in logits(row, 0)]
            after = torch.cat(chunks)  # (T, V)
            nll -= float(after[:-1].gather(1, row[1:, None]).double().sum())
            if place < self.kl_windows:
                if reference:
                    self.reference.append(after)
                else:
                    left = self.reference[place]
                    kl += float((left.exp() * (left - after)).double().sum())
        scored = self.scored.shape[0] * (self.scored.shape[1] - 1)
        return nll / scored, kl / max(1, self.kl_windows * self.scored.shape[1])

    def line(self, name: str, model: GPT, said: str, seconds: float) -> None:
        """Print what a model is worth."""
        began = time.monotonic()
        nll, kl = self.score(model)
        ratio = math.exp(nll - self.base_nll)
        stored, resident = stored_bytes(model), weight_bytes(model)[0]
        print(
            f"{name}: perplexity {ratio:.4f}×, KL {kl:.5f}, file {stored / self.base_bytes:.4f}×, "
            f"memory {resident / self.base_bytes:.4f}×; {said or 'no weights changed'}; applied in "
            f"{seconds:.0f} s, scored in {time.monotonic() - began:.0f} s",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True, help="scored from its beginning")
    parser.add_argument("--calibration", help="another text to calibrate with")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--kl-tokens", type=int, default=4096)
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--scan-tokens", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    limit_spinning()
    bench = Bench(options)
    torch.set_num_threads(bench.threads)
    torch.set_grad_enabled(False)
    print(
        f"{options.model}, weights from {bench.checkpoint.source_precision}; scored "
        f"{bench.scored.numel():,} tokens, calibrated on {bench.calibration.numel():,}",
        flush=True,
    )
    exact = bench.built("fp32")
    bench.base_nll, _ = bench.score(exact, reference=True)
    print(
        f"fp32: perplexity {math.exp(bench.base_nll):.3f}, {bench.base_bytes:,} bytes", flush=True
    )
    wanted = [
        one for one in lines() if not options.only or any(word in one[0] for word in options.only)
    ]
    for name, precision, passes in wanted:
        began = time.monotonic()
        model, said = bench.applied(precision, passes)
        bench.line(name, model, said, time.monotonic() - began)
        del model
        gc.collect()
        trim_heap()
    if not options.only or any("mixed" in word for word in options.only):
        began = time.monotonic()
        rows = max(1, options.scan_tokens // options.window)
        damages = scan(exact, bench.calibration[:rows])
        chosen = assign(damages, exact.spec, UNIFORM_BITS)
        print(f"scanned {len(damages)} in {time.monotonic() - began:.0f} s: {chosen!r}", flush=True)
        del exact
        for method in ("round", "gptq"):
            began = time.monotonic()
            one = chosen.model_copy(update={"method": method})
            model, said = bench.applied("bf16", (one,))
            bench.line(f"mixed {method}", model, said, time.monotonic() - began)
            del model
            gc.collect()


if __name__ == "__main__":
    main()
