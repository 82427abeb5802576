"""The part of a text that is looked at: its tokens, and how many before it were left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptcore.errors import InvalidInput
from gptcore.records import Message

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.engine import Engine
    from gptcore.model import GPT


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The last tokens of a text, read as a text of their own."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    """Each token alone, for showing."""
    left_out: int = 0
    """Tokens before the first one that the model was not given."""

    def as_json(self) -> dict[str, Any]:
        """Return it as a result keeps it."""
        return {"ids": list(self.ids), "texts": list(self.texts), "left_out": self.left_out}


def excerpt(engine: Engine, text: str, *, chat: bool, most: int, least: int = 2) -> Excerpt:
    """Return the last ``most`` tokens of a text; of a chat's first turn with ``chat``.

    Raises:
        InvalidInput: it has fewer than ``least`` tokens, or the model knows no chat.
    """
    messages = (Message(role="user", content=text),) if chat else ()
    ids = engine.tokenizer.encode_prompt("" if chat else text, messages)
    if len(ids) < least:
        raise InvalidInput(
            f"The text has {len(ids)} {'token' if len(ids) == 1 else 'tokens'} and at least "
            f"{least} are needed: type more."
        )
    most = min(most, engine.model.spec.context)
    kept = tuple(ids[-most:])
    return Excerpt(kept, tuple(map(engine.tokenizer.token_text, kept)), len(ids) - len(kept))


def stream_of(model: GPT) -> Tensor:
    """Return a tensor on the device and in the dtype of the residual stream.

    The last norm's weight is one in every variant; a packed embedding is not.
    """
    weight: Any = model.norm.weight
    found: Tensor = weight
    return found


def batch_of(model: GPT, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return token ids of equally long texts as a model takes them: (B, T) on its device."""
    import torch

    return torch.tensor([list(text) for text in texts], device=stream_of(model).device)
