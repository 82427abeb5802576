"""Capacity: objectives are met, loads are carried, and costs follow devices."""

from dataclasses import replace
from typing import Any

import pytest

from gptcore.plan.capacity import Capacity, capacity
from gptcore.plan.cards import card
from gptcore.plan.memory import Split
from gptcore.plan.speed import card_device
from gptcore.spec import PRESETS

PLAIN: dict[str, Any] = {
    "requests_per_s": 50.0,
    "prompt_tokens": 512,
    "new_tokens": 128,
    "ttft_s": 1.0,
    "tpot_s": 0.05,
    "headroom": 0.7,
    "usd_per_hour": 2.0,
    "watts": 700.0,
    "pue": 1.2,
    "carbon_g_per_kwh": 400.0,
}


def planned(model: str = "gpt3-6.7b", name: str = "h100", **changes: Any) -> Capacity:
    one = card(name)
    device = card_device(one, "fp16", 0.5, 0.75)
    return capacity(PRESETS[model], "fp16", one, device, **{**PLAIN, **changes})


def test_a_replica_keeps_its_objectives_and_its_memory() -> None:
    found = planned().replica
    assert found is not None
    assert found.tpot_s <= 0.05
    assert found.ttft_s <= 1.0
    assert found.memory_bytes <= 80e9
    assert found.batch > 1


def test_the_replicas_carry_the_load_with_room_to_spare() -> None:
    found = planned()
    assert found.replica is not None
    room = found.replica.requests_per_s * PLAIN["headroom"]
    assert found.replicas * room >= 50 > (found.replicas - 1) * room


@pytest.mark.parametrize("factor", [2, 10])
def test_more_load_needs_more_replicas_at_about_the_same_price_a_token(factor: int) -> None:
    one, more = planned(requests_per_s=500.0), planned(requests_per_s=500.0 * factor)
    assert more.replicas == pytest.approx(factor * one.replicas, abs=factor)
    assert more.usd_per_million_tokens == pytest.approx(one.usd_per_million_tokens, rel=0.1)


def test_costs_are_devices_times_their_price_and_power() -> None:
    found = planned()
    millions = 50 * 128 * 3600 / 1e6
    assert found.usd_per_million_tokens == pytest.approx(found.devices * 2.0 / millions)
    assert found.kwh_per_million_tokens == pytest.approx(found.devices * 0.7 * 1.2 / millions)
    assert found.carbon_kg_per_million_tokens == pytest.approx(found.kwh_per_million_tokens * 0.4)


def test_a_stricter_objective_never_needs_fewer_replicas() -> None:
    needed = [planned(tpot_s=t).replicas for t in (0.1, 0.03, 0.015)]
    assert needed == sorted(needed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "gpt3-175b"}, "split it over more devices"),
        ({"tpot_s": 0.001}, "relax the objectives"),
        ({"ttft_s": 0.001}, "relax the objectives"),
        ({"prompt_tokens": 2000}, "2,048 at most"),
    ],
)
def test_what_cannot_be_says_why(changes: dict[str, Any], said: str) -> None:
    found = planned(**changes)
    assert found.replica is None
    assert said in (found.problem or "")
    assert found == replace(Capacity(None, found.problem))


def test_175b_is_served_when_it_is_split() -> None:
    found = planned("gpt3-175b", split=Split(8))
    assert found.devices == 8 * found.replicas > 0
