"""One model over several processes: each holds a share of every large matrix.

Query heads and neurons are split, so that what follows them has a part of its columns in each
process: a block adds up twice over all processes, behind the attention and behind the MLP. The
vocabulary of embedding and head is split too. Norms and positions are whole everywhere. torch's
DTensor does the cutting and the sums.

Every process must read the same tokens in the same calls; all get the same logits.

Source: Shoeybi et al. 2019, arXiv:1909.08053.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gptcore.errors import InvalidInput
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from gptcore.model import GPT


def share_of(spec: ModelSpec, processes: int) -> ModelSpec:
    """Return what a process has of the heads and neurons.

    Raises:
        InvalidInput: they cannot be split evenly, and by what they could.
    """
    parts = {"query heads": spec.heads, "key heads": spec.kv_heads, "neurons": spec.hidden}
    if any(one % processes for one in parts.values()):
        can = [n for n in range(2, spec.kv_heads + 1) if not any(p % n for p in parts.values())]
        ways = f"take {' or '.join(map(str, can))}" if can else "it stays in one process"
        counted = ", ".join(f"{number:,} {name}" for name, number in parts.items())
        raise InvalidInput(f"{counted} cannot be split evenly over {processes} processes: {ways}.")
    return spec.model_copy(
        update={
            "heads": spec.heads // processes,
            "kv_heads": spec.kv_heads // processes,
            "hidden": spec.hidden // processes,
        }
    )


def split(model: GPT, device: str) -> GPT:
    """Leave in this process its share of a model, on ``device``; to be called by all of them.

    Args:
        model: whole, the same in every process; it is changed.
        device: of this process; the processes talk over gloo on CPUs, nccl on CUDA.

    Returns:
        The model: (B, T) ids, the same in all processes, give whole (B, T, V) logits in each.

    Raises:
        InvalidInput: heads or neurons cannot be split evenly, or a pass packed the weights.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        parallelize_module,
    )

    count = distributed.get_world_size()
    own = share_of(model.spec, count)
    if other := next(_not_split(model), None):
        raise InvalidInput(
            f"A layer of the kind {other} is not split over processes: choose fp32, bf16 or fp16 "
            "without passes that replace layers."
        )
    mesh = init_device_mesh(device.partition(":")[0], (count,))
    tied = model.head.weight is model.embedding.weight
    columns, rows = ColwiseParallel(), RowwiseParallel()
    for block in model.blocks:
        plan: dict[str, ParallelStyle] = {"attention.out": rows, "mlp.down": rows}
        plan |= {f"attention.{name}": columns for name in ("q", "k", "v")}
        plan |= {f"mlp.{name}": columns for name in ("gate", "up")}
        there = {name: style for name, style in plan.items() if _has(block, name)}
        parallelize_module(block, mesh, there, src_data_rank=None)
        block.get_submodule("attention").spec = own  # type: ignore[assignment]
    of_vocabulary: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, of_vocabulary, src_data_rank=None)
    if tied:
        model.head.weight = model.embedding.weight
    _move_the_rest(model, device)
    kind = model.cache_kind
    model.cache_kind = lambda spec, *rest: kind(own, *rest)
    return model


def _not_split(model: GPT) -> Iterator[str]:
    """Yield the kinds of layers that have no float matrix to cut."""
    from torch import nn

    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in ("q", "k", "v", "out", "gate", "up", "down", "head"):
            if type(module) is not nn.Linear:
                yield type(module).__name__
        elif leaf == "embedding" and type(module) is not nn.Embedding:
            yield type(module).__name__


def _has(block: nn.Module, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    return hasattr(block.get_submodule(parent), child)


def _move_the_rest(model: GPT, device: str) -> None:
    """Move what is whole in every process to its device; what was cut is there."""
    from torch import nn

    from gptcore.model import local

    for module in model.modules():
        for name, parameter in tuple(module.named_parameters(recurse=False)):
            if local(parameter) is parameter and parameter.device.type != device.partition(":")[0]:
                moved = nn.Parameter(parameter.to(device), requires_grad=False)
                setattr(module, name, moved)
