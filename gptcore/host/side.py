"""One side of a comparison in a process of its own, by any commit of this program.

It is run by path with another commit's ``gptcore`` in front of the others, so what it imports is
what that commit has. It answers each line of JSON with one: first what the variant weighs, then
the times of a block. Between two orders it waits for input and works not at all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any


def main() -> None:
    """Answer orders until there are none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    from gptcore.catalogue import open_catalogue
    from gptcore.errors import GptcoreError
    from gptcore.host.worker import Watcher, Worker
    from gptcore.measure.timing import Cell, once
    from gptcore.recipe import Variant

    model: Any = None

    def load(order: dict[str, Any]) -> dict[str, Any]:
        nonlocal model
        variant = Variant.model_validate(order["variant"])
        loaded = Worker(order["device"], open_catalogue()).load(variant, Watcher())
        model = loaded.engine.model
        return {
            "load_s": loaded.load_s,
            "resident_bytes": loaded.resident_bytes,
            "step_bytes": loaded.step_bytes,
        }

    def block(order: dict[str, Any]) -> dict[str, Any]:
        cell = Cell.model_validate(order["cell"])
        times: list[dict[str, float]] = []
        began = time.perf_counter()
        while not times or time.perf_counter() - began < order["block_s"]:
            done = once(model, cell, seed=order["seed"], delay_ratio=order["delay_ratio"])
            times.append(asdict(done))
        return {"times": times}

    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = load(order) if "variant" in order else block(order)
        except (GptcoreError, ValueError, MemoryError, RuntimeError) as error:
            answer = {"problem": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
