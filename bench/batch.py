"""Several texts side by side: tokens/s over their number, and waiting under a load that arrives.

**Streams.** From one to 32 texts are written by the batch that the host runs: the common step, the
draws, the text of every token. Each has a prompt of its own, of its own length; the seconds are
those of so many steps after all prompts were read. The numbers of texts take turns, in an order
drawn anew each round, and the ratio to one text is that of neighbouring rounds with a 95 %
interval. The tokens of every text must be those that it writes alone.

**Load.** Requests arrive at moments drawn beforehand (Poisson), whether or not the ones before are
done. The same arrivals are served twice: side by side, and one after the other, as a queue would.
The time to the first token counts from the moment of arrival. The rate is given as the share of
what one after the other could serve at most: above 1 a queue grows for as long as the load lasts.

The result is printed, and written to bench/results/ and into bench/README.md.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.decode import SMOLLM2
from bench.results import conditions, keep
from bench.sides import ROOT, Ours, pin
from gptcore.measure.statistics import compare
from gptcore.records import Request

if TYPE_CHECKING:
    from gptcore.batching import Batch
    from gptcore.engine import Engine, Generation

STREAMS = (1, 2, 4, 8, 16, 32)
PROMPT_CHARS = (100, 400)
"""Characters of the shortest and of the longest prompt; about four a token."""
BUDGET_BYTES = 2**32
WANTED_RATIO = 3.0
"""Eight streams against one."""


@dataclass(frozen=True, slots=True)
class Served:
    """One request under load, in seconds since it arrived."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


def requests(count: int, new_tokens: int, seed: int = 0) -> list[Request]:
    """Return requests with prompts out of the text that ships."""
    text = (ROOT / "data" / "texts" / "evaluation.txt").read_text()
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        length = draw.randrange(*PROMPT_CHARS)
        start = draw.randrange(len(text) - length)
        prompt = text[start : start + length].strip()
        found.append(
            Request(
                prompt=prompt,
                temperature=0,
                max_new_tokens=new_tokens,
                ignore_eos=True,
                alternatives=0,
            )
        )
    return found


def engine_of(precision: str, threads: int) -> Engine:
    """Return SmolLM2's engine with its own tokenizer."""
    from gptcore.catalogue import Catalogue
    from gptcore.engine import Engine
    from gptcore.paths import models_dir
    from gptcore.tokenizer import load_tokenizer

    directory = Catalogue(models_dir()).checkpoint(SMOLLM2).directory
    return Engine(Ours(SMOLLM2, precision, threads).engine.model, load_tokenizer(directory))


def batch_of(engine: Engine) -> Batch:
    """Return an empty batch."""
    from gptcore.batching import Batch

    return Batch(engine, budget_bytes=BUDGET_BYTES)


def stepped(
    engine: Engine, asked: Sequence[Request], tokens: int
) -> tuple[float, float, list[list[int]]]:
    """Return seconds and CPU seconds of so many steps with all texts, and the tokens of each."""
    batch = batch_of(engine)
    batch.least_reading_s = float("inf")  # a prompt a step, so that none has to write for long
    texts = [engine.start(one) for one in asked]
    for one in texts:
        batch.add(one)
    while any(one.new_tokens == 0 for one in texts):
        list(batch.step())
    began, worked = time.perf_counter(), time.process_time()
    for _ in range(tokens):
        list(batch.step())
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    assert len(batch) == len(texts), "a text ended before it was timed"
    batch.close()
    return seconds, cpu_seconds, [one.token_ids for one in texts]


