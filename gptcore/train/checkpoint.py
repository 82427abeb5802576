"""Checkpoints: weights and optimizers as safetensors, the rest as JSON, there wholly or not at all.

Each is a folder ``step-NNNNNNNNN``, written beside its place and renamed into it. The last and the
best are kept. Order, dropout and learning rate follow from the step alone, so weights, optimizer
and the numbers in ``Progress`` are all that a training needs to go on to the same loss.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import InvalidInput, StoreError

if TYPE_CHECKING:
    import torch

    from gptcore.model import GPT

FOLDER = "checkpoints"
NAME = re.compile(r"step-(\d{9})")
WEIGHTS, OPTIMIZER, PROGRESS = "model.safetensors", "optimizer.safetensors", "progress.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training stands."""

    step: int = 0
    """Updates done."""
    best_step: int | None = None
    best_loss: float | None = None
    best_bits_per_byte: float | None = None
    validated_step: int | None = None
    worse: int = 0
    """Validations since the best."""
    tokens: int = 0
    seconds: float = 0.0
    """Of training, over all resumes."""
    scaler: Mapping[str, Any] | None = None
    """Of fp16's gradients."""


def steps(folder: Path) -> list[int]:
    """Return the steps of which there is a checkpoint, in ascending order."""
    there = folder / FOLDER
    names = [one.name for one in there.iterdir()] if there.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := NAME.fullmatch(name)))


def place(folder: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return folder / FOLDER / f"step-{step:09d}"


def write(
    folder: Path, model: GPT, optimizers: Sequence[torch.optim.Optimizer], progress: Progress
) -> None:
    """Write a checkpoint, then drop all but it and the best.

    Raises:
        StoreError: the disk is full or cannot be written; what was there before still is.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = place(folder, progress.step)
    fresh = target.with_name(f".{target.name}.new")
    named = list(model.named_parameters())
    moments = {
        f"{name}.{kind}": value.detach().cpu().contiguous()
        for name, parameter in named
        for optimizer in optimizers
        if parameter in optimizer.state
        for kind, value in optimizer.state[parameter].items()
    }
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file({n: p.detach().cpu().contiguous() for n, p in named}, fresh / WEIGHTS)
        save_file(moments, fresh / OPTIMIZER)
        (fresh / PROGRESS).write_text(json.dumps(asdict(progress)))
        for file in fresh.iterdir():
            _to_disk(file)
        fresh.rename(target)
        _to_disk(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        before = steps(folder)
        kept = f"that of step {before[-1]:,} is kept" if before else "there is none before it"
        reason = getattr(error, "strerror", None) or error
        raise StoreError(
            f"The checkpoint of step {progress.step:,} could not be written: {reason}; {kept}. "
            "Make room, and go on with --resume."
        ) from None
    for step in steps(folder):
        if step not in (progress.step, progress.best_step):
            shutil.rmtree(place(folder, step), ignore_errors=True)


def read(folder: Path, model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> Progress:
    """Put the last checkpoint into model and optimizers, and return where it stands.

    Raises:
        InvalidInput: there is none, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = steps(folder)
    if not found:
        raise InvalidInput(f"There is no checkpoint in {folder} to go on from.")
    there = place(folder, found[-1])
    try:
        progress = Progress(**json.loads((there / PROGRESS).read_text()))
        moments = load_file(there / OPTIMIZER)
        load_weights(there, model)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for index, (name, _) in enumerate(model.named_parameters()):
            kinds = [key for key in moments if key.rpartition(".")[0] == name]
            state[index] = {key.rpartition(".")[2]: moments[key] for key in kinds}
        numbers = {id(p): i for i, (_, p) in enumerate(model.named_parameters())}
        for optimizer in optimizers:
            # Parameters stand in an optimizer's groups in another order than in the model.
            order = [id(p) for group in optimizer.param_groups for p in group["params"]]
            optimizer.load_state_dict(
                {
                    "state": {at: state[numbers[one]] for at, one in enumerate(order)},
                    "param_groups": optimizer.state_dict()["param_groups"],
                }
            )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InvalidInput(
            f"The checkpoint {there.name} in {folder} is damaged ({error}): delete it to go on "
            "from the one before."
        ) from None
    return progress


def load_weights(there: Path, model: GPT) -> None:
    """Copy a checkpoint's weights into a model of the same shape.

    Raises:
        KeyError, RuntimeError, SafetensorError: they do not match it, or are damaged.
    """
    import torch
    from safetensors.torch import load_file

    tensors = load_file(there / WEIGHTS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors.pop(name))


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
