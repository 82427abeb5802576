"""Weights on disk and how they become a model. ``describe`` reads no tensor and imports no torch.

A Hugging Face directory is the one form that is loaded; a GGUF file is converted to such a
directory once. Pickles are never opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import InvalidSpec, InvalidWeights
from gptcore.paths import cache_dir
from gptcore.spec import ModelSpec
from gptcore.weights import gguf, huggingface

if TYPE_CHECKING:
    from gptcore.device import Placement
    from gptcore.model import GPT

Progress = Callable[[float], None]


def silent(ratio: float) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a model on disk is, before any tensor is read."""

    directory: Path
    """A Hugging Face directory; that of a GGUF file's conversion for such a file."""
    spec: ModelSpec
    source_precision: str
    """What the weights were stored in where they come from: ``fp32``, ``Q4_1 (GGUF)``."""
    weights_id: str
    """``sha256:…`` over the safetensors files."""
    stored_bytes: int
    """Of the safetensors files."""


def describe(path: Path, progress: Progress = silent) -> Checkpoint:
    """Return what lies at ``path``: a Hugging Face directory or a GGUF file.

    Args:
        path: the directory or file.
        progress: told the share of a conversion that is done.

    Raises:
        InvalidWeights: missing, damaged, foreign or dangerous files, or tensors that do not
            match the config; all of them are named.
        InvalidSpec: the config contradicts itself or is of another family.
    """
    try:
        directory = gguf.converted(path, progress) if path.suffix.lower() == ".gguf" else path
        if not directory.is_dir():
            raise InvalidWeights(
                f"{path.name[:80]!r} is neither a model folder nor a .gguf file: a model is a "
                "folder with config.json and safetensors files, or one .gguf file."
            )
        found = _inspected(directory, path.name)
        return Checkpoint(
            directory=directory,
            spec=found.spec,
            source_precision=found.source_precision,
            weights_id=weights_id(found.files),
            stored_bytes=sum(file.stat().st_size for file in found.files),
        )
    except OSError as error:
        raise InvalidWeights(
            f"{path.name[:80]!r} cannot be read: {error.strerror or error}."
        ) from None


def _inspected(directory: Path, name: str) -> huggingface.Inspected:
    """Inspect a directory; what is refused goes by the name that a person knows."""
    try:
        return huggingface.inspect(directory)
    except (InvalidWeights, InvalidSpec) as error:
        raise type(error)(str(error).replace(directory.name, name)) from None


def weights_id(files: tuple[Path, ...]) -> str:
    """Return the hash of the files' content, remembered as long as inode, size and time stay."""
    stats = [file.stat() for file in files]
    stamp = [[one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns] for one in stats]
    key = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:32]
    note = cache_dir() / "hashes" / key
    if note.exists():
        return note.read_text()
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    found = f"sha256:{digest.hexdigest()}"
    with contextlib.suppress(OSError):  # a full disk only makes the next time slower
        note.parent.mkdir(exist_ok=True)
        fresh = note.with_suffix(f".{secrets.token_hex(4)}")
        fresh.write_text(found)
        fresh.replace(note)
    return found


def empty(spec: ModelSpec) -> GPT:
    """Return a model without weights, on the meta device."""
    import torch
    from torch.overrides import TorchFunctionMode

    from gptcore.model import GPT

    class Unfilled(TorchFunctionMode):
        """Skips the filling with normal noise, whose meta kernel imports torch's compiler: 1 s."""

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.nn.init.normal_:
                return kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    with torch.device("meta"), Unfilled():
        return GPT(spec)


def build(
    checkpoint: Checkpoint,
    placement: Placement,
    progress: Progress = silent,
    *,
    as_stored: bool = False,
) -> GPT:
    """Return the model with its weights, on its device and in its precision.

    Weights that need no conversion are used straight from the mapped files, so that no second
    copy of the model is in memory at any moment.

    Args:
        checkpoint: what to read.
        placement: where to, and as what.
        progress: told the share of the tensors that is there.
        as_stored: on a CPU, leave mapped weights in the type of their file, for a pass that
            ``converts`` the model itself.

    Raises:
        InvalidWeights: the files changed or are damaged.
    """
    import torch

    dtype = getattr(torch, huggingface.TORCH_DTYPES[placement.precision])
    model = empty(checkpoint.spec)
    tensors = huggingface.tensors(
        checkpoint.directory,
        checkpoint.spec,
        dtype,
        placement.device,
        as_stored=as_stored and placement.device == "cpu",
    )
    total = len(model.state_dict()) - checkpoint.spec.tied_head
    state = {}
    for done, (name, tensor) in enumerate(tensors, start=1):
        state[name] = tensor
        progress(min(1.0, done / total))
    if checkpoint.spec.tied_head:
        state["head.weight"] = state["embedding.weight"]
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError:
        raise InvalidWeights(
            f"The files of {checkpoint.directory.name} are not what they were: choose it again."
        ) from None
    if checkpoint.spec.tied_head:
        model.head.weight = model.embedding.weight
    return model.requires_grad_(False).eval()


def build_random(
    spec: ModelSpec, placement: Placement, seed: int = 0, progress: Progress = silent
) -> GPT:
    """Return a model of that shape with random weights: speed is real, text is noise.

    Normal with standard deviation 0.02, biases zero, as Radford et al. 2019; the projections
    back into the residual stream are scaled by 1/√(2 layers).
    """
    import torch

    dtype = getattr(torch, huggingface.TORCH_DTYPES[placement.precision])
    model = empty(spec).to(dtype)
    model.to_empty(device=placement.device)
    if spec.tied_head:
        model.head.weight = model.embedding.weight
    random = torch.Generator(placement.device).manual_seed(seed)
    parameters = list(model.named_parameters())
    with torch.no_grad():
        for done, (name, parameter) in enumerate(parameters, start=1):
            if parameter.ndim == 1:
                parameter.fill_(float(name.endswith("weight")))
            else:
                inward = name.endswith((".out.weight", ".down.weight"))
                std = 0.02 / (2 * spec.layers) ** 0.5 if inward else 0.02
                parameter.normal_(0.0, std, generator=random)
            progress(done / len(parameters))
    return model.requires_grad_(False).eval()
