"""The trainer's reference points: tiny Shakespeare by character, in fp32 and in bf16.

    python -m bench.reference --text FILE [--minutes 5] [--threads 2] [--pair-steps 150]

The first training is fp32's, which may take no longer than the minutes. Then fp32 and bf16 learn
the same sequences from the same first weights, for fewer steps: on a processor without bf16
instructions bf16 takes ten times as long. All run one after the other, in processes of their own,
by the command line that a person would use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.results import keep
from gptcore.device import cpu_name
from gptcore.train.events import Stepped, Validated, read_log

SETTINGS = {
    "layers": 4,
    "width": 128,
    "heads": 4,
    "context": 64,
    "batch": 16,
    "learning-rate": 4e-3,
    "validation-windows": 0,
}
STEPS, VALIDATIONS, MOST_WARMUP = 1200, 6, 100
PROMISED_LOSS, PROMISED_MINUTES, PROMISED_GAP = 1.90, 5.0, 0.01


def trained(
    text: Path, precision: str, steps: int, minutes: float | None, threads: int, folder: Path
) -> dict[str, Any]:
    """Train in a process of its own, and return what came of it."""
    command = [sys.executable, "-m", "gptcore", "train", "--json", "--wait", "--text", str(text)]
    command += ["--to", str(folder), "--precision", precision, "--threads", str(threads)]
    command += [] if minutes is None else ["--minutes", str(minutes)]
    command += ["--steps", str(steps), "--validate-every", str(max(1, steps // VALIDATIONS))]
    command += ["--warmup", str(min(MOST_WARMUP, steps // 4))]
    for name, value in SETTINGS.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    outcome, events = json.loads(done.stdout), read_log(folder)
    taken = [one for one in events if isinstance(one, Stepped)]
    return {
        "precision": precision,
        "steps": outcome["steps"],
        "ended": outcome["ended"],
        "seconds": outcome["seconds"],
        "best_loss": outcome["best_loss"],
        "bits_per_byte": outcome["best_bits_per_byte"],
        "tokens_per_s": median(one.tokens_per_s for one in taken),
        "mfu_ratio": taken[-1].mfu_ratio,
        "parameters": outcome["parameters"],
        "curve": [(one.step, one.loss) for one in events if isinstance(one, Validated)],
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the table, and the validation losses as they fell."""
    whole, *pair = result["rows"]
    fp32, bf16 = pair
    gap = bf16["best_loss"] / fp32["best_loss"] - 1
    lines = [
        f"{result['at'][:16]} UTC, {result['cpu']}, {result['threads']} threads, load "
        f"{result['load'][0]:.1f} before and {result['load'][1]:.1f} after. "
        f"{whole['parameters']:,} parameters, a batch of {SETTINGS['batch']} × "
        f"{SETTINGS['context']} characters.",
        "",
        "| precision | steps | seconds | validation loss | bits per byte | tokens/s | MFU |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {one['precision']} | {one['steps']:,} | {one['seconds']:.0f} | {one['best_loss']:.4f} "
        f"| {one['bits_per_byte']:.4f} | {one['tokens_per_s']:,.0f} | "
        + ("" if one["mfu_ratio"] is None else f"{one['mfu_ratio']:.0%}")
        + " |"
        for one in result["rows"]
    ]
    lines += [
        "",
        f"Promised: a loss of at most {PROMISED_LOSS} within {PROMISED_MINUTES:.0f} minutes, "
        f"{_kept(whole['best_loss'] <= PROMISED_LOSS)}; bf16 within {PROMISED_GAP:.0%} of fp32, "
        f"{_kept(abs(gap) <= PROMISED_GAP)}: it is {gap:+.2%} from it, at "
        f"{bf16['tokens_per_s'] / fp32['tokens_per_s']:.2f} times its speed.",
        "",
    ]
    for rows in ([whole], pair):
        lines += [
            "| validation loss at step | "
            + " | ".join(f"{at:,}" for at, _ in rows[0]["curve"])
            + " |",
            "| --- |" + " --- |" * len(rows[0]["curve"]),
        ]
        lines += [
            f"| {one['precision']} | "
            + " | ".join(f"{loss:.3f}" for _, loss in one["curve"])
            + " |"
            for one in rows
        ]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _kept(met: bool) -> str:
    return "met" if met else "**missed**"


def main() -> None:
    """Train both, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=PROMISED_MINUTES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pair-steps", type=int, default=150)
    parser.add_argument("--dry", action="store_true", help="print, and write no file")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            trained(options.text, one, steps, minutes, options.threads, Path(folder) / str(at))
            for at, (one, steps, minutes) in enumerate(
                (
                    ("fp32", STEPS, options.minutes),
                    ("fp32", options.pair_steps, None),
                    ("bf16", options.pair_steps, None),
                )
            )
        ]
    result = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": options.threads,
        "load": (before, os.getloadavg()[0]),
        "settings": SETTINGS,
        "rows": rows,
    }
    text = markdown(result)
    print(text)
    if not options.dry:
        keep("reference", result, text)


if __name__ == "__main__":
    main()
