"""What a step of training takes in memory, and the largest batch that fits.

Weights, gradients and the two moments of AdamW are exact. What is kept for the way back is measured
on one sequence: the bytes that torch saves for it, and the logits with their gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptcore.device import free_bytes
from gptcore.errors import DoesNotFit
from gptcore.spec import ModelSpec
from gptcore.train.settings import Training

if TYPE_CHECKING:
    import torch

    from gptcore.model import GPT

BYTES_A_PARAMETER = 16
"""fp32 weight, gradient, mean and mean square."""
MARGIN = 0.9
"""Share of the free memory that may be taken."""
LOGIT_COPIES = 3
"""fp32 logits, their softmax and their gradient are there at once."""


def sequence_bytes(model: GPT, autocast: torch.autocast, window: int) -> int:
    """Return the bytes that one sequence of ``window`` tokens keeps until its gradient is known.

    Error: temporary tensors inside an operation are not seen.
    """
    import torch

    spec = model.spec
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, window, dtype=torch.long, device=model.embedding.weight.device)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, autocast:
        logits = model(ids)
    del logits
    return sum(seen.values()) + LOGIT_COPIES * window * spec.vocabulary * 4


def state_bytes(spec: ModelSpec) -> int:
    """Return the bytes of weights, gradients and moments."""
    return BYTES_A_PARAMETER * spec.parameters


def require_room(spec: ModelSpec, device: str) -> None:
    """Refuse a shape whose weights, gradients and moments alone do not fit.

    Raises:
        DoesNotFit: with what is needed and what is free.
    """
    free = free_bytes(device)
    if free is not None and state_bytes(spec) > MARGIN * free:
        raise DoesNotFit(
            f"Training {spec.parameters:,} parameters needs {state_bytes(spec) / 2**30:.1f} GiB "
            f"for weights, gradients and moments, and {free / 2**30:.1f} GiB are free: choose a "
            "smaller shape."
        )


def require_batch(
    settings: Training, sequence: int, *, free: int | None, processes: int = 1
) -> None:
    """Refuse a part of a batch that does not fit, and name the largest that would.

    Args:
        settings: batch and parts.
        sequence: ``sequence_bytes``.
        free: bytes for one process, beside weights and moments; None is unknown, and enough.
        processes: that share the batch.

    Raises:
        DoesNotFit: with the largest batch, and the parts that would do.
    """
    if free is None:
        return
    most = max(0, int(MARGIN * free / sequence))
    share = settings.batch // processes
    part = share // settings.parts
    if part <= most:
        return
    said = f"{max(0, free) / 2**30:.2f} GiB are free for it"
    if most == 0:
        raise DoesNotFit(
            f"One sequence of training takes {sequence / 2**30:.2f} GiB and {said}: choose a "
            "shorter context or a smaller shape."
        )
    parts = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)
    raise DoesNotFit(
        f"{part:,} sequences at once take {part * sequence / 2**30:.2f} GiB and {said}; the "
        f"largest batch that would fit is {most:,}. {settings.batch:,} in {parts:,} parts fit "
        "too, with the same result."
    )