def streams(
    engine: Engine, sizes: Sequence[int], rounds: int, tokens: int
) -> dict[int, dict[str, Any]]:
    """Return what each number of texts gave."""
    asked = requests(max(sizes), max(sizes) + tokens + 2)
    alone = [
        list(engine.start(one.model_copy(update={"max_new_tokens": 2 * tokens}))) for one in asked
    ]
    wanted = [[token.id for token in one] for one in alone]
    taken: dict[int, list[tuple[float, float]]] = {one: [] for one in sizes}
    same = dict.fromkeys(sizes, True)
    draw = random.Random(0)
    for turn in range(rounds + 1):
        for size in draw.sample(list(sizes), len(sizes)):
            seconds, cpu_seconds, found = stepped(engine, asked[:size], tokens)
            for mine, whole in zip(found, wanted, strict=False):
                shared = min(len(mine), len(whole))
                same[size] &= mine[:shared] == whole[:shared]
            if turn:  # the first round warms up
                taken[size].append((seconds / (size * tokens), cpu_seconds / (size * tokens)))
    result = {}
    for size in sizes:
        per_token, cpu_per_token = np.array(taken[size]).T
        one, cpu_one = np.array(taken[1]).T
        found = compare(per_token.tolist(), one.tolist())
        result[size] = {
            "tokens_per_s": (1 / per_token).tolist(),
            "tokens_per_cpu_s": (1 / cpu_per_token).tolist(),
            "ratio": found.ratio if size > 1 else 1.0,
            "low": found.low if size > 1 else 1.0,
            "high": found.high if size > 1 else 1.0,
            "cpu_ratio": float(np.median(cpu_one) / np.median(cpu_per_token)),
            "same_tokens": same[size],
        }
    return result


def served(
    engine: Engine, asked: Sequence[Request], arrivals: Sequence[float], together: bool
) -> tuple[list[Served], float]:
    """Serve requests as they arrive; return what each waited for, and the seconds of all."""
    batch = batch_of(engine)
    began = engine.clock()
    coming = deque(zip(asked, (began + at for at in arrivals), strict=True))
    texts: list[Generation] = []
    while coming or len(batch):
        while coming and coming[0][1] <= engine.clock() and (together or not len(batch)):
            request, at = coming.popleft()
            texts.append(engine.start(request, sent_at=at))
            batch.add(texts[-1])
        if len(batch):
            for advance in batch.step():
                if advance.error:
                    raise advance.error
        else:
            time.sleep(max(0.0, coming[0][1] - engine.clock()))
    found = []
    for one in texts:
        assert one.first_s is not None
        assert one.last_s is not None
        tpot_s = (one.last_s - one.first_s) / (one.new_tokens - 1)
        found.append(Served(one.first_s, tpot_s, one.last_s))
    return found, engine.clock() - began


