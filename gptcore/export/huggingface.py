"""A Hugging Face folder: config.json, model.safetensors and the tokenizer's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gptcore.errors import InvalidSpec
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from gptcore.export import Form, Parts

ENDS = "eos_token_id"


def blocked_by(spec: ModelSpec) -> str | None:
    """Return why that family's config cannot say a shape, or None."""
    from gptcore.weights.save import config_of

    try:
        config_of(spec, end_id=None, precision="fp32")
    except InvalidSpec:
        return (
            f"transformers has no {spec.family} of that shape ({spec.heads} heads of "
            f"{spec.head_width} in a width of {spec.width}): choose a recipe that keeps it."
        )
    return None


def write(work: Path, form: Form, parts: Parts, progress: Callable[[float], None]) -> str:
    """Write the folder and return a note.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    from gptcore.artifact import write_tokenizer
    from gptcore.weights.save import save

    tokenizer = parts.tokenizer
    save(parts.plain.model(), work, end_id=min(tokenizer.eos_ids, default=None))
    progress(0.8)
    config = json.loads((work / "config.json").read_text())
    ends = sorted(tokenizer.eos_ids)
    config[ENDS] = ends[0] if len(ends) == 1 else ends or None
    config["bos_token_id"] = tokenizer.bos_id
    (work / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(work, tokenizer, parts.source)
    progress(1.0)
    return "" if (work / "tokenizer.json").exists() else "It has no tokenizer: token ids only."
