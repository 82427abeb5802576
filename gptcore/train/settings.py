"""How a model is trained: every number that decides the outcome, with its range and its help."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptcore.records import MAX_SEED


class Training(BaseModel):
    """Settings of a training; with spec, data and start they decide every number of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(
        2000, ge=1, le=10**8, title="Steps", description="Updates of the weights, at most."
    )
    batch: int = Field(
        32, ge=1, le=10**6, title="Batch", description="Sequences that one update learns from."
    )
    parts: int = Field(
        1,
        ge=1,
        le=10**6,
        title="Parts of a batch",
        description="Computed one after the other and added up: more parts take less memory.",
    )
    window: int = Field(
        0,
        ge=0,
        le=2**20,
        title="Window",
        description="Tokens of one sequence while training; 0 takes the model's whole context.",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        title="Optimizer",
        description="muon makes the updates of the blocks' matrices orthogonal, which takes fewer "
        "steps; all else is AdamW's then too.",
    )
    learning_rate: float = Field(
        1e-3, gt=0.0, le=1e9, title="Learning rate", description="The largest, after the warm-up."
    )
    least_rate_ratio: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        title="Last learning rate",
        description="Share of the largest that the cosine falls to at the last step.",
    )
    warmup: int = Field(
        100, ge=0, le=10**7, title="Warm-up", description="Steps in which the rate rises from 0."
    )
    weight_decay: float = Field(
        0.1,
        ge=0.0,
        le=10.0,
        title="Weight decay",
        description="Of matrices and embeddings; norms and biases have none.",
    )
    beta1: float = Field(0.9, ge=0.0, lt=1.0, title="Beta 1", description="Memory of the mean.")
    beta2: float = Field(
        0.99, ge=0.0, lt=1.0, title="Beta 2", description="Memory of the mean square."
    )
    clip: float = Field(
        1.0,
        ge=0.0,
        le=1e6,
        title="Gradient clipping",
        description="The largest norm of all gradients together; 0 clips nothing.",
    )
    dropout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        title="Dropout",
        description="Share of what enters the residual stream that is set to 0 while training.",
    )
    teaching_ratio: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        title="Teacher's share",
        description="Of the loss, where there is a teacher; the rest is cross-entropy with the "
        "text. 0 is the control: the same sequences in the same order, without the teacher.",
    )
    teaching_temperature: float = Field(
        2.0,
        gt=0.0,
        le=100.0,
        title="Teaching temperature",
        description="Softens teacher and student alike.",
    )
    teaching_top: int = Field(
        32,
        ge=1,
        le=4096,
        title="Teacher's tokens",
        description="The teacher's likeliest tokens kept at each place; the rest counts as one.",
    )
    hidden_ratio: float = Field(
        0.0,
        ge=0.0,
        le=100.0,
        title="Hidden states",
        description="Weight of the distance between the student's and the teacher's hidden "
        "states, evenly spread layers against each other; 0 matches none.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        title="Precision",
        description="Of matrix products; weights and updates stay in fp32, fp16 scales its "
        "gradients.",
    )
    seed: int = Field(
        1, ge=0, le=MAX_SEED, title="Seed", description="Of first weights, order and dropout."
    )
    validate_every: int = Field(
        200,
        ge=1,
        le=10**7,
        title="Validate every",
        description="Steps between two validations; each is followed by a checkpoint.",
    )
    validation_windows: int = Field(
        200,
        ge=0,
        le=10**7,
        title="Validation windows",
        description="Sequences of a validation, spread over the text; 0 takes all of it.",
    )
    patience: int = Field(
        0,
        ge=0,
        le=10**6,
        title="Patience",
        description="Validations without a better loss after which training ends; 0 never ends it.",
    )
    sample_tokens: int = Field(
        0,
        ge=0,
        le=1000,
        title="Text while learning",
        description="Tokens that the model writes at each validation; 0 writes none.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.batch % self.parts:
            raise ValueError(
                f"a batch of {self.batch} cannot be computed in {self.parts} equal parts: choose a "
                "divisor"
            )
        if self.warmup >= self.steps and self.warmup > 0:
            raise ValueError(
                f"a warm-up of {self.warmup} steps leaves none of {self.steps}: make it shorter"
            )
        return self

    def rate(self, step: int) -> float:
        """Return the learning rate of ``step``, the first being 0: linear warm-up, then cosine.

        Source: Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        least = self.least_rate_ratio
        return self.learning_rate * (least + (1 - least) * cosine)
