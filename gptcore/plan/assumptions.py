"""Everything a person can set about a plan: one frozen value, which an address or a flag restores.

Each field carries its title, unit, range and source; widgets, flags, the address and the report
read them here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gptcore.errors import InvalidInput
from gptcore.plan.cards import CARDS, Card, card
from gptcore.plan.memory import Split
from gptcore.plan.shapes import free, shape
from gptcore.sentences import detail
from gptcore.spec import ModelSpec

G, T = 10**9, 10**12
OWN = "own"
MACHINE = "machine"
FREE = "custom"
SUSTAINED_RATIO = 0.4
"""Of a card's 16-bit rate in training; 0.3 to 0.5 is published (arXiv:2104.04473, 2204.02311)."""


def _said(source: str, unit: str = "") -> Any:
    return {"source": source, "unit": unit}


class Assumptions(BaseModel):
    """What a plan is made from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(
        "gpt3-175b",
        min_length=1,
        max_length=500,
        title="Model",
        description="A size, an installed model, or custom for the numbers of your own.",
    )
    layers: int = Field(24, ge=1, le=1000, title="Layers", description="Of a custom shape.")
    width: int = Field(2048, ge=1, le=1_000_000, title="Width", description="Of a custom shape.")
    heads: int = Field(16, ge=1, le=1024, title="Heads", description="Of a custom shape.")
    window: int = Field(
        2048, ge=1, le=16_777_216, title="Longest context", description="Of a custom shape."
    )
    vocabulary: int = Field(
        50257, ge=1, le=10_000_000, title="Vocabulary", description="Of a custom shape."
    )

    card: str = Field(
        "v100-32gb", max_length=60, title="Card", description="An accelerator, machine, or own."
    )
    own_memory_gb: float = Field(
        8.0, gt=0, le=100_000, title="Memory", json_schema_extra=_said("your own card", "GB")
    )
    own_gb_per_s: float = Field(
        450.0, gt=0, le=1e6, title="Bandwidth", json_schema_extra=_said("your own card", "GB/s")
    )
    own_tflop_per_s: float = Field(
        40.0, gt=0, le=1e6, title="16-bit rate", json_schema_extra=_said("your own card", "TFLOP/s")
    )

    work: Literal["inference", "training"] = Field("inference", title="For")
    precision: Literal["fp32", "bf16", "fp16", "int8", "int4"] = Field(
        "fp16", title="Precision", description="Of the weights."
    )
    batch: int = Field(
        1, ge=1, le=1_000_000, title="Batch", description="Texts at once, on each copy."
    )
    context: int = Field(
        2048, ge=1, le=16_777_216, title="Context", description="Positions of each text, in tokens."
    )
    tensor: int = Field(
        1, ge=1, le=1024, title="Tensor parallel", description="Devices that share each layer."
    )
    pipeline: int = Field(
        1, ge=1, le=1000, title="Pipeline", description="Devices that have some of the layers each."
    )
    data: int = Field(
        1, ge=1, le=100_000, title="Data parallel", description="Copies of the whole model."
    )
    zero: int = Field(
        0,
        ge=0,
        le=3,
        title="ZeRO stage",
        description="What the copies share in training: 1 the optimizer, 2 gradients too, "
        "3 weights too.",
        json_schema_extra=_said("Rajbhandari et al. 2020, arXiv:1910.02054"),
    )
    optimizer: Literal["adam", "momentum", "sgd"] = Field("adam", title="Optimizer")
    recompute: Literal["none", "blocks"] = Field(
        "none",
        title="Recompute",
        description="Keep only the input of each block and compute the rest again.",
    )

    tokens: float = Field(
        300e9,
        ge=1,
        le=1e18,
        title="Training tokens",
        json_schema_extra=_said("Brown et al. 2020, table 2.1", "tokens"),
    )
    count: Literal["published", "6nd", "exact"] = Field(
        "published",
        title="FLOPs counted",
        description="As GPT-3's paper has them, and for other models 6 N D; 6 N D; or linear "
        "layers and attention.",
        json_schema_extra=_said("Brown et al. 2020, table D.1"),
    )
    tflop_per_s: float = Field(
        28.0,
        gt=0,
        le=1e6,
        title="Sustained rate of a device",
        description="What a device really does in training; its peak × utilization.",
        json_schema_extra=_said("Li, Lambda, 2020: a V100's 28 TFLOP/s in half precision",
                                "TFLOP/s"),
    )  # fmt: skip
    devices: int = Field(1000, ge=1, le=10_000_000, title="Devices")
    usd_per_hour: float = Field(
        1.5,
        ge=0,
        le=1e5,
        title="Price of a device",
        json_schema_extra=_said("Li, Lambda, 2020: a V100, reserved for three years", "$ an hour"),
    )
    watts: float = Field(
        300.0,
        ge=0,
        le=1e6,
        title="Power of a device",
        json_schema_extra=_said("V100 SXM2, data sheet, at its limit; its host comes on top",
                                "W"),
    )  # fmt: skip
    pue: float = Field(
        1.1,
        ge=1,
        le=5,
        title="PUE",
        description="Energy of the building ÷ energy of the devices.",
        json_schema_extra=_said("Patterson et al. 2021, arXiv:2104.10350: 1.10 for GPT-3"),
    )
    carbon_g_per_kwh: float = Field(
        429.0,
        ge=0,
        le=5000,
        title="Carbon of the electricity",
        json_schema_extra=_said("Patterson et al. 2021: US average of 2020", "g CO2e/kWh"),
    )

    prompt_tokens: int = Field(512, ge=1, le=10_000_000, title="Prompt", description="Tokens.")
    new_tokens: int = Field(128, ge=1, le=10_000_000, title="Answer", description="Tokens.")
    compute_ratio: float = Field(
        0.5,
        gt=0,
        le=1,
        title="Share of the peak rate reached",
        description="Of the data sheet's FLOP/s, in prefill.",
        json_schema_extra=_said("an assumption: 0.4 to 0.6 is seen in large multiplications"),
    )
    memory_ratio: float = Field(
        0.75,
        gt=0,
        le=1,
        title="Share of the bandwidth reached",
        description="Of the data sheet's bytes a second, in decode.",
        json_schema_extra=_said("an assumption: 0.6 to 0.85 is seen in decode"),
    )

    requests_per_s: float = Field(
        5.0, gt=0, le=1e7, title="Load", json_schema_extra=_said("your own", "requests/s")
    )
    ttft_s: float = Field(
        1.0, gt=0, le=3600, title="TTFT objective", json_schema_extra=_said("your own", "s")
    )
    tpot_s: float = Field(
        0.1, gt=0, le=3600, title="TPOT objective", json_schema_extra=_said("your own", "s")
    )
    headroom: float = Field(
        0.7,
        gt=0,
        le=1,
        title="Utilization planned for",
        description="Requests come in bursts: a replica that is busy all the time has a queue "
        "without end.",
        json_schema_extra=_said("an assumption: 0.6 to 0.8 is usual"),
    )

    @model_validator(mode="after")
    def _known_card(self) -> Assumptions:
        if self.card not in (*CARDS, OWN, MACHINE):
            raise ValueError(
                f"there is no card {self.card[:60]!r}; there are: {', '.join(CARDS)}, "
                f"{MACHINE} and {OWN}"
            )
        return self

    @property
    def split(self) -> Split:
        """How the model lies on devices."""
        return Split(self.tensor, self.pipeline, self.data, self.zero)

    def spec(
        self, known: Mapping[str, ModelSpec] | None = None, *, paths: bool = False
    ) -> ModelSpec:
        """Return the shape that is planned for.

        Args:
            known: shapes by name beside the presets, such as the installed models.
            paths: whether the model may be a file.

        Raises:
            UnknownModel, InvalidSpec, InvalidInput: with the way out.
        """
        if self.model == FREE:
            return free(self.layers, self.width, self.heads, self.window, self.vocabulary)
        return shape(self.model, known=known, paths=paths)

    def chosen_card(self, machine: Card) -> Card:
        """Return the card, or the one of one's own numbers, or ``machine``."""
        if self.card == MACHINE:
            return machine
        if self.card != OWN:
            return card(self.card)
        half = self.own_tflop_per_s * T
        return Card(
            OWN,
            "Your own card",
            OWN,
            round(self.own_memory_gb * G),
            self.own_gb_per_s * G,
            {"fp32": half / 2, "fp16": half, "bf16": half},
            self.watts,
            "your own numbers",
            "",
        )

    def changed(self) -> dict[str, Any]:
        """Return the fields that are not the default: what an address holds."""
        return {
            name: value
            for name, value in self.model_dump().items()
            if value != type(self).model_fields[name].default
        }


