"""The catalogue of accelerators: what their makers say, each with its document and its date.

Rates are dense (without structured sparsity) and, where the maker tells two, those that accumulate
in fp32. Bytes are decimal, as makers count. What a maker does not publish is None, never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gptcore.errors import InvalidInput

G, T = 10**9, 10**12
FP32_IN_BF16 = 6
"""Multiplications in bf16 that a TPU's highest precision takes for one in fp32 (XLA)."""


@dataclass(frozen=True, slots=True)
class Card:
    """One accelerator, as its data sheet has it."""

    name: str
    title: str
    kind: str
    """``data centre``, ``workstation``, ``consumer``, ``TPU``, ``machine`` or ``own``."""
    memory_bytes: int
    bytes_per_s: float
    flop_per_s: Mapping[str, float]
    """By precision of the multiplication; a precision that is missing is emulated or refused."""
    watts: float | None
    source: str
    dated: str
    """Year and month of the document."""
    overhead_s: float = 5e-6
    """Seconds that an operation takes beside its work: a kernel's launch, an assumption."""

    def rate(self, precision: str) -> float:
        """Return FLOP/s that a matrix multiplication in ``precision`` can reach at most.

        Weights of 8 or 4 bits are multiplied in 16 bits where the card has no such arithmetic. A
        card without bf16 computes it in fp32; one without fp16 or fp32 (a TPU) takes bf16, six
        times for each product in fp32.
        """
        if precision == "fp32" and "fp32" not in self.flop_per_s:
            return self.flop_per_s["bf16"] / FP32_IN_BF16
        chain = {
            "int4": ("int8", "bf16", "fp16", "fp32"),
            "int8": ("int8", "bf16", "fp16", "fp32"),
            "bf16": ("bf16", "fp32"),
            "fp16": ("fp16", "bf16", "fp32"),
            "fp32": ("fp32",),
        }[precision]
        return next(self.flop_per_s[one] for one in chain if one in self.flop_per_s)


def _card(
    name: str,
    title: str,
    kind: str,
    gigabytes: float,
    gigabytes_per_s: float,
    teraflops: Mapping[str, float],
    watts: float | None,
    source: str,
    dated: str,
) -> Card:
    return Card(
        name,
        title,
        kind,
        round(gigabytes * G),
        gigabytes_per_s * G,
        MappingProxyType({key: value * T for key, value in teraflops.items()}),
        watts,
        source,
        dated,
    )


def _nvidia(fp32: float, half: float, int8: float | None = None) -> dict[str, float]:
    """Return rates of a card whose fp16 and bf16 are equally fast."""
    return {"fp32": fp32, "fp16": half, "bf16": half} | ({"int8": int8} if int8 else {})


_DC, _WS, _HOME = "data centre", "workstation", "consumer"
_TURING = {"fp32": 16.3, "fp16": 130.5, "int8": 261.0}

