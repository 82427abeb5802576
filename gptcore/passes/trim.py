"""Keep fewer positions, and only those tokens that a text has use for.

The context is a limit, and for learned positions a table. The vocabulary is the embedding and the
head: of SmolLM2's 135 million weights 28 million, most for tokens that a given use never meets.
The tokenizer is cut with it: it keeps what the text became, the single bytes, the special tokens,
and every token on the way to one of these. So the text becomes the same tokens as before, and other
text becomes more and smaller ones, but never none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.passes.base import Coverage, Pass, PassContext, Stage
from gptcore.passes.calibrate import text_for
from gptcore.spec import BYTES, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptcore.model import GPT


class Trim(Pass):
    """A shorter context, and a vocabulary cut to that of the calibration text."""

    name: ClassVar[str] = "trim"
    stage: ClassVar[Stage] = Stage.SHAPE
    title: ClassVar[str] = "Trim context and vocabulary"
    mechanism: ClassVar[str] = (
        "fewer bytes in embedding and head, and a smaller last multiplication; less cache at most"
    )

    context: int = Field(
        0,
        ge=0,
        le=16_777_216,
        title="Context",
        description="Most positions, in tokens; 0 leaves the model's own.",
    )
    vocabulary: Literal["all", "text"] = Field(
        "all",
        title="Vocabulary",
        description="All tokens, or those of the calibration text with all that are needed to "
        "spell any other text. Numbers per token cannot be compared across vocabularies.",
    )

    @property
    def needs_calibration(self) -> bool:
        """Whether tokens are chosen by a text."""
        return self.vocabulary == "text"

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return why this cannot run: a context cannot be made longer."""
        if self.context > spec.context:
            return f"its context has {spec.context:,} positions; {self.context:,} would be more."
        return None

    def spec_after(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec with the shorter context; the vocabulary is known only with the text."""
        return spec.model_copy(update={"context": self.context or spec.context})

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the bytes without cut positions; an upper bound where the text cuts the rest."""
        gone = spec.parameters - self.spec_after(spec).parameters
        return before - gone * BYTES[placement.precision]

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Cut the tables; the context's tokenizer and calibration text follow.

        Raises:
            InvalidInput: there is no text to choose tokens by, or the tokenizer cannot be cut.
        """
        before = model.spec
        if blocked := self.blocked_by(before, context.placement):
            raise InvalidInput(f"{self.title} cannot run here: {blocked}")
        model.spec = self.spec_after(before)
        if before.position == "learned" and model.spec.context < before.context:
            cut_rows(model.positions, slice(model.spec.context))
        if self.vocabulary == "text":
            self._cut_vocabulary(model, context)
        if model.spec.context == before.context or self.vocabulary == "text":
            context.coverage[self.name] = self._coverage(before, model.spec, context.placement)
        context.progress(1.0)
        return model

    def _coverage(self, before: ModelSpec, after: ModelSpec, placement: Placement) -> Coverage:
        """Return what became of the head; a shorter context alone concerns no multiplication."""
        head, kept = before.linears[-1], after.vocabulary
        left = ("blocks", "trimming leaves the blocks as they are")
        if kept == before.vocabulary:
            return Coverage(0, before.matmul_parameters, (("head", "all tokens stay"), left))
        size = kept * head.columns * BYTES[placement.precision]
        return Coverage(
            head.rows * head.columns,
            before.matmul_parameters,
            (left,),
            stored_bytes=size,
            resident_bytes=size,
        )

    def _cut_vocabulary(self, model: GPT, context: PassContext) -> None:
        import torch
        from torch import nn

        ids = text_for(self, context)
        if context.tokenizer is None:
            raise InvalidInput(
                "The vocabulary cannot be trimmed without the model's tokenizer, which would be "
                "cut with it."
            )
        context.tokenizer, kept = context.tokenizer.trimmed(set(ids.flatten().tolist()))
        rows = torch.tensor(kept, device=model.embedding.weight.device)
        if not isinstance(model.head, nn.Linear) or not isinstance(model.embedding, nn.Embedding):
            raise InvalidInput(
                "An earlier pass took the head or the embedding, which cannot be cut then: put the "
                "trimming first."
            )
        tied = model.head.weight is model.embedding.weight
        cut_rows(model.embedding, rows)
        if tied:
            model.head.weight = model.embedding.weight
            model.head.out_features = len(kept)
        else:
            cut_rows(model.head, rows)
        places = torch.full((model.spec.vocabulary,), -1)
        places[torch.tensor(kept)] = torch.arange(len(kept))
        context.calibration_ids = places[ids.cpu()]
        model.spec = model.spec.model_copy(update={"vocabulary": len(kept)})


def cut_rows(module: nn.Module, rows: Tensor | slice) -> None:
    """Keep some rows of an embedding's or a head's weight, as a tensor of its own."""
    from torch import nn

    assert isinstance(module.weight, nn.Parameter)
    weight = module.weight.detach()[rows].clone()
    module.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(module, nn.Embedding):
        module.num_embeddings = len(weight)
    elif isinstance(module, nn.Linear):
        module.out_features = len(weight)
