"""Values to keep: a run, its numbers, a stream of tokens, a provenance."""

from datetime import UTC, datetime, timedelta
from typing import Any

from gptcore.records import (
    Alternative,
    Numbers,
    Provenance,
    Run,
    RunKind,
    RunState,
    Token,
    new_id,
)

START = datetime(2026, 3, 1, 12, 0, 0, 123457, tzinfo=UTC)
T0 = START.timestamp()


def run(**changes: Any) -> Run:
    """Return a queued generation."""
    fields: dict[str, Any] = {
        "id": new_id(),
        "kind": RunKind.GENERATE,
        "state": RunState.QUEUED,
        "created_at": START,
        "model": "tiny",
        "precision": "int8",
        "device": "cpu",
        "variant_hash": "0123456789abcdef",
        "settings": {"prompt": "Once upon a time", "seed": 2**63 - 1, "stop": ["\n"]},
        "owner": "77:1.5",
    }
    return Run(**fields | changes)


def numbers(**changes: Any) -> Numbers:
    """Return what a generation cost."""
    fields: dict[str, Any] = {
        "prompt_tokens": 4,
        "new_tokens": 30,
        "finish_reason": "eos",
        "queue_s": 0.25,
        "load_s": 0.0,
        "ttft_s": 0.1,
        "tpot_s": 0.01,
        "e2e_s": 0.4,
        "prefill_tokens_per_s": 40.0,
        "decode_tokens_per_s": 100.0,
        "peak_memory_bytes": 3 * 2**40,
        "mbu_ratio": 0.37,
        "mbu_bytes_per_step": 2**33,
        "mbu_peak_bytes_per_s": 7.5e10,
        "cut_tokens": 2,
    }
    return Numbers(**fields | changes)


def ended(after_s: float, state: RunState = RunState.DONE, **changes: Any) -> Run:
    """Return a generation that ended ``after_s`` seconds after ``START``."""
    at = START + timedelta(seconds=after_s)
    return run(state=state, started_at=START, ended_at=at, **changes)


def tokens(count: int = 40) -> tuple[Token, ...]:
    """Return a stream whose texts and numbers are all hard to keep."""
    texts = ["", "\x00", "\ud800", "é", "🦊", "\\", '"', "a\nb", " the"]
    return tuple(
        Token(
            index=i,
            id=i * 37 % 50257,
            text=texts[i % len(texts)],
            logprob=float("-inf") if i == 3 else -0.1 * i / 3,
            probability=1 / (i + 1),
            seconds=0.1 + i / 7,
            forced=i < 2,
            alternatives=tuple(
                Alternative(k, texts[(i + k) % len(texts)], (0.1 * k,) * 6) for k in range(i % 4)
            ),
        )
        for i in range(count)
    )


def provenance(**changes: Any) -> Provenance:
    """Return what made a number, with some of it unknown."""
    fields: dict[str, Any] = {
        "app_version": "0.1",
        "git_commit": None,
        "python": "3.11.2",
        "torch": "2.13",
        "platform": "Linux",
        "cpu": "A processor",
        "gpu": None,
        "cores": 2,
        "memory_bytes": 3 * 2**40,
        "weights_hash": "sha256:00",
        "threads": 1,
        "power": "governor performance",
    }
    return Provenance(**fields | changes)
