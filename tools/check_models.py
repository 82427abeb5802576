"""The README's table of what was checked: ``python tools/check_models.py [--most GB]``.

Every model of the catalogue is asked to write 24 tokens in every precision on every device of this
machine, through the same Lab as the pages. Prints Markdown: a check mark where it wrote, what it
needs where it does not fit, "not possible" where a pass cannot run. Larger models than ``--most``
are checked for fitting only, and say so.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptcore.errors import GptcoreError
from gptcore.lab import Lab
from gptcore.records import Request, RunState

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
REQUEST = Request(prompt="Once upon a time", seed=1, max_new_tokens=24, ignore_eos=True)


def cell(lab: Lab, model: str, precision: str, device: str, most_bytes: float) -> str:
    """Return what happened with one model in one precision."""
    try:
        variant = lab.variant(model, precision, device)
        for one in variant.recipe.passes:
            if one.blocked_by(variant.spec, variant.placement):
                return "not possible"
        fit = lab.fit(variant, 512)
        if not fit.fits:
            return f"needs {fit.needed_bytes / 1e9:.0f} GB"
        if fit.needed_bytes > most_bytes:
            return "fits, not run"
        ended = lab.wait(lab.generate(variant, REQUEST)).run
    except GptcoreError as error:
        return f"refused: {error}"
    finally:
        lab.unload(device)
    if ended.state is not RunState.DONE or ended.numbers is None:
        return f"failed: {ended.error}"
    return "✓" if ended.numbers.new_tokens == REQUEST.max_new_tokens else "wrote too little"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--most", type=float, default=8.0, help="largest model to run, in GB")
    options = parser.parse_args()
    with Lab.open(monitor=False) as lab:
        machine = lab.machine()
        print(
            f"{datetime.now(UTC):%Y-%m-%d}, {machine.cpu}, torch {machine.torch}, Python "
            f"{machine.python}. One stream, 24 new tokens."
        )
        for device in lab.devices():
            if device.absent:
                print(f"\n`{device.id}`: not on this machine ({device.absent.rstrip('.')}).")
                continue
            print(
                f"\n| `{device.id}` | {' | '.join(PRECISIONS)} |\n|---|{'---|' * len(PRECISIONS)}"
            )
            for entry in lab.models():
                row = [
                    cell(lab, entry.name, one, device.id, options.most * 1e9) for one in PRECISIONS
                ]
                print(f"| {entry.name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