def load(
    engine: Engine, shares: Sequence[float], count: int, new_tokens: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Return what every load gave, side by side and one after the other."""
    warm = requests(8, new_tokens, seed=99)
    _, seconds = served(engine, warm, [0.0] * len(warm), together=False)
    service_s = seconds / len(warm)
    result: dict[str, dict[str, Any]] = {}
    for share in shares:
        per_s = share / service_s
        found: dict[bool, list[Served]] = {True: [], False: []}
        spent = {True: 0.0, False: 0.0}
        for turn in range(rounds):
            draw = np.random.default_rng([turn, int(share * 100)])
            arrivals = np.cumsum(draw.exponential(1 / per_s, count)).tolist()
            asked = requests(count, new_tokens, seed=turn)
            for together in (True, False) if turn % 2 == 0 else (False, True):
                some, seconds = served(engine, asked, arrivals, together)
                found[together] += some
                spent[together] += seconds
        result[f"{share:g}"] = {
            "requests_per_s": per_s,
            "service_s": service_s,
            "requests": count * rounds,
            **{
                name: summary(found[together], spent[together], new_tokens)
                for name, together in (("together", True), ("in_turn", False))
            },
        }
    return result


def summary(found: Sequence[Served], seconds: float, new_tokens: int) -> dict[str, Any]:
    """Return percentiles of what requests waited for."""
    values = {
        name: np.array([getattr(one, name) for one in found])
        for name in ("ttft_s", "tpot_s", "e2e_s")
    }
    return {
        **{
            f"{name}_p{quantile}": float(np.percentile(of, quantile))
            for name, of in values.items()
            for quantile in (50, 95)
        },
        "tokens_per_s": len(found) * new_tokens / seconds,
        "observations": [asdict(one) for one in found],
    }


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=8, help="at least 6 for an interval")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=24, help="steps that are timed")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, help="1 among them")
    parser.add_argument("--precisions", nargs="*", default=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--loaded", nargs="*", default=["fp32", "int8"], help="precisions")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 2.0])
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--load-rounds", type=int, default=2)
    parser.add_argument("--load-tokens", type=int, default=48)
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    pin(options.threads)
    load_before = os.getloadavg()
    rows: dict[str, Any] = {}
    loads: dict[str, Any] = {}
    for precision in dict.fromkeys([*options.precisions, *options.loaded]):
        engine = engine_of(precision, options.threads)
        if not engine.decoder.startswith("native"):
            raise SystemExit(f"The native step is not available here: {engine.decoder}")
        if precision in options.precisions:
            rows[precision] = streams(engine, options.streams, options.rounds, options.new_tokens)
        if precision in options.loaded:
            loads[precision] = load(
                engine,
                options.shares,
                options.requests,
                options.load_tokens,
                options.load_rounds,
            )
        print(f"{precision}: done", flush=True)
    result: dict[str, Any] = {
        **conditions(options.threads, load_before),
        "new_tokens": options.new_tokens,
        "load_tokens": options.load_tokens,
        "ratio_of_eight": {name: one[8]["ratio"] for name, one in rows.items() if 8 in one},
        "rows": rows,
        "load": loads,
    }
    table = markdown(result)
    print(table)
    if options.write:
        keep("batch", result, table)


def markdown(result: dict[str, Any]) -> str:
    """Return the tables, with what it takes to read them."""
    machine, before = result["machine"], result["load_average"]
    lines = [
        f"{result['at'][:16].replace('T', ' ')} UTC, {machine['cpu']}, {result['threads']} "
        f"threads, {machine['platform']}, commit {machine['git_commit']}. {SMOLLM2}, greedy, "
        f"prompts of {PROMPT_CHARS[0]} to {PROMPT_CHARS[1]} characters. Load average "
        f"{before['before'][0]:.1f} before and {before['after'][0]:.1f} after.",
    ]
    if result["rows"]:
        lines += [
            "",
            "| precision | texts | tokens/s, median (least – greatest) | × one text (95 %) | "
            "by CPU time | tokens as alone |",
            "|---|---|---|---|---|---|",
        ]
    for precision, of in result["rows"].items():
        for size, one in of.items():
            rates = np.array(one["tokens_per_s"])
            ratio = "1" if int(size) == 1 else ratio_in_words(one)
            lines.append(
                f"| {precision} | {size} | {np.median(rates):,.0f} ({rates.min():,.0f} – "
                f"{rates.max():,.0f}) | {ratio} | {one['cpu_ratio']:.2f} | "
                f"{'yes' if one['same_tokens'] else 'NO'} |"
            )
    reached = ", ".join(
        f"{name} {ratio:.2f}" for name, ratio in result["ratio_of_eight"].items() if ratio
    )
    if reached:
        lines += ["", f"Eight texts against one, wanted {WANTED_RATIO:g}: {reached}."]
    if result["load"]:
        lines += [
            "",
            f"Under load, {result['load_tokens']} new tokens a request; a share of 1 is what one "
            "after the other serves at most:",
            "",
            "| precision | share (requests/s) | served | TTFT p50 | TTFT p95 | TPOT p50 | "
            "whole p95 | tokens/s |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for precision, shares in result["load"].items():
        for share, one in shares.items():
            for name, said in (("together", "side by side"), ("in_turn", "one after the other")):
                of = one[name]
                lines.append(
                    f"| {precision} | {share} ({one['requests_per_s']:.2f}) | {said} | "
                    f"{of['ttft_s_p50'] * 1e3:,.0f} ms | {of['ttft_s_p95'] * 1e3:,.0f} ms | "
                    f"{of['tpot_s_p50'] * 1e3:,.1f} ms | {of['e2e_s_p95']:,.2f} s | "
                    f"{of['tokens_per_s']:,.0f} |"
                )
    return "\n".join(lines) + "\n"


def ratio_in_words(one: dict[str, Any]) -> str:
    """Return a ratio with its interval, where there were enough rounds for one."""
    if one["ratio"] is None:
        return "too few rounds"
    return f"{one['ratio']:.2f} ({one['low']:.2f} – {one['high']:.2f})"


if __name__ == "__main__":
    main()
