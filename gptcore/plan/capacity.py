"""Capacity: how many replicas a load needs within its objectives, and what a million tokens cost.

A replica decodes a batch step by step and reads new prompts in between, so that prompts slow the
steps: with requests at λ a second, a share λ · prefill of the time is theirs. TTFT counts the wait
for prompts that came before (Pollaczek and Khinchine for a fixed service time, M/D/1), the prompt's
own reading, and the step that is under way. Generations are taken to be as long as said, and
requests to come at random (Poisson).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptcore.plan.cards import Card
from gptcore.plan.fits import usable_bytes
from gptcore.plan.memory import Split, inference
from gptcore.plan.speed import Device, decode, prefill
from gptcore.spec import ModelSpec

MOST_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of the model, at its best batch within the objectives."""

    batch: int
    requests_per_s: float
    """That it can take when it is always busy."""
    ttft_s: float
    tpot_s: float
    memory_bytes: int
    """Of its fullest device."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a load needs."""

    replica: Replica | None
    """None where not even one request at a time meets the objectives, or nothing fits."""
    problem: str | None
    """Why, in a sentence."""
    replicas: int = 0
    devices: int = 0
    usd_per_hour: float = 0.0
    usd_per_million_tokens: float = 0.0
    """Of answers; prompts come with them."""
    kwh_per_million_tokens: float = 0.0
    carbon_kg_per_million_tokens: float = 0.0
    carbon_kg_per_day: float = 0.0


def replica_at(
    spec: ModelSpec,
    precision: str,
    device: Device,
    batch: int,
    *,
    prompt_tokens: int,
    new_tokens: int,
    split: Split,
    headroom: float,
) -> Replica:
    """Return a replica that decodes ``batch`` texts at once.

    A pipeline adds devices and memory, but a step must still go through all of its stages; with as
    many batches as stages all of them work, each on a batch of its own.
    """
    length = min(spec.context, prompt_tokens + new_tokens)
    each = max(1, math.ceil(batch / split.pipeline))
    one_step = decode(
        spec, precision, device, prompt_tokens + new_tokens // 2, each, split.tensor
    ).seconds
    reading = prefill(spec, precision, device, prompt_tokens, 1, split.tensor)
    alone = batch / (new_tokens * one_step)
    rate = alone / (1 + alone * reading / split.pipeline)
    busy = rate * headroom * reading / split.pipeline
    wait = busy * reading / (2 * (1 - busy)) if busy < 1 else math.inf
    needed = inference(
        spec, precision, batch=batch, context=length, split=split, on_cpu=device.on_cpu
    ).total
    return Replica(batch, rate, reading + wait + one_step, one_step / max(1e-9, 1 - busy), needed)


def capacity(
    spec: ModelSpec,
    precision: str,
    card: Card,
    device: Device,
    *,
    requests_per_s: float,
    prompt_tokens: int,
    new_tokens: int,
    ttft_s: float,
    tpot_s: float,
    headroom: float,
    split: Split = Split(),
    usd_per_hour: float,
    watts: float,
    pue: float,
    carbon_g_per_kwh: float,
) -> Capacity:
    """Return the fewest replicas, and their cost.

    Args:
        spec: the shape.
        precision: of the weights.
        card: whose memory limits the batch.
        device: whose rates make the speed.
        requests_per_s: the load, on average.
        prompt_tokens: of a request.
        new_tokens: of an answer.
        ttft_s: the most for the first token.
        tpot_s: the most for each after it.
        headroom: the share of its capacity that a replica is planned for.
        split: one replica over devices; copies (data) are what is asked for.
        usd_per_hour: of a device.
        watts: of a device.
        pue: of the building.
        carbon_g_per_kwh: of the electricity.
    """
    split = Split(split.tensor, split.pipeline)
    if prompt_tokens + new_tokens > spec.context:
        return Capacity(
            None,
            f"Prompt and answer have {prompt_tokens + new_tokens:,} tokens; this model reads "
            f"{spec.context:,} at most.",
        )

    def at(batch: int) -> Replica:
        return replica_at(
            spec,
            precision,
            device,
            batch,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            split=split,
            headroom=headroom,
        )

    room = usable_bytes(card)
    first = at(1)
    if first.memory_bytes > room:
        return Capacity(
            None,
            f"One request needs {first.memory_bytes / 1e9:,.1f} GB a device and {card.title} has "
            f"{room / 1e9:,.1f} GB to give: split it over more devices, or choose fewer bits.",
        )
    if first.tpot_s > tpot_s or first.ttft_s > ttft_s:
        return Capacity(
            None,
            f"One request at a time already takes {first.ttft_s:.3g} s to the first token and "
            f"{first.tpot_s:.3g} s a token: relax the objectives, split each layer (tensor "
            "parallel), or choose a faster card.",
        )

    def good(batch: int) -> bool:
        one = at(batch)
        return one.memory_bytes <= room and one.tpot_s <= tpot_s and one.ttft_s <= ttft_s

    low, high = 1, MOST_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        if good(middle):
            low = middle
        else:
            high = middle - 1
    best = at(low)
    replicas = math.ceil(requests_per_s / (best.requests_per_s * headroom))
    devices = replicas * split.tensor * split.pipeline
    tokens_per_hour = requests_per_s * new_tokens * 3600
    millions = tokens_per_hour / 1e6
    energy = devices * watts / 1000 * pue
    carbon = energy * carbon_g_per_kwh / 1000
    return Capacity(
        best,
        None,
        replicas,
        devices,
        devices * usd_per_hour,
        devices * usd_per_hour / millions,
        energy / millions,
        carbon / millions,
        carbon * 24,
    )
