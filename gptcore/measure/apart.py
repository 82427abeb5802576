"""How far two variants are apart at each token of texts that were written: KL before the token.

The texts are given as token ids, as they were written, so that both variants read the very same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from gptcore.errors import ContextOverflow
from gptcore.measure.divergence import compare, require_same_tokens
from gptcore.measure.perplexity import model_logits, require_finite
from gptcore.recipe import Variant
from gptcore.records import Request, RunKind
from gptcore.work import Desk, Work

if TYPE_CHECKING:
    from torch import Tensor

MAX_TEXTS = 8
MAX_TOKENS = 4096
"""Of one text."""


class Apart(Work):
    """Let two variants read texts, and tell KL(A‖B) before each of their tokens."""

    kind: ClassVar[RunKind] = RunKind.APART

    variant: Variant
    against: Variant
    request: Request = Field(description="What the texts answer.")
    answers: tuple[Annotated[tuple[int, ...], Field(min_length=1, max_length=MAX_TOKENS)], ...] = (
        Field(min_length=1, max_length=MAX_TEXTS, description="Token ids of the texts.")
    )

    @model_validator(mode="after")
    def _on_one_device(self) -> Apart:
        one, other = self.variant.placement.device, self.against.placement.device
        if one != other:
            raise ValueError(
                f"the variants are on {one} and {other}, and one run has one device: put both on "
                "the same"
            )
        return self

    def variants_used(self) -> tuple[Variant, ...]:
        """Return A and B."""
        return self.variant, self.against

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Read, and return by text ``kl_nats``, and ``p_a`` and ``p_b`` of each token.

        Raises:
            InvalidInput: the variants have different tokens.
            ContextOverflow: prompt and text are longer than a context.
            NumericalError: a variant produced NaN or infinity.
        """
        import torch

        first = desk.load(self.variant)
        tokenizer = first.engine.tokenizer
        prompt, _ = first.engine.prompt_ids(self.request)
        del first  # so that it can be let go of
        context = min(one.spec_after.context for one in self.variants_used())
        longest = len(prompt) + max(map(len, self.answers))
        if longest > context:
            raise ContextOverflow(
                f"Prompt and text have {longest:,} tokens, and a variant reads at most "
                f"{context:,}: write a shorter text."
            )
        texts = []
        for number, answer in enumerate(self.answers):
            desk.phase(f"text {number + 1} of {len(self.answers)}", number / len(self.answers))
            ids = torch.tensor([*prompt, *answer[:-1]])
            kept: list[Tensor] | Iterator[Tensor]
            kept = self._logits(desk, self.variant, ids, len(prompt) - 1)
            if not desk.holds(self.against):  # loading it may let go of the first
                kept = [one.cpu() for one in kept]
            fresh = self._logits(desk, self.against, ids, len(prompt) - 1)
            require_same_tokens(tokenizer, desk.load(self.against).engine.tokenizer)
            at, found = 0, []
            for a, b in zip(kept, fresh, strict=True):
                targets = torch.tensor(answer[at : at + len(b)], device=b.device)
                found.append(compare(a.to(b.device), b, targets))
                at += len(b)
            nll_a, nll_b, kl, _ = (np.concatenate(parts) for parts in zip(*found, strict=True))
            require_finite(kl, len(prompt))
            texts.append(
                {
                    "kl_nats": kl.tolist(),
                    "p_a": np.exp(-nll_a).tolist(),
                    "p_b": np.exp(-nll_b).tolist(),
                }
            )
        return {"texts": texts, "prompt_tokens": len(prompt)}

    def _logits(self, desk: Desk, variant: Variant, ids: Tensor, first: int) -> Iterator[Tensor]:
        desk.check()
        yield from model_logits(desk.load(variant).engine.model)(ids, first)
