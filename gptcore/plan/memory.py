"""Memory: what weights, cache, activations, gradients and optimizer take, whole or split.

Sources: Korthikanti et al. 2022 (arXiv:2205.05198) for what a block keeps for its backward pass and
how tensor parallelism splits it; Rajbhandari et al. 2020 (arXiv:1910.02054) for ZeRO's stages and
for 16 bytes a parameter in mixed precision with Adam; Narayanan et al. 2021 (arXiv:2104.04473) for
the pipeline. We differ: no dropout is kept (none of these models trains with it today), attention
is fused, so that no (T, T) matrix is kept, and what a block keeps is counted from this program's
own model.

Letters: W width, Q width of all query heads, K width of all key heads, h width inside the MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gptcore.errors import InvalidInput
from gptcore.passes.quantize import int4_bytes, int8_bytes
from gptcore.spec import BYTES, ModelSpec

Precisions = Literal["fp32", "bf16", "fp16", "int8", "int4"]
PRECISIONS: tuple[str, ...] = ("fp32", "bf16", "fp16", "int8", "int4")
ACTIVATION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 2, "int4": 2}
"""Of activations, cache and embedding; models with 8- or 4-bit weights keep these in 16 bits."""
CPU_BYTES = {**ACTIVATION_BYTES, "int8": 4}
"""As this program runs on a CPU, where the 8-bit operation takes fp32 around it."""
INT4_GROUP = 64
PREFILL_TOKENS = 512
"""Positions that are read at once; a longer prompt goes in pieces, and one prompt at a time."""
SCRATCH_BYTES = 64 * 2**20
"""What operations were seen to take beside the activations on a CPU."""
PACKED_SCRATCH_BYTES = 32 * 2**20
"""Likewise where the program's own library multiplies packed weights."""
GPU_CONTEXT_BYTES = 500 * 10**6
"""What CUDA keeps on a card before anything is loaded; 300 to 600 MB are seen."""

Recompute = Literal["none", "blocks"]
OPTIMIZERS = {"adam": 2, "momentum": 1, "sgd": 0}
"""Numbers that an optimizer keeps for each parameter, in fp32."""


