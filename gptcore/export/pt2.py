"""A ``.pt2`` archive by ``torch.export``: ids (batch, tokens) -> logits, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from gptcore.export import Form, Parts


def blocked_by(spec: ModelSpec) -> str | None:
    """Return None: every shape can be traced."""
    return None


def write(work: Path, form: Form, parts: Parts, progress: Callable[[float], None]) -> str:
    """Write the archive and return a note.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    import torch

    from gptcore.export.traced import Logits, example, free_shapes, quietly

    with quietly(), torch.no_grad():
        traced = torch.export.export(
            Logits(parts.plain),
            (example(),),
            dynamic_shapes=free_shapes(parts.plain.spec.context),
        )
        progress(0.6)
        try:
            torch.export.save(traced, work)
        except RuntimeError as error:
            raise OSError(f"torch could not write it ({error})") from None
    progress(1.0)
    return f"Two tokens at least, {parts.plain.spec.context:,} at most."
