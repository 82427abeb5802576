"""The values that the parts of the program hand each other: Request, Token, Run, Reading and so on.

What a user types is a frozen pydantic model (its fields carry range, unit and help, and forms,
validation and documentation read them there); what the program computes is a frozen dataclass.
Times on the wall are UTC; durations come from a monotonic clock and end in ``_s``.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_PROMPT_CHARS = 400_000
MAX_STOPS = 16
MAX_STOP_CHARS = 200
MAX_CHOICES = 1000
MAX_RULE_CHARS = 20_000
MAX_SEED = 2**53 - 1
"""The largest whole number that a browser, and every reader of JSON, holds exactly."""


def now() -> datetime:
    """Return the present moment in UTC."""
    return datetime.now(UTC)


def new_id() -> str:
    """Return a fresh run id: 12 hexadecimal digits, sortable by nothing, safe in a URL."""
    return secrets.token_hex(6)


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=MAX_PROMPT_CHARS)


class Sampling(BaseModel):
    """How the next token is drawn; the fields apply in the order in which they stand here."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    repetition_penalty: float = Field(
        1.0,
        ge=0.5,
        le=2.0,
        title="Repetition penalty",
        description="Above 1, tokens that already occurred become less likely; 1 changes nothing.",
    )
    temperature: float = Field(
        0.7,
        ge=0.0,
        le=2.0,
        title="Temperature",
        description="Low values keep to the likeliest words, high values take more chances; "
        "0 always takes the likeliest.",
    )
    top_k: int = Field(
        0, ge=0, le=1000, title="Top-k", description="Keep only the k likeliest tokens; 0 is off."
    )
    top_p: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        title="Top-p",
        description="Keep the fewest likeliest tokens whose probabilities reach p; 1 is off.",
    )
    min_p: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        title="Min-p",
        description="Drop tokens less likely than this share of the likeliest one; 0 is off.",
    )

    @property
    def sampling(self) -> Sampling:
        """These fields alone, without what a subclass adds."""
        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})


class Constraint(BaseModel):
    """A rule that every text must follow: exactly one of the three.

    It is held to while tokens are drawn: those that would break the rule cannot be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: tuple[str, ...] = Field(
        (), max_length=MAX_CHOICES, title="Choices", description="The text is one of these."
    )
    regex: str = Field(
        "",
        max_length=MAX_RULE_CHARS,
        title="Regular expression",
        description="The whole text matches it; in Rust's syntax, which has no look-around.",
    )
    json_schema: str = Field(
        "",
        max_length=MAX_RULE_CHARS,
        title="JSON schema",
        description="The text is JSON that the schema allows.",
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Constraint:
        given = sum(map(bool, (self.choices, self.regex, self.json_schema)))
        if given != 1:
            raise ValueError(
                "the constraint is empty: give choices, a regular expression or a JSON schema"
                if not given
                else "give one of choices, regular expression and JSON schema, not several"
            )
        for choice in self.choices:
            checked_text(choice, "choice")
            if not choice.strip():
                raise ValueError("a choice is empty: write it or remove it")
            if len(choice) > MAX_RULE_CHARS:
                raise ValueError(
                    f"a choice has {len(choice):,} characters; the most is {MAX_RULE_CHARS:,}"
                )
        checked_text(self.regex, "regular expression")
        checked_text(self.json_schema, "JSON schema")
        return self

    @property
    def name(self) -> str:
        """Which of the three it is, as a person calls it."""
        if self.choices:
            return "choices"
        return "regular expression" if self.regex else "JSON schema"


class Request(Sampling):
    """What is asked of an engine: a prompt or a chat, how to sample, when to end."""

    prompt: str = Field("", max_length=MAX_PROMPT_CHARS, description="Text to continue.")
    messages: tuple[Message, ...] = Field(
        (), max_length=1000, description="A chat; when given, the prompt must be empty."
    )
    forced_ids: tuple[int, ...] = Field(
        (),
        max_length=100_000,
        description="Token ids that open the answer: the trunk of a branch. They are shown as "
        "part of the answer, read in the prefill, and not counted as generated.",
    )
    seed: int = Field(
        0, ge=0, le=MAX_SEED, title="Seed", description="The same seed gives the same text."
    )
    max_new_tokens: int = Field(
        200, ge=1, le=100_000, title="New tokens", description="The most tokens to generate."
    )
    stop: tuple[str, ...] = Field(
        (),
        max_length=MAX_STOPS,
        title="Stop strings",
        description="The text ends before the first of these.",
    )
    ignore_eos: bool = Field(
        False, title="Ignore end of text", description="Go on past the model's end-of-text token."
    )
    overflow: Literal["refuse", "cut"] = Field(
        "refuse",
        title="Prompt too long",
        description="Refuse a prompt longer than the context, or cut its beginning.",
    )
    constraint: Constraint | None = Field(
        None, title="Constraint", description="A rule that the new text must follow."
    )
    alternatives: int = Field(
        5, ge=0, le=20, title="Alternatives", description="Likeliest other tokens kept per token."
    )

    @field_validator("prompt")
    @classmethod
    def _encodable(cls, text: str) -> str:
        return checked_text(text, "prompt")

    @field_validator("messages")
    @classmethod
    def _encodable_messages(cls, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        for message in messages:
            checked_text(message.content, "message")
        return messages

    @field_validator("stop")
    @classmethod
    def _usable_stops(cls, stops: tuple[str, ...]) -> tuple[str, ...]:
        for stop in stops:
            if not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise ValueError(
                    f"a stop string has {len(stop)} characters; 1 to {MAX_STOP_CHARS} are allowed"
                )
            checked_text(stop, "stop string")
        return stops

    @model_validator(mode="after")
    def _one_of_prompt_and_chat(self) -> Request:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError(
                "the prompt is empty: type some text"
                if not self.prompt
                else "give a prompt or messages, not both"
            )
        return self


def checked_text(text: str, what: str) -> str:
    """Return ``text`` if it can be written as UTF-8 and holds no NUL; ``what`` names it."""
    if "\x00" in text:
        raise ValueError(
            f"the {what} holds a NUL character at position {text.index(chr(0))}: remove it"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {what} holds half of a surrogate pair at position {error.start}, "
            "which is no character: remove it"
        ) from None
    return text


STAGES = ("raw", "repetition_penalty", "temperature", "top_k", "top_p", "min_p")
"""What a probability passes through, in this order."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have come: its probability raw and after each sampler in turn."""

    id: int
    text: str
    probabilities: tuple[float, ...]
    """One a stage of ``STAGES``; the last is what the draw saw."""


