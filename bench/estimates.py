"""What the Optimize page says before a recipe starts, beside what the recipe then takes.

    python -m bench.estimates [--model smollm2-135m] [--only int8] [--threads 1]

Bytes are told by arithmetic, seconds and peak memory (beyond what the process held before) by
trying the passes on a few blocks; both as the page does it. Then the recipe is made of the whole
model. Each recipe has a process of its own, so that one's memory is not another's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import psutil

from bench.results import RESULTS, keep
from gptcore.catalogue import Catalogue
from gptcore.device import cores, cpu_name
from gptcore.host.worker import Watcher, Worker
from gptcore.optimize.estimate import Estimate, predicted
from gptcore.paths import models_dir
from gptcore.recipe import Variant, place, recipe_from_text
from gptcore.records import Run, RunState, new_id, now

RECIPES = (
    "int8",
    "int8_weights",
    "int4(group=64)",
    "int4(group=64,method=gptq)",
    "int4(group=64,method=awq)",
    "int3(group=64,method=gptq)",
    "prune(sparsity=0.5,method=wanda)",
    "prune(sparsity=0.5,method=sparsegpt)",
    "drop_layers(layers=3)",
    "shrink(neurons=0.8)",
    "low_rank(share=0.8)",
    "cluster",
    "int8_static",
)
PROMISED = 0.3
"""How far what is said before may be from what is taken then."""


def measured(model: str, recipe: str, threads: int) -> dict[str, Any]:
    """Return what was said of a recipe and what it took, in this process."""
    from gptcore.linears import stored_bytes

    catalogue = Catalogue(models_dir())
    spec, weights_id = catalogue.identity(model)
    for precision in ("fp32", "bf16"):
        placement, chosen = place(precision, "cpu", threads, recipe_from_text(recipe))
        variant = Variant(
            model=model, spec=spec, weights_id=weights_id, placement=placement, recipe=chosen
        )
        if variant.blocked_by is None:
            break
    said = predicted(variant)
    worker = Worker("cpu", catalogue)
    run = Run(id=new_id(), kind=Estimate.kind, state=RunState.RUNNING, created_at=now())
    tried = worker.perform(run, Estimate(variant=variant), Watcher())
    assert tried.result is not None, tried.error
    before = psutil.Process().memory_info().rss
    loaded = worker.load(variant, Watcher())
    peak = loaded.passes_peak_bytes
    return {
        "recipe": recipe,
        "load": os.getloadavg()[0],
        "seconds": {"said": tried.result["seconds"], "taken": sum(loaded.passes_s.values())},
        "resident_bytes": {"said": said.weights_bytes_after, "taken": loaded.resident_bytes},
        "peak_bytes": {
            "said": tried.result["peak_bytes"],
            "taken": peak - before if peak else None,
        },
        "stored_bytes": stored_bytes(loaded.engine.model),
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a table."""
    lines = [
        f"{result['at'][:16]} UTC, {result['cpu']}, {result['threads']} threads, load "
        f"{min(one['load'] for one in result['lines']):.1f} to "
        f"{max(one['load'] for one in result['lines']):.1f}; {result['model']}, fp32 (or bf16, "
        f"where a pass needs it) before the recipe. Promised: within {PROMISED:.0%}.",
        "",
        "| recipe | seconds said | taken | ÷ | MB after | taken | ÷ | peak MB | taken | ÷ |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in result["lines"]:
        cells = [f"`{one['recipe']}`"]
        for name, scale, form in (
            ("seconds", 1.0, ".1f"),
            ("resident_bytes", 1e6, ".0f"),
            ("peak_bytes", 1e6, ".0f"),
        ):
            said, taken = one[name]["said"], one[name]["taken"]
            known = said is not None and taken
            cells += ["" if value is None else f"{value / scale:{form}}" for value in (said, taken)]
            cells.append(f"{said / taken:.2f}" if known else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def known() -> list[dict[str, Any]]:
    """Return the lines that are kept."""
    file = RESULTS / "estimates.json"
    return json.loads(file.read_text())["lines"] if file.exists() else []


def main() -> None:
    """Measure every recipe, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--only", help="recipes that begin so; the others' lines are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print, and write no file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.model, options.child, options.threads)))
        return
    lines = []
    for recipe in RECIPES:
        if options.only and not recipe.startswith(options.only):
            lines += [one for one in known() if one["recipe"] == recipe]
            continue
        command = [sys.executable, "-m", "bench.estimates", "--child", recipe]
        command += ["--model", options.model, "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{recipe}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        lines.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(lines[-1]), flush=True)
    result = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": options.threads,
        "model": options.model,
        "lines": lines,
    }
    text = markdown(result)
    print(text)
    if not options.dry:
        keep("estimates", result, text)


if __name__ == "__main__":
    main()
