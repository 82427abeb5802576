"""What one generation cost, as a row of numbers, each with its formula one hover away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from gptcore.records import Numbers
from pages.parts import format as shown

DEFINITIONS = {
    "TTFT": "Time to first token: from sending the request to its first output token, waiting in "
    "the queue included.",
    "TPOT": "Time per output token: (end to end − time to first token) / (output tokens − 1).",
    "End to end": "From sending the request to its last token.",
    "Tokens": "Generated tokens; those that a branch began with are not counted.",
    "Prefill": "Prompt tokens / seconds of prefill.",
    "Decode": "(output tokens − 1) / (end to end − time to first token).",
    "Peak memory": "The largest resident set of the process that computed, watched at 100 Hz or "
    "more; on a GPU the largest allocation.",
    "MBU": "Memory bandwidth utilization: (weight bytes + cache bytes read per step) / TPOT, as a "
    "share of the bandwidth that was measured on this machine. None for a text that was written "
    "beside others: a step reads the weights for all of them.",
}


def numbers_row(numbers: Numbers | None) -> None:
    """Draw what a request cost, or so far costs; what is not known yet is a dash."""

    def known(name: str) -> float | None:
        return getattr(numbers, name, None)

    cells = {
        "TTFT": shown.duration(known("ttft_s")),
        "TPOT": shown.duration(known("tpot_s")),
        "End to end": shown.duration(known("e2e_s")),
        "Tokens": shown.whole(known("new_tokens")),
        "Prefill, tokens/s": shown.number(known("prefill_tokens_per_s")),
        "Decode, tokens/s": shown.number(known("decode_tokens_per_s")),
        "Peak memory": shown.size(known("peak_memory_bytes")),
        "MBU": shown.share(known("mbu_ratio")),
    }
    with st.grid("auto", min_column_width=120, gap="small"):
        for label, value in cells.items():
            help = DEFINITIONS[label.partition(",")[0]]
            if label == "MBU" and numbers and numbers.mbu_ratio:
                help += " " + worked_mbu(numbers)
            st.metric(label, value, help=help)


def worked_mbu(numbers: Numbers) -> str:
    """Return the formula with this request's numbers in it."""
    return (
        f"Here: {shown.size(numbers.mbu_bytes_per_step)} a step ÷ {shown.duration(numbers.tpot_s)} "
        f"÷ {shown.gigabytes(numbers.mbu_peak_bytes_per_s)}/s measured = "
        f"{shown.share(numbers.mbu_ratio)}."
    )


def how_in_words(how: Mapping[str, Any]) -> str:
    """Return what decoded a text, and what was left out on the way."""
    parts = [f"Decoded by {how['decoder']}"]
    if others := how.get("most_others"):
        texts = "one other text" if others == 1 else f"up to {shown.whole(others)} other texts"
        parts.append(f"side by side with {texts}")
    if reused := how.get("reused_tokens"):
        parts.append(f"{shown.whole(reused)} prompt tokens known from the text before")
    if guessed := how.get("guessed_tokens"):
        accepted = how.get("accepted_tokens", 0)
        parts.append(
            f"{shown.whole(accepted)} of {shown.whole(guessed)} tokens guessed ahead were right"
        )
    return " · ".join(parts)


def costs_in_words(numbers: Numbers) -> str:
    """Return the rest: prompt, waiting, loading, and how it ended."""
    parts = [
        f"{shown.whole(numbers.prompt_tokens)} prompt tokens",
        f"{shown.whole(numbers.new_tokens)} new tokens",
    ]
    if numbers.finish_reason:
        parts.append(f"ended by {numbers.finish_reason}")
    parts.append(f"waited {shown.duration(numbers.queue_s)}")
    if numbers.load_s:
        parts.append(f"loaded the model for {shown.duration(numbers.load_s)}")
    if numbers.cut_tokens:
        parts.append(f"{shown.whole(numbers.cut_tokens)} prompt tokens cut")
    return " · ".join(parts)