@dataclass(frozen=True, slots=True)
class Token:
    """One streamed event."""

    index: int
    id: int
    text: str
    """The characters this token completed; empty in the middle of a character."""
    logprob: float
    """Natural log of the model's own (raw) probability."""
    probability: float
    """What the draw saw, after all samplers."""
    seconds: float
    """Since the request was started."""
    alternatives: tuple[Alternative, ...] = ()
    forced: bool = False
    """True where the caller chose it (a branch's trunk); left out of every rate."""


class FinishReason(StrEnum):
    """Why a generation ended."""

    LENGTH = "length"
    STOP = "stop"
    EOS = "eos"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Numbers:
    """What one generation cost; METRICS in the documentation defines each."""

    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    queue_s: float
    load_s: float
    """0 when the variant was already loaded."""
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    peak_memory_bytes: int | None
    mbu_ratio: float | None
    mbu_bytes_per_step: int | None = None
    mbu_peak_bytes_per_s: float | None = None
    cut_tokens: int = 0
    """Prompt tokens dropped because the user chose to cut."""


class RunKind(StrEnum):
    """What a run does."""

    GENERATE = "generate"
    INSPECT = "inspect"
    PULL = "pull"
    BENCH = "bench"
    EVALUATE = "evaluate"
    COMPARE = "compare"
    REGRESS = "regress"
    OPTIMIZE = "optimize"
    PROVE = "prove"
    ESTIMATE = "estimate"
    EXPORT = "export"
    TRAIN = "train"
    TUNE = "tune"
    EXPLAIN = "explain"
    TASKS = "tasks"
    TEXTS = "texts"
    APART = "apart"
    FEW_SHOT = "few_shot"


class RunState(StrEnum):
    """Where a run stands; the last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def final(self) -> bool:
        """Whether nothing more will happen to a run in this state."""
        return self not in (RunState.QUEUED, RunState.RUNNING)


@dataclass(frozen=True, slots=True)
class Run:
    """One piece of work on a variant."""

    id: str
    kind: RunKind
    state: RunState
    created_at: datetime
    model: str = ""
    precision: str = ""
    device: str = ""
    variant_hash: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The Request (or other order) as JSON-able values."""
    owner: str = ""
    """``pid:start time`` of the process that answers for it; a dead owner means interrupted."""
    started_at: datetime | None = None
    ended_at: datetime | None = None
    text: str = ""
    error_kind: str | None = None
    error: str | None = None
    numbers: Numbers | None = None
    parent_id: str | None = None
    result: Mapping[str, Any] | None = None
    """What a measurement, comparison or other work found, as JSON-able values."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """What people say about a run."""

    tags: tuple[str, ...] = ()
    note: str = ""
    pinned: bool = False
    archived: bool = False
    baseline: bool = False
    """Whether later runs are held against this one."""


class Choice(StrEnum):
    """What a person said of two answers that lay side by side, without names."""

    LEFT = "left"
    RIGHT = "right"
    TIE = "tie"
    BOTH_BAD = "both bad"


class Vote(BaseModel):
    """One choice between two answers to the same prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    left: str = Field(min_length=1, max_length=200, description="Variant of the left answer.")
    right: str = Field(min_length=1, max_length=200, description="Variant of the right answer.")
    choice: Choice = Field(description="Which one was preferred.")
    left_tokens: int = Field(ge=0, description="Length of the left answer, in tokens.")
    right_tokens: int = Field(ge=0, description="Length of the right answer, in tokens.")
    prompt_hash: str = Field("", max_length=200, description="Which prompt was answered.")
    at: datetime = Field(default_factory=lambda: now(), description="When the choice was made.")

    @model_validator(mode="after")
    def _of_two(self) -> Vote:
        if self.left == self.right:
            raise ValueError(
                f"both sides are {self.left}: a vote needs two variants, choose another one"
            )
        return self


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the machine, tied to time and not to a run."""

    name: str
    """Ends in its unit, such as ``gpu_memory_used_bytes``."""
    value: float
    at: float
    """Seconds since 1970, UTC."""
    subject: str = ""
    """Which one, where there are several: ``cuda:0``."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One named number of a run; the name ends in its unit."""

    run_id: str
    name: str
    observations: tuple[float, ...]

    def __post_init__(self) -> None:
        assert self.observations, self.name


@dataclass(frozen=True, slots=True)
class Provenance:
    """What made a number: enough to say why two of them differ. Unknown is None, never guessed."""

    app_version: str
    git_commit: str | None
    python: str
    torch: str | None
    platform: str
    cpu: str | None
    gpu: str | None
    cores: int | None
    memory_bytes: int | None
    weights_hash: str | None = None
    threads: int | None = None
    power: str | None = None
    """What decides the clock: the governor of the cores, and whether a battery is drained."""
