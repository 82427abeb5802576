"""The stretches of work that are timed: one prefill, one decode, one whole request.

The work is fixed beforehand: so many tokens in, so many out, the end of text ignored. Tokens are
drawn from the whole vocabulary by a fixed seed, since the speed does not depend on which they are.
Tokenization is in none of them. ``prefill`` and ``decode`` choose the likeliest token, which is
counted in ``decode``; ``request`` draws with all samplers, as the playground does.

Letters of shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from gptcore.errors import ContextOverflow
from gptcore.measure.peaks import synchronise
from gptcore.records import Sampling
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT, KVCache

CHECK_EVERY = 16
"""Steps of a decode between two looks at whether the user said stop."""


class Cell(BaseModel):
    """One point of a grid: what is timed together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: int = Field(128, ge=1, le=1_000_000, description="Tokens read at once.")
    new_tokens: int = Field(32, ge=1, le=100_000, description="Tokens written one by one.")
    batch: int = Field(1, ge=1, le=1024, description="Sequences worked on together.")

    @property
    def label(self) -> str:
        """A few letters that name the cell in a measurement: ``pp128 tg32 b1``."""
        return f"pp{self.prompt_tokens} tg{self.new_tokens} b{self.batch}"

    def check(self, spec: ModelSpec, model: str) -> None:
        """Raise ContextOverflow where the cell does not fit into the context."""
        whole = self.prompt_tokens + self.new_tokens
        if whole > spec.context:
            raise ContextOverflow(
                f"{self.prompt_tokens:,} + {self.new_tokens:,} tokens do not fit into the context "
                f"of {model}, {spec.context:,}: choose a shorter prompt or fewer new tokens."
            )


@dataclass(frozen=True, slots=True)
class Times:
    """What one repetition of a cell took."""

    prefill_s: float
    decode_s: float
    """All new tokens but the first, which the prefill gives; 0 where there is only one."""


def prompt_ids(cell: Cell, spec: ModelSpec, seed: int) -> np.ndarray:
    """Return the tokens that are read: (B, T) int64."""
    return np.random.default_rng(seed).integers(
        spec.vocabulary, size=(cell.batch, cell.prompt_tokens)
    )


def once(
    model: GPT,
    cell: Cell,
    *,
    seed: int = 0,
    delay_ratio: float = 0.0,
    check: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Read the prompts and write the new tokens greedily, and return what each took.

    Args:
        model: on its device.
        cell: what to do.
        seed: of the prompts.
        delay_ratio: work for nothing at the end of each stretch, as a share of what it took.
        check: called before, between and during; raises Cancelled.
        clock: seconds; the device is synchronised before every look at it.
    """
    import torch

    from gptcore.captured import captured_step

    device = str(model.embedding.weight.device)
    ids = torch.from_numpy(prompt_ids(cell, model.spec, seed)).to(device)  # (B, T)
    check()
    with torch.inference_mode():
        cache = model.new_cache(cell.prompt_tokens + cell.new_tokens, cell.batch)
        synchronise(device)
        began = clock()
        latest = read_all(model, ids, cache, check).argmax(-1)  # (B,)
        synchronise(device)
        read = written_from = _delayed(began, delay_ratio, clock)
        if cell.new_tokens > 1 and captured_step(model, cache) is not None:
            written_from = clock()  # recording a step is a cost of the cold start
        for step in range(1, cell.new_tokens):
            latest = write_next(model, latest, cache).argmax(-1)
            if step % CHECK_EVERY == 0:
                check()
        synchronise(device)
        ended = _delayed(written_from, delay_ratio, clock)
    return Times(read - began, ended - written_from if cell.new_tokens > 1 else 0.0)


def _delayed(began: float, ratio: float, clock: Callable[[], float]) -> float:
    """Return the present moment, after keeping busy for a share of the time since ``began``.

    A processor that sleeps is woken later than it asked, so the delay would be longer than said.
    """
    moment = clock()
    until = moment + (moment - began) * ratio
    while moment < until:
        moment = clock()
    return moment


def request_s(
    model: GPT,
    cell: Cell,
    *,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the seconds of whole requests, every token drawn with the default samplers."""
    import torch

    from gptcore.sampling import draw, stages, uniform

    sampling = Sampling()
    device = str(model.embedding.weight.device)
    ids = torch.from_numpy(prompt_ids(cell, model.spec, seed)).to(device)
    check()
    with torch.inference_mode():
        cache = model.new_cache(cell.prompt_tokens + cell.new_tokens, cell.batch)
        synchronise(device)
        began = clock()
        logits = read_all(model, ids, cache, check)
        for step in range(cell.new_tokens):
            rows = logits.float().cpu().numpy()
            chosen = [draw(stages(row, sampling, ())[-1], uniform(seed, step)) for row in rows]
            if step + 1 < cell.new_tokens:
                logits = write_next(model, torch.tensor(chosen, device=device), cache)
            if step % CHECK_EVERY == 0:
                check()
        synchronise(device)
        return clock() - began


def read_all(model: GPT, ids: Tensor, cache: KVCache, check: Callable[[], None]) -> Tensor:
    """Read prompts in the chunks in which a request reads them; the last logits, (B, V)."""
    from gptcore.engine import chunk_tokens, prefill

    size = max(1, chunk_tokens(model) // ids.shape[0])
    for begin in range(0, ids.shape[1], size):
        check()
        some = ids[:, begin : begin + size]
        if len(ids) == 1:
            logits = prefill(model, some[0].tolist(), cache)[None]
        else:
            logits = model(some, cache, last_only=True)[:, -1]
    return logits


def write_next(model: GPT, latest: Tensor, cache: KVCache) -> Tensor:
    """Return the logits after one more token of each sequence: (B,) -> (B, V).

    One sequence takes the way that a request takes, several the way of requests side by side.
    """
    from gptcore.captured import captured_step
    from gptcore.engine import decode
    from gptcore.kernels.step import step_of

    if len(latest) == 1:
        return decode(model, int(latest), cache)[None]
    step = step_of(model)
    if step is not None and step.takes(cache, texts=len(latest)):
        return step.rows(latest.tolist(), cache)
    if (recorded := captured_step(model, cache)) is not None:
        return recorded(latest)
    logits: Tensor = model(latest[:, None], cache)
    return logits[:, -1]
