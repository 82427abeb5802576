"""Files that a browser sent, put into a folder of their own for the catalogue to read."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from gptcore.errors import InvalidInput

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
NEEDED = ("config.json", "tokenizer.json")


class Upload(Protocol):
    """What ``st.file_uploader`` gives: a name that cannot be trusted, and bytes to read."""

    name: str

    def seek(self, offset: int, /) -> int:
        """Go to a place of the file."""

    def read(self, size: int = -1, /) -> bytes:
        """Return bytes of the file."""


def stored(files: Sequence[Upload], name: str) -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """Write uploaded files into a folder of their own.

    Args:
        files: one .gguf, or a config.json, a tokenizer.json and safetensors.
        name: that the model shall have.

    Returns:
        The temporary folder, which goes away with this value, and what the catalogue shall read.

    Raises:
        InvalidInput: files are missing, or one is of a kind that is never opened.
    """
    names = [Path(file.name.replace("\\", "/")).name for file in files]
    if not files:
        raise InvalidInput(
            "No file was chosen: choose one .gguf, or config.json, tokenizer.json "
            "and the .safetensors files."
        )
    for one in names:
        if one not in TEXT_FILES and not one.endswith((".safetensors", ".gguf")):
            raise InvalidInput(
                f"{one[:80]!r} is not read here: choose safetensors, config.json, tokenizer.json "
                "or one .gguf file. Pickles (.bin, .pt, .pth) are never opened."
            )
    is_gguf = any(one.endswith(".gguf") for one in names)
    if is_gguf and len(names) != 1:
        raise InvalidInput("A .gguf file holds a whole model: choose it alone.")
    missing = [] if is_gguf else [one for one in NEEDED if one not in names]
    if not is_gguf and not any(one.endswith(".safetensors") for one in names):
        missing.append("a .safetensors file")
    if missing:
        raise InvalidInput(f"{' and '.join(missing)} missing: choose all files of the model.")
    folder = tempfile.TemporaryDirectory(prefix="gptlab-upload-")
    inside = Path(folder.name) / (name if re.fullmatch(r"\w[\w.-]{0,99}", name) else "model")
    inside.mkdir()
    for file, plain in zip(files, names, strict=True):
        file.seek(0)
        with (inside / plain).open("wb") as out:
            shutil.copyfileobj(file, out)
    return folder, inside / names[0] if is_gguf else inside