def refused(error: ValidationError) -> str:
    """Return one sentence for what a field refused."""
    return detail(error.errors()[0], Assumptions)


def make(values: Mapping[str, Any]) -> Assumptions:
    """Return the assumptions of these fields.

    Raises:
        InvalidInput: one is unknown, of the wrong kind or out of range.
    """
    try:
        return Assumptions.model_validate(dict(values))
    except ValidationError as error:
        raise InvalidInput(refused(error)) from None


def read(query: Mapping[str, Sequence[str]]) -> tuple[Assumptions, list[str]]:
    """Return the assumptions of an address, and a sentence for each value that is not allowed.

    Args:
        query: all values of each name; names that are no field are ignored.
    """
    found: dict[str, Any] = {}
    problems = []
    for name in Assumptions.model_fields:
        if not query.get(name):
            continue
        try:
            found[name] = getattr(make({name: query[name][-1]}), name)
        except InvalidInput as error:
            used = Assumptions.model_fields[name].default
            problems.append(f"{str(error).rstrip('.')}; {used} is used instead.")
    return Assumptions(**found), problems


def on_card(assumptions: Assumptions, name: str) -> Assumptions:
    """Return the assumptions on another card, with its power and ``SUSTAINED_RATIO`` of its rate.

    Raises:
        InvalidInput: there is no such card.
    """
    changes: dict[str, Any] = {"card": name}
    if name in CARDS:
        found = CARDS[name]
        changes["tflop_per_s"] = round(SUSTAINED_RATIO * found.rate("bf16") / T, 1)
        if "bf16" not in found.flop_per_s and "fp16" in found.flop_per_s:
            changes["tflop_per_s"] = round(SUSTAINED_RATIO * found.rate("fp16") / T, 1)
        if found.watts is not None:
            changes["watts"] = found.watts
    return make({**assumptions.model_dump(), **changes})


def source(name: str) -> str:
    """Return where a field's default comes from, empty where it is only a choice."""
    extra = Assumptions.model_fields[name].json_schema_extra
    return str(extra["source"]) if isinstance(extra, dict) else ""


def unit(name: str) -> str:
    """Return a field's unit, empty where it is a bare number."""
    extra = Assumptions.model_fields[name].json_schema_extra
    return str(extra["unit"]) if isinstance(extra, dict) else ""
