"""The shape of a GPT, and the arithmetic of what that shape costs. Imports no torch.

Sources: Radford et al. 2019 (GPT-2), Brown et al. 2020 table 2.1 (GPT-3, arXiv:2005.14165).
The table's 1.3B and 13B rows name head counts that do not divide the width; those are built with
the largest divisor below the table's count, and ``ModelSpec.note`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Family = Literal["gpt2", "llama", "qwen2", "qwen3"]
Precision = Literal["fp32", "bf16", "fp16"]
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MAX_PARAMETERS = 10**13


class RopeScaling(BaseModel):
    """Llama 3's stretch of the rotary frequencies for contexts longer than trained."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    factor: float = Field(8.0, ge=1.0)
    low_freq_factor: float = Field(1.0, gt=0.0)
    high_freq_factor: float = Field(4.0, gt=0.0)
    original_context: int = Field(8192, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")
        return self


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Linear layers of one kind: (columns) inputs to (rows) outputs, ``count`` of them."""

    name: str
    """The module's own name, the last part of its path."""
    rows: int
    columns: int
    bias: bool
    count: int


class ModelSpec(BaseModel):
    """The shape of a GPT; frozen, checked, and hashable.

    ``family`` names the conventions of a checkpoint (its tensor names); what is computed follows
    from the other fields alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    family: Family = "gpt2"
    layers: int = Field(ge=1, le=1000, description="Transformer blocks.")
    heads: int = Field(ge=1, le=1024, description="Query heads of a block.")
    kv_heads: int = Field(ge=1, le=1024, description="Key and value heads; fewer are shared.")
    head_width: int = Field(ge=1, le=4096, description="Width of one head.")
    width: int = Field(ge=1, le=1_000_000, description="Width of the residual stream.")
    hidden: int = Field(ge=1, le=4_000_000, description="Width inside the MLP.")
    context: int = Field(ge=1, le=16_777_216, description="Most positions, in tokens.")
    vocabulary: int = Field(ge=1, le=10_000_000, description="Number of token ids.")
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    position: Literal["learned", "rotary"] = "learned"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    gelu: Literal["tanh", "erf"] = "tanh"
    bias: bool = Field(True, description="Biases on the output and MLP projections.")
    qkv_bias: bool = Field(True, description="Biases on the query, key and value projections.")
    qk_norm: bool = Field(False, description="RMSNorm on each query and key head.")
    norm_eps: float = Field(1e-5, gt=0.0, lt=1.0)
    rope_theta: float = Field(10_000.0, gt=0.0)
    rope_scaling: RopeScaling | None = None
    tied_head: bool = Field(True, description="The output head shares the token embedding.")
    note: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads: "
                "the first must be a multiple of the second"
            )
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_width}")
        if self.parameters > MAX_PARAMETERS:
            raise ValueError(
                f"{self.parameters:,} parameters is more than the {MAX_PARAMETERS:,} allowed"
            )
        return self

    @property
    def q_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads together."""
        return self.kv_heads * self.head_width

    @property
    def parameters_by_part(self) -> dict[str, int]:
        """Exact parameter counts; their sum is ``parameters``."""
        d, L = self.width, self.layers
        norm = 2 * d if self.norm == "layernorm" else d
        attention = (d + self.qkv_bias) * (self.q_width + 2 * self.kv_width)
        attention += self.q_width * d + self.bias * d
        if self.qk_norm:
            attention += 2 * self.head_width
        if self.mlp == "swiglu":
            mlp = 3 * d * self.hidden + self.bias * (2 * self.hidden + d)
        else:
            mlp = 2 * d * self.hidden + self.bias * (self.hidden + d)
        return {
            "token embedding": self.vocabulary * d,
            "position embedding": self.context * d if self.position == "learned" else 0,
            "attention": L * attention,
            "mlp": L * mlp,
            "norms": L * 2 * norm + norm,
            "head": 0 if self.tied_head else self.vocabulary * d,
        }

    @property
    def parameters(self) -> int:
        """Exact number of parameters; a tied head counts once."""
        return sum(self.parameters_by_part.values())

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """The kinds of linear layers: the projections of a block, then the head."""
        d, L = self.width, self.layers
        return (
            LinearShape("q", self.q_width, d, self.qkv_bias, L),
            LinearShape("k", self.kv_width, d, self.qkv_bias, L),
            LinearShape("v", self.kv_width, d, self.qkv_bias, L),
            LinearShape("out", d, self.q_width, self.bias, L),
            *((LinearShape("gate", self.hidden, d, self.bias, L),) * (self.mlp == "swiglu")),
            LinearShape("up", self.hidden, d, self.bias, L),
            LinearShape("down", d, self.hidden, self.bias, L),
            LinearShape("head", self.vocabulary, d, False, 1),
        )

    @property
    def matmul_parameters(self) -> int:
        """Weights that every decoded token multiplies with: block projections and head."""
        return sum(one.rows * one.columns * one.count for one in self.linears)

    def weights_bytes(self, precision: str) -> int:
        """Bytes of all parameters at ``precision`` (fp32, bf16 or fp16)."""
        return self.parameters * BYTES[precision]

    def kv_bytes_per_token(self, precision: str) -> int:
        """Bytes of keys and values that one token of context keeps."""
        return 2 * self.layers * self.kv_width * BYTES[precision]


def gpt(
    layers: int,
    width: int,
    heads: int,
    *,
    context: int = 1024,
    vocabulary: int = 50257,
    note: str = "",
) -> ModelSpec:
    """Return a GPT-2/GPT-3 shape; ``heads`` that do not divide ``width`` are lowered."""
    built = next(h for h in range(heads, 0, -1) if width % h == 0)
    if built != heads:
        note = f"table 2.1 gives {heads} heads, which do not divide {width}; built with {built}"
    return ModelSpec(
        family="gpt2",
        layers=layers,
        heads=built,
        kv_heads=built,
        head_width=width // built,
        width=width,
        hidden=4 * width,
        context=context,
        vocabulary=vocabulary,
        note=note,
    )


GPT2 = {
    "gpt2": gpt(12, 768, 12),
    "gpt2-medium": gpt(24, 1024, 16),
    "gpt2-large": gpt(36, 1280, 20),
    "gpt2-xl": gpt(48, 1600, 25),
}
GPT3 = {
    "gpt3-125m": gpt(12, 768, 12, context=2048),
    "gpt3-350m": gpt(24, 1024, 16, context=2048),
    "gpt3-760m": gpt(24, 1536, 16, context=2048),
    "gpt3-1.3b": gpt(24, 2048, 24, context=2048),
    "gpt3-2.7b": gpt(32, 2560, 32, context=2048),
    "gpt3-6.7b": gpt(32, 4096, 32, context=2048),
    "gpt3-13b": gpt(40, 5140, 40, context=2048),
    "gpt3-175b": gpt(96, 12288, 96, context=2048),
}
SMOLLM2_135M = ModelSpec(
    family="llama",
    layers=30,
    heads=9,
    kv_heads=3,
    head_width=64,
    width=576,
    hidden=1536,
    context=8192,
    vocabulary=49152,
    norm="rmsnorm",
    position="rotary",
    mlp="swiglu",
    bias=False,
    qkv_bias=False,
    norm_eps=1e-5,
    rope_theta=100_000.0,
    tied_head=True,
)
PRESETS: dict[str, ModelSpec] = {**GPT2, **GPT3, "smollm2-135m": SMOLLM2_135M}