_ALL = (
    _card("v100-16gb", "Tesla V100 PCIe 16 GB", _DC, 16, 900, {"fp32": 14.0, "fp16": 112.0}, 250,
          "NVIDIA Tesla V100 GPU accelerator, data sheet", "2018-03"),
    _card("v100-32gb", "Tesla V100 SXM2 32 GB", _DC, 32, 900, {"fp32": 15.7, "fp16": 125.0}, 300,
          "NVIDIA V100 tensor core GPU, data sheet", "2020-01"),
    _card("t4", "T4", _DC, 16, 320, {"fp32": 8.1, "fp16": 65.0, "int8": 130.0}, 70,
          "NVIDIA T4 tensor core GPU, data sheet", "2019-02"),
    _card("rtx-6000", "Quadro RTX 6000", _WS, 24, 672, _TURING, 295,
          "NVIDIA Turing GPU architecture, white paper, appendix A", "2018-09"),
    _card("rtx-8000", "Quadro RTX 8000", _WS, 48, 672, _TURING, 295,
          "NVIDIA Quadro RTX 8000, data sheet; rates as its Turing white paper", "2018-09"),
    _card("rtx-a6000", "RTX A6000", _WS, 48, 768, _nvidia(38.7, 154.8, 309.7), 300,
          "NVIDIA Ampere GA102 GPU architecture, white paper; RTX A6000, data sheet", "2021-01"),
    _card("a100-40gb", "A100 SXM4 40 GB", _DC, 40, 1555, _nvidia(19.5, 312, 624), 400,
          "NVIDIA A100 tensor core GPU, data sheet", "2020-11"),
    _card("a100-80gb", "A100 SXM4 80 GB", _DC, 80, 2039, _nvidia(19.5, 312, 624), 400,
          "NVIDIA A100 tensor core GPU, data sheet", "2021-06"),
    _card("l4", "L4", _DC, 24, 300, _nvidia(30.3, 121, 242), 72,
          "NVIDIA L4 tensor core GPU, data sheet (half of its sparse rates)", "2023-03"),
    _card("l40s", "L40S", _DC, 48, 864, _nvidia(91.6, 362, 733), 350,
          "NVIDIA L40S, data sheet", "2023-08"),
    _card("h100-pcie", "H100 PCIe 80 GB", _DC, 80, 2000, _nvidia(51, 756, 1513), 350,
          "NVIDIA H100 tensor core GPU, data sheet (half of its sparse rates)", "2023-03"),
    _card("h100", "H100 SXM5 80 GB", _DC, 80, 3350, _nvidia(67, 989, 1979), 700,
          "NVIDIA H100 tensor core GPU, data sheet (half of its sparse rates)", "2023-03"),
    _card("h200", "H200 SXM 141 GB", _DC, 141, 4800, _nvidia(67, 989, 1979), 700,
          "NVIDIA H200 tensor core GPU, data sheet (half of its sparse rates)", "2023-11"),
    _card("b200", "B200 SXM 180 GB", _DC, 180, 8000, _nvidia(75, 2250, 4500), 1000,
          "NVIDIA DGX B200, data sheet: an eighth of the system, half of its sparse rates",
          "2024-03"),
    _card("mi300x", "Instinct MI300X", _DC, 192, 5300, _nvidia(163.4, 1307, 2615), 750,
          "AMD Instinct MI300X accelerator, data sheet", "2023-12"),
    _card("rtx-3060", "GeForce RTX 3060 12 GB", _HOME, 12, 360, _nvidia(12.7, 25.5), 170,
          "NVIDIA GeForce RTX 3060, specifications; fp16 as twice fp32, its family's ratio",
          "2021-02"),
    _card("rtx-3070", "GeForce RTX 3070 8 GB", _HOME, 8, 448, _nvidia(20.3, 40.6, 162.6), 220,
          "NVIDIA Ampere GA102 GPU architecture, white paper, appendix A", "2021-01"),
    _card("rtx-3090", "GeForce RTX 3090", _HOME, 24, 936, _nvidia(35.6, 71, 284), 350,
          "NVIDIA Ampere GA102 GPU architecture, white paper, appendix A", "2021-01"),
    _card("rtx-4090", "GeForce RTX 4090", _HOME, 24, 1008, _nvidia(82.6, 165.2, 660.6), 450,
          "NVIDIA Ada GPU architecture, white paper, appendix A", "2022-10"),
    _card("rtx-5090", "GeForce RTX 5090", _HOME, 32, 1792, _nvidia(104.8, 209.5, 838), 575,
          "NVIDIA RTX Blackwell GPU architecture, white paper, appendix A", "2025-01"),
    _card("tpu-v3", "TPU v3 chip", "TPU", 32, 900, {"bf16": 123}, 220,
          "Jouppi et al., Ten lessons from three generations, ISCA (mean power)", "2021-06"),
    _card("tpu-v4", "TPU v4 chip", "TPU", 32, 1228, {"bf16": 275, "int8": 275}, 192,
          "Jouppi et al., TPU v4, ISCA, arXiv:2304.01433 (largest power)", "2023-04"),
    _card("tpu-v5e", "TPU v5e chip", "TPU", 16, 819, {"bf16": 197, "int8": 393}, None,
          "Google Cloud TPU v5e, system architecture", "2023-08"),
    _card("tpu-v5p", "TPU v5p chip", "TPU", 95, 2765, {"bf16": 459, "int8": 918}, None,
          "Google Cloud TPU v5p, system architecture", "2023-12"),
    _card("tpu-v6e", "TPU v6e chip", "TPU", 32, 1638, {"bf16": 918, "int8": 1836}, None,
          "Google Cloud TPU v6e, system architecture", "2024-11"),
)  # fmt: skip

CARDS: Mapping[str, Card] = MappingProxyType({one.name: one for one in _ALL})


def card(name: str) -> Card:
    """Return the card of that name.

    Raises:
        InvalidInput: there is none.
    """
    if name not in CARDS:
        raise InvalidInput(
            f"There is no card {name[:60]!r}; there are: {', '.join(CARDS)}, machine and own."
        )
    return CARDS[name]
