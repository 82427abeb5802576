"""A variant carried away in the form of another program: Hugging Face, GGUF, ONNX, ``.pt2``.

Each form is a file here; what it needs beyond this program's own libraries is asked for when it is
used. A form that cannot be had says why before it is chosen (``formats``). What is written is there
wholly or not at all. Imports no torch before something is exported.

These programs know none of our packed layers: weights of fewer bits are written as the float
numbers that they stand for, low-rank layers as their product. So the file is as large as that of
the unchanged model; what stays of a recipe is what it did to the numbers and to the shape.
"""

from __future__ import annotations

import hashlib
import importlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gptcore.errors import InvalidInput

if TYPE_CHECKING:
    from gptcore.export.dense import Plain
    from gptcore.spec import ModelSpec
    from gptcore.tokenizer import Tokenizer
    from gptcore.work import Loaded

Progress = Callable[[float], None]
PIP = "pip install -c constraints.txt -r requirements-export.txt"
"""What brings the libraries that a form may need."""
BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Parts:
    """What a form is made of."""

    plain: Plain
    """The weights as float matrices, with their shape."""
    tokenizer: Tokenizer
    source: Path | None
    """The folder with the tokenizer's files, None for random weights."""


@dataclass(frozen=True, slots=True)
class Form:
    """A form in which a model can be carried away."""

    name: str
    title: str
    suffix: str
    """Of the file; empty for a folder."""
    bytes_per_weight: float
    description: str
    needs: tuple[str, ...] = ()
    """Python modules beyond those of ``requirements.txt``."""

    def blocked_by(self, spec: ModelSpec | None = None) -> str | None:
        """Return why it cannot be had, for a shape if one is given, or None."""
        if absent := [name for name in self.needs if find_spec(name) is None]:
            return f"{' and '.join(absent)} is not installed: {PIP}"
        return None if spec is None else _module(self.name).blocked_by(spec)


@dataclass(frozen=True, slots=True)
class Choice:
    """A form and, where it cannot be had, why."""

    form: Form
    blocked: str | None


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written."""

    format: str
    path: Path
    bytes: int
    sha256: str
    """Of the file; of a folder, of the lines ``sha256  name`` of its files in order."""
    note: str
    """What to know: what was made float, and what a check found."""


FORMS = {
    one.name: one
    for one in (
        Form("hf", "Hugging Face folder", "", 4, "config.json, safetensors and the tokenizer."),
        Form("gguf-f16", "GGUF, F16", ".gguf", 2, "For llama.cpp, in 16 bits."),
        Form("gguf-q8_0", "GGUF, Q8_0", ".gguf", 34 / 32, "For llama.cpp, in 8 bits."),
        Form(
            "onnx",
            "ONNX",
            ".onnx",
            4,
            "For ONNX Runtime: token ids in, logits out, without a cache.",
            ("onnx", "onnxscript"),
        ),
        Form(
            "pt2",
            "torch.export",
            ".pt2",
            4,
            "For torch.export.load: token ids in, logits out, without a cache.",
        ),
    )
}


def formats(spec: ModelSpec | None = None) -> tuple[Choice, ...]:
    """Return all forms, each with why it cannot be had here (for a shape), or None."""
    return tuple(Choice(one, one.blocked_by(spec)) for one in FORMS.values())


def export(
    loaded: Loaded, format: str, target: Path, progress: Progress = lambda share: None
) -> ExportResult:
    """Write a loaded variant in a form, wholly or not at all.

    Args:
        loaded: the variant in memory; it is not changed.
        format: a name of ``FORMS``.
        target: the file or folder; nothing may be there.
        progress: told the share done; raises Cancelled where the user stopped the work.

    Raises:
        InvalidInput: the form cannot be had, something is there already, or the disk is full.
        NumericalError: a number does not fit into the form.
    """
    from gptcore.export.dense import plain_of

    form = form_of(format)
    model, context = loaded.engine.model, loaded.engine.tokenizer
    if blocked := form.blocked_by():
        raise InvalidInput(f"{form.title} cannot be written: {blocked}.")
    if target.exists():
        raise InvalidInput(f"There is already something at {target.name!r}: choose another name.")
    if form.suffix and target.suffix != form.suffix:
        raise InvalidInput(f"{target.name!r} does not end in {form.suffix}: name it so.")
    plain = plain_of(model, progress=lambda share: progress(0.3 * share))
    if blocked := form.blocked_by(plain.spec):
        raise InvalidInput(f"{form.title} cannot be written: {blocked}")
    parts = Parts(plain, context, loaded.source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_room(target, form, plain.spec)
        place = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
    except OSError as error:
        raise InvalidInput(_unwritable(target, error)) from None
    try:
        work = place / target.name
        note = _module(format).write(
            work, form, parts, progress=lambda share: progress(0.3 + 0.65 * share)
        )
        size, digest = _measured(work)
        progress(1.0)
        work.rename(target)
    except OSError as error:
        raise InvalidInput(_unwritable(target, error)) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return ExportResult(form.name, target, size, digest, " ".join((*plain.notes, note)).strip())


def form_of(name: str) -> Form:
    """Return the form of that name.

    Raises:
        InvalidInput: there is none.
    """
    if name not in FORMS:
        raise InvalidInput(f"There is no format {name[:40]!r}; there are: {', '.join(FORMS)}.")
    return FORMS[name]


def _module(name: str):  # type: ignore[no-untyped-def]
    """Return the file that writes a form: its ``blocked_by(spec)`` and ``write(...)``."""
    file = {"hf": "huggingface"}.get(name, name.partition("-")[0])
    return importlib.import_module(f"gptcore.export.{file}")


def _require_room(target: Path, form: Form, spec: ModelSpec) -> None:
    wanted = int(spec.parameters * form.bytes_per_weight)
    free = shutil.disk_usage(target.parent).free
    if free < wanted:
        raise InvalidInput(
            f"{form.title} takes about {wanted / 1e6:,.0f} MB, and the disk of {target.name!r} has "
            f"{free / 1e6:,.0f} MB free: make room, or choose another place."
        )


def _measured(work: Path) -> tuple[int, str]:
    """Return bytes and hash of a file, or of all files of a folder."""
    if work.is_file():
        return work.stat().st_size, _sha256(work)
    files = sorted(one for one in work.rglob("*") if one.is_file())
    lines = [f"{_sha256(one)}  {one.relative_to(work).as_posix()}\n" for one in files]
    whole = hashlib.sha256("".join(lines).encode()).hexdigest()
    return sum(one.stat().st_size for one in files), whole


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _unwritable(target: Path, error: OSError) -> str:
    why = error.strerror or str(error)
    return f"{target.name!r} could not be written: {why}. Nothing of it remains; make room there."