@dataclass(frozen=True, slots=True)
class Split:
    """How a model lies on devices: ``tensor`` × ``pipeline`` × ``data`` of them."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 0
    """ZeRO's stage: 1 splits the optimizer over ``data``, 2 gradients too, 3 weights too."""

    @property
    def devices(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline * self.data

    def check(self, spec: ModelSpec) -> None:
        """Refuse what cannot be built.

        Raises:
            InvalidInput: with the numbers that would go.
        """
        if self.tensor > 1 and (spec.heads % self.tensor or spec.hidden % self.tensor):
            even = [n for n in range(1, spec.heads + 1)
                    if spec.heads % n == 0 and spec.hidden % n == 0]  # fmt: skip
            raise InvalidInput(
                f"Tensor parallelism over {self.tensor} devices does not divide {spec.heads} heads "
                f"and {spec.hidden:,} columns; these do: {', '.join(map(str, even))}."
            )
        if self.pipeline > spec.layers:
            raise InvalidInput(
                f"A pipeline of {self.pipeline} stages needs as many layers; there are "
                f"{spec.layers}."
            )


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the fullest device, by what they are for."""

    weights: int
    cache: int
    activations: int
    gradients: int
    optimizer: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.by_part.values())

    @property
    def by_part(self) -> dict[str, int]:
        """Bytes by name, in the order in which they are drawn."""
        return {
            "weights": self.weights,
            "KV cache": self.cache,
            "activations": self.activations,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "scratch": self.scratch,
        }


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the pipeline: its layers (first, behind the last) and its weights."""

    first: int
    end: int
    embeds: bool
    heads: bool
    parameters: int
    """On one of its ``tensor`` devices."""
    weights_bytes: int


def kv_bytes_per_token(spec: ModelSpec, precision: str, *, on_cpu: bool = False) -> int:
    """Return what one position of one text keeps; 4,718,592 for 175B in 16 bits."""
    size = (CPU_BYTES if on_cpu else ACTIVATION_BYTES)[precision]
    return 2 * spec.layers * spec.kv_width * size


def weights_bytes(spec: ModelSpec, precision: str, *, on_cpu: bool = False) -> int:
    """Return all weights, with scales where they are packed."""
    return sum(one.weights_bytes for one in stages(spec, precision, Split(), on_cpu=on_cpu))


def stages(
    spec: ModelSpec, precision: str, split: Split, *, on_cpu: bool = False
) -> tuple[Stage, ...]:
    """Return how layers and weights lie along the pipeline.

    The first stage embeds, the last has the head; a tied head is a second copy where they are not
    one device. Layers that do not go up evenly stand one more in the first stages.
    """
    split.check(spec)
    size = (CPU_BYTES if on_cpu else ACTIVATION_BYTES)[precision]
    base, more = divmod(spec.layers, split.pipeline)
    found, first = [], 0
    for index in range(split.pipeline):
        layers = base + (index < more)
        embeds, heads = index == 0, index == split.pipeline - 1
        parameters, held = _held(
            spec, precision, size, layers, embeds, heads, split.tensor, on_cpu=on_cpu
        )
        found.append(Stage(first, first + layers, embeds, heads, parameters, held))
        first += layers
    return tuple(found)


def inference(
    spec: ModelSpec,
    precision: str,
    *,
    batch: int = 1,
    context: int,
    split: Split = Split(),
    on_cpu: bool = False,
    scratch_bytes: int | None = None,
) -> Memory:
    """Return what generating takes on the fullest device.

    Args:
        spec: the shape.
        precision: of the weights.
        batch: texts at once.
        context: positions of each.
        split: over tensor and pipeline; copies (data) take the same each.
        on_cpu: as this program runs on a CPU.
        scratch_bytes: what the library takes beside it, where that is known better.

    Error: within 10 % of the largest resident set of this program's own models of 124 and 356
    million parameters on a CPU, less what Python and torch take alone.
    """
    size = (CPU_BYTES if on_cpu else ACTIVATION_BYTES)[precision]
    held = stages(spec, precision, split, on_cpu=on_cpu)
    most_layers = max(one.end - one.first for one in held)
    kv_heads = math.ceil(spec.kv_heads / split.tensor)
    cache = batch * context * 2 * most_layers * kv_heads * spec.head_width * size
    tokens = max(batch, min(PREFILL_TOKENS, context))
    inner = (2 + (spec.mlp == "swiglu")) * spec.hidden
    attending = 2 * (spec.q_width + spec.kv_width)
    activations = tokens * (3 * spec.width + max(inner, attending) // split.tensor) * size
    if on_cpu and precision == "int8":  # several tokens are brought to one magnitude first
        activations += tokens * spec.hidden * size
    activations += 2 * batch * spec.vocabulary * 4 // split.tensor
    if scratch_bytes is None:
        own = on_cpu and precision not in BYTES
        scratch_bytes = PACKED_SCRATCH_BYTES if own else SCRATCH_BYTES
    return Memory(max(one.weights_bytes for one in held), cache, activations, 0, 0, scratch_bytes)


def kept_per_token(spec: ModelSpec, precision: str, tensor: int = 1) -> float:
    """Return the bytes that one block keeps of one position for its backward pass.

    Inputs of both norms, their outputs (the inputs of the layers behind them), q, k, v and the
    attention's output, and the MLP's inside: 2 h for GELU, 4 h for SwiGLU. The four of width W are
    whole on each device without sequence parallelism; the rest is split by tensor parallelism.
    RMSNorm keeps its normalised input in fp32 besides.

    Error: within 10 % of what torch's hooks see our model keep in fp32 and bf16, both families.
    """
    size = BYTES[precision]
    inner = (4 if spec.mlp == "swiglu" else 2) * spec.hidden
    split = inner + 2 * spec.q_width + 2 * spec.kv_width
    statistics = 2 * (8 if spec.norm == "layernorm" else 4 * spec.width + 4)
    return 4 * spec.width * size + split * size / tensor + statistics + 4 * spec.heads / tensor


def training(
    spec: ModelSpec,
    precision: str,
    *,
    batch: int = 1,
    context: int,
    split: Split = Split(),
    optimizer: str = "adam",
    recompute: Recompute = "none",
    scratch_bytes: int = SCRATCH_BYTES,
) -> Memory:
    """Return what a training step takes on the fullest device.

    In 16 bits weights and gradients have 2 bytes each and the optimizer keeps an fp32 copy beside
    its own numbers: 16 bytes a parameter with Adam, as in fp32 (4 + 4 + 8).

    Args:
        spec: the shape.
        precision: fp32, bf16 or fp16; weights of 8 or 4 bits are not trained.
        batch: sequences in flight on each data-parallel device (one micro-batch a stage).
        context: positions of each.
        split: over devices.
        optimizer: one of ``OPTIMIZERS``.
        recompute: ``blocks`` keeps a block's input only and computes the rest again.
        scratch_bytes: what the library takes beside it.

    Raises:
        InvalidInput: a precision or a split that cannot be trained.

    Error: without ``scratch_bytes`` within 10 % of the tensors that live at the peak of fp32
    training steps with AdamW on a CPU; what the allocator keeps beside them is up to 17 % more.
    """
    if precision not in BYTES:
        raise InvalidInput(
            f"Weights in {precision} cannot be trained: choose fp32, bf16 or fp16 for training."
        )
    size = BYTES[precision]
    held = stages(spec, precision, split)
    parameters = max(one.parameters for one in held)
    kept = OPTIMIZERS[optimizer] * 4 + (4 if size == 2 else 0)
    shards = [split.data if split.zero >= stage else 1 for stage in (3, 2, 1)]
    tokens = batch * context
    layers = max(one.end - one.first for one in held)
    block = kept_per_token(spec, precision, split.tensor)
    # A stage of a 1F1B pipeline holds as many micro-batches as stages follow it, so the first
    # holds what all layers keep, whatever the number of stages.
    in_flight = layers * split.pipeline
    if recompute == "blocks":
        activations = tokens * (in_flight * spec.width * size + block)
    else:
        activations = tokens * in_flight * block
    # The last norm, and the gradients inside the block that is going backward.
    inner = (3 if spec.mlp == "swiglu" else 2) * spec.hidden / split.tensor
    activations += tokens * (5 * spec.width + inner) * size
    # Logits, their logarithmic softmax and their gradient; the loss is computed in fp32.
    logits = tokens * spec.vocabulary * (12 if size == 4 else 14) / split.tensor
    return Memory(
        weights=math.ceil(parameters * size / shards[0]),
        cache=0,
        activations=round(activations + logits),
        gradients=math.ceil(parameters * size / shards[1]),
        optimizer=math.ceil(parameters * kept / shards[2]),
        scratch=scratch_bytes,
    )


def _held(
    spec: ModelSpec,
    precision: str,
    size: int,
    layers: int,
    embeds: bool,
    heads: bool,
    tensor: int,
    *,
    on_cpu: bool,
) -> tuple[int, int]:
    """Return parameters and bytes of ``layers`` blocks on one of ``tensor`` devices."""
    d = spec.width
    norm = 2 * d if spec.norm == "layernorm" else d
    parameters = layers * (2 * norm + (2 * spec.head_width if spec.qk_norm else 0))
    total = parameters * size
    for one in spec.linears:
        if one.name == "head":
            continue
        count = layers * _share(one.rows * one.columns + one.rows * one.bias, tensor)
        parameters += count
        total += layers * _packed(one.rows, one.columns, one.bias, precision, size, tensor)
    if embeds:
        table = _share(spec.vocabulary * d, tensor)
        places = spec.context * d if spec.position == "learned" else 0
        parameters += table + places
        total += places * size
        if precision == "int8":  # its pass packs the table too, with a scale a row
            in_head = on_cpu and heads and spec.tied_head  # where our own library looks it up
            total += 0 if in_head else _share(spec.vocabulary * (d + 4), tensor)
        else:
            total += table * size
    if heads:
        parameters += norm
        total += norm * size
        shared = spec.tied_head and embeds and precision in BYTES
        if not shared:
            total += _packed(spec.vocabulary, d, False, precision, size, tensor)
        if not (spec.tied_head and embeds):
            parameters += _share(spec.vocabulary * d, tensor)
    return parameters, total


def _packed(rows: int, columns: int, bias: bool, precision: str, size: int, tensor: int) -> int:
    if precision == "int8":
        return _share(int8_bytes(rows, columns, bias), tensor)
    if precision == "int4" and columns % INT4_GROUP == 0:
        return _share(int4_bytes(rows, columns, bias, INT4_GROUP), tensor)
    return _share((rows * columns + rows * bias) * size, tensor)


def _share(count: int, tensor: int) -> int:
    return -(-count // tensor)
