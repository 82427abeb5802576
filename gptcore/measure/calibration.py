"""The text that calibrated passes look at: chosen by name, hashed, cut into rows of tokens.

Imports no torch but to make the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptcore.errors import InvalidInput
from gptcore.measure.corpora import (
    CalibrationText,
    EvaluationText,
    calibration_text,
    require_apart,
)
from gptcore.recipe import Calibration, Recipe, Variant

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.tokenizer import Tokenizer


def with_text(recipe: Recipe, *, paths: bool = False) -> Recipe:
    """Return the recipe with its calibration text named by hash, or without one it has no use for.

    Args:
        recipe: may name a text; the one that ships is taken where it names none.
        paths: whether the text may be a path (the command line's right, not a page's).

    Raises:
        InvalidInput: there is no such text, it is one to evaluate on, or not the one of that hash.
    """
    if not recipe.needs_calibration:
        return recipe.model_copy(update={"calibration": None})
    wanted = recipe.calibration or Calibration()
    found = named_text(wanted, paths=paths)
    known = wanted.model_copy(update={"hash": found.hash})
    return recipe.model_copy(update={"calibration": known})


def named_text(wanted: Calibration, *, paths: bool) -> CalibrationText:
    """Return the text that a calibration names.

    Raises:
        InvalidInput: there is none, it is one to evaluate on, or its hash is another.
    """
    found = calibration_text(wanted.text, paths=paths)
    if wanted.hash and found.hash != wanted.hash:
        raise InvalidInput(
            f"The calibration text {found.name} is not the one of this recipe: its hash is "
            f"{found.hash[:19]}… and should be {wanted.hash[:19]}…. Bring that text, or choose one "
            "anew."
        )
    return found


def rows(text: str, wanted: Calibration, tokenizer: Tokenizer, context: int) -> Tensor:
    """Return a text as equal sequences of ids, evenly spread over it.

    Args:
        text: any; what does not fill a sequence at its end is left out.
        wanted: how many sequences at most, of how many tokens.
        tokenizer: of the model.
        context: of the model; sequences are no longer.

    Returns:
        (N, T) int64.

    Raises:
        InvalidInput: the text is shorter than a sequence.
    """
    import torch

    length = min(wanted.tokens, context)
    ids = tokenizer.encode(text)
    count = len(ids) // length
    if not count:
        raise InvalidInput(
            f"The calibration text has {len(ids):,} tokens, and a sequence {length:,}: choose a "
            "longer text or shorter sequences."
        )
    every = torch.tensor(ids[: count * length]).view(count, length)
    if count <= wanted.sequences:
        return every
    return every[torch.linspace(0, count - 1, wanted.sequences).round().long()]


def require_other_text(evaluation: EvaluationText, variant: Variant) -> None:
    """Refuse to evaluate a variant on the text that it was calibrated with.

    Raises:
        InvalidInput: it is that text, or holds much of it.
    """
    wanted = variant.recipe.calibration
    if wanted is None:
        return
    if wanted.hash == evaluation.hash:
        same = CalibrationText(wanted.text, evaluation.content, wanted.hash)
        require_apart(evaluation, same)
    require_apart(evaluation, named_text(wanted, paths=True))
