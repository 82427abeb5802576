"""Training: FLOPs, time, money, energy and carbon, each from assumptions that are said.

Sources: Kaplan et al. 2020 (arXiv:2001.08361) for 6 FLOPs a parameter and token; Chowdhery et al.
2022 (arXiv:2204.02311, appendix B) for what attention adds; Hoffmann et al. 2022 (arXiv:2203.15556)
for the compute-optimal number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptcore.spec import ModelSpec

HOURS_PER_YEAR = 365.25 * 24
SECONDS_PER_YEAR = HOURS_PER_YEAR * 3600
OPTIMAL_TOKENS_PER_PARAMETER = 20.0
"""Hoffmann et al.: about 20 at every size; the paper's three approaches give 18 to 25."""
GPT3_TOKENS = 300e9
"""Brown et al. 2020, table 2.1: every size was trained on so many."""


@dataclass(frozen=True, slots=True)
class Flop:
    """Floating-point operations of a training, by two ways of counting."""

    six_nd: float
    """6 · parameters · tokens."""
    linears: float
    """6 · weights that are multiplied with · tokens; looking an embedding up is no arithmetic."""
    attention: float
    """12 · layers · query width · context · tokens; half of it if the mask's zeros are skipped."""

    @property
    def exact(self) -> float:
        """Linear layers and attention."""
        return self.linears + self.attention


@dataclass(frozen=True, slots=True)
class Training:
    """What a training costs."""

    flop: float
    tokens: float
    seconds: float
    """With all devices."""
    device_hours: float
    cost_usd: float
    energy_kwh: float
    """At the plug: devices × power × PUE."""
    carbon_kg: float

    @property
    def device_years(self) -> float:
        """Years that one device would take."""
        return self.device_hours / HOURS_PER_YEAR


def flop(spec: ModelSpec, tokens: float, context: int | None = None) -> Flop:
    """Return the operations of training on ``tokens`` in sequences of ``context``."""
    length = context or spec.context
    return Flop(
        six_nd=6.0 * spec.parameters * tokens,
        linears=6.0 * spec.matmul_parameters * tokens,
        attention=12.0 * spec.layers * spec.q_width * length * tokens,
    )


def cost(
    flop: float,
    tokens: float,
    *,
    flop_per_s: float,
    devices: int = 1,
    usd_per_hour: float,
    watts: float,
    pue: float,
    carbon_g_per_kwh: float,
) -> Training:
    """Return time, money, energy and carbon.

    Args:
        flop: of the whole training.
        tokens: it is trained on.
        flop_per_s: that one device sustains: its peak × utilization, or what was measured.
        devices: that work on it at once.
        usd_per_hour: of one device.
        watts: of one device, its share of the host included.
        pue: energy at the plug of the building ÷ energy of the devices.
        carbon_g_per_kwh: of the electricity.
    """
    device_hours = flop / flop_per_s / 3600
    energy = device_hours * watts / 1000 * pue
    return Training(
        flop=flop,
        tokens=tokens,
        seconds=device_hours * 3600 / devices,
        device_hours=device_hours,
        cost_usd=device_hours * usd_per_hour,
        energy_kwh=energy,
        carbon_kg=energy * carbon_g_per_kwh / 1000,
    )


def optimal_tokens(parameters: float) -> float:
    """Return the tokens at which a budget is best spent on a model of that size."""
    return OPTIMAL_TOKENS_PER_PARAMETER * parameters


def optimal_size(flop: float) -> tuple[float, float]:
    """Return (parameters, tokens) that spend ``flop`` best: N = √(C / (6 · 20)), D = 20 N."""
    parameters: float = (flop / (6 * OPTIMAL_TOKENS_PER_PARAMETER)) ** 0.5
    return parameters, OPTIMAL_TOKENS_PER_PARAMETER * parameters


@dataclass(frozen=True, slots=True)
class Claim:
    """A quoted figure, and the assumption that makes it."""

    text: str
    flop_per_s: float
    years: float
    """As quoted."""
    source: str


GPT3_FLOP = 3.14e23
"""Brown et al. 2020, table D.1: 3,640 petaflop/s-days."""
PUBLISHED_FLOP = {
    "gpt3-125m": 2.25e20,
    "gpt3-350m": 6.41e20,
    "gpt3-760m": 1.37e21,
    "gpt3-1.3b": 2.38e21,
    "gpt3-2.7b": 4.77e21,
    "gpt3-6.7b": 1.20e22,
    "gpt3-13b": 2.31e22,
    "gpt3-175b": GPT3_FLOP,
}
"""Brown et al. 2020, table D.1: total training compute of each size on 300 billion tokens."""
CLAIMS = (
    Claim("V100 at 28 TFLOP/s", 28e12, 355, "Li, OpenAI's GPT-3 language model, Lambda, 2020-06"),
    Claim("RTX 8000 at 15 TFLOP/s", 15e12, 665, "Li, Lambda, 2020-06"),
    Claim("RTX 8000 at 34.5 TFLOP/s", 34.5e12, 288, "the same, at the mixed-precision rate"),
)
"""355 is exact; 15 TFLOP/s makes 663, which is quoted as 665."""
