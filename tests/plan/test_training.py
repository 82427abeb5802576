"""Training: the figures that people quote, and that each assumption moves what it should."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gptcore.model import GPT
from gptcore.plan.training import (
    CLAIMS,
    GPT3_FLOP,
    GPT3_TOKENS,
    PUBLISHED_FLOP,
    Training,
    cost,
    flop,
    optimal_size,
    optimal_tokens,
)
from gptcore.spec import PRESETS, gpt

GPT3 = PRESETS["gpt3-175b"]


def made(teraflop_per_s: float, **changes: float) -> Training:
    plain = {
        "usd_per_hour": 1.5,
        "watts": 300.0,
        "pue": 1.1,
        "carbon_g_per_kwh": 429.0,
    }
    return cost(
        GPT3_FLOP,
        GPT3_TOKENS,
        flop_per_s=teraflop_per_s * 1e12,
        devices=int(changes.pop("devices", 1)),
        **{**plain, **changes},
    )


@pytest.mark.parametrize(("rate", "years"), [(28, 355), (15, 663), (34.5, 288)])
def test_the_quoted_years_come_out(rate: float, years: int) -> None:
    assert round(made(rate).device_years) == years


def test_every_claim_is_within_one_percent_of_its_arithmetic() -> None:
    for claim in CLAIMS:
        assert made(claim.flop_per_s / 1e12).device_years == pytest.approx(claim.years, rel=0.01)


def test_the_quoted_cost_comes_out() -> None:
    assert made(28).cost_usd == pytest.approx(4.67e6, rel=0.002)


def test_six_nd_is_the_papers_count() -> None:
    assert flop(GPT3, GPT3_TOKENS).six_nd == pytest.approx(GPT3_FLOP, rel=0.002)


@pytest.mark.parametrize(("name", "published"), PUBLISHED_FLOP.items())
def test_six_nd_is_near_every_published_count(name: str, published: float) -> None:
    assert flop(PRESETS[name], GPT3_TOKENS).six_nd == pytest.approx(published, rel=0.02)


def test_more_devices_take_less_time_and_the_same_money() -> None:
    one, many = made(28), made(28, devices=1000)
    assert many.seconds == pytest.approx(one.seconds / 1000)
    assert many.cost_usd == one.cost_usd


def test_energy_and_carbon_follow_power_pue_and_electricity() -> None:
    base = made(28)
    assert base.energy_kwh == pytest.approx(base.device_hours * 0.3 * 1.1)
    assert made(28, pue=2.2).energy_kwh == pytest.approx(2 * base.energy_kwh)
    assert made(28, carbon_g_per_kwh=42.9).carbon_kg == pytest.approx(base.carbon_kg / 10)


def test_the_exact_form_is_what_torch_counts() -> None:
    """Forward and backward of a small model, attention without the skipping of masked parts."""
    spec = gpt(3, 128, 4, context=64, vocabulary=500)
    model = GPT(spec)
    ids = torch.zeros(2, 64, dtype=torch.long)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(ids).sum().backward()
    assert flop(spec, 2 * 64).exact == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_optimum_spends_its_budget() -> None:
    size, tokens = optimal_size(1e21)
    assert 6 * size * tokens == pytest.approx(1e21)
    assert tokens == optimal_tokens(size)
    assert optimal_tokens(GPT3.parameters) > 10 * GPT3_TOKENS
