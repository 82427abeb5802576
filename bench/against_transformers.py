"""Load, prefill and decode beside ``transformers``, in turns.

Both sides run the same fp32 weights of the installed SmolLM2, with the same threads, in turns
A B B A, so that a drift of the machine meets both. What stands in each line: the median of each
side, the ratio of the medians (above 1: ours is faster), and the least and the greatest of each.
Loads run in fresh processes and include importing what they need, from the safetensors that our
first load made of the GGUF; that one is timed apart. It needs ``requirements-test.txt``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LOADS = {
    "ours": """
from gptcore.catalogue import Catalogue
from gptcore.device import Placement
from gptcore.paths import models_dir
from gptcore import weights
weights.build(Catalogue(models_dir()).checkpoint("smollm2-135m"), Placement())
""",
    "transformers": """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
""",
}


def load_seconds(code: str, *arguments: str) -> float:
    """Return how long a fresh process takes to load."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, capture_output=True
    )
    return time.perf_counter() - began


def in_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call both sides A B B A … and return what each measured; the first pair is dropped."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds + 1):
        for name in names if turn % 2 == 0 else names[::-1]:
            value = sides[name]()
            if turn:
                found[name].append(value)
    return found


def report(what: str, seconds: dict[str, list[float]], amount: float = 0.0) -> None:
    """Print one line: medians, spread, and the ratio."""
    (ours, mine), (theirs, other) = seconds.items()
    cells = []
    for name, values in ((ours, mine), (theirs, other)):
        shown = [
            amount / v if amount else v
            for v in (min(values), statistics.median(values), max(values))
        ]
        unit = "tokens/s" if amount else "s"
        cells.append(f"{name} {shown[1]:.3g} {unit} ({min(shown):.3g} to {max(shown):.3g})")
    ratio = statistics.median(other) / statistics.median(mine)
    print(f"{what}: {'; '.join(cells)}; ratio {ratio:.2f}; n = {len(mine)}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()

    from gptcore.catalogue import Catalogue
    from gptcore.device import limit_spinning
    from gptcore.paths import models_dir

    limit_spinning()
    gguf = next((models_dir() / "smollm2-135m").glob("*.gguf"))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(gguf.parent, Path(folder) / "models" / "smollm2-135m")
        before = os.environ.get("GPTLAB_DATA")
        os.environ["GPTLAB_DATA"] = folder
        print(f"first load with conversion: ours {load_seconds(LOADS['ours']):.2f} s", flush=True)
        os.environ.pop("GPTLAB_DATA")
        if before is not None:
            os.environ["GPTLAB_DATA"] = before
    checkpoint = Catalogue(models_dir()).checkpoint("smollm2-135m")
    sides = {
        "ours": lambda: load_seconds(LOADS["ours"]),
        "transformers": lambda: load_seconds(LOADS["transformers"], str(checkpoint.directory)),
    }
    report("load in a fresh process", in_turns(sides, max(2, options.rounds // 3)))

    import torch
    from transformers import AutoModelForCausalLM

    from gptcore import weights
    from gptcore.device import Placement
    from gptcore.engine import decode, prefill

    placement = Placement(threads=options.threads)
    torch.set_num_threads(placement.resolved_threads)
    ours = weights.build(checkpoint, placement)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype="float32").eval()
    ids = torch.randint(0, 40_000, (1, 512), generator=torch.Generator().manual_seed(1))
    prompt = tuple(ids[0].tolist())

    def our_prefill() -> float:
        cache = ours.new_cache(1024)
        began = time.perf_counter()
        prefill(ours, prompt, cache)
        return time.perf_counter() - began

    def their_prefill() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            theirs(ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began

    def our_decode() -> float:
        cache = ours.new_cache(1024)
        token = int(prefill(ours, prompt[:64], cache).argmax())
        began = time.perf_counter()
        for _ in range(32):
            token = int(decode(ours, token, cache).argmax())
        return time.perf_counter() - began

    def their_decode() -> float:
        with torch.inference_mode():
            out = theirs(ids[:, :64], use_cache=True, logits_to_keep=1)
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            began = time.perf_counter()
            for _ in range(32):
                out = theirs(token, past_key_values=cache, use_cache=True)
                token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            return time.perf_counter() - began

    report(
        "prefill, 512 tokens",
        in_turns({"ours": our_prefill, "transformers": their_prefill}, options.rounds),
        512,
    )
    report(
        "decode, 32 tokens after 64",
        in_turns({"ours": our_decode, "transformers": their_decode}, options.rounds),
        32,
    )
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
