"""How a model is computed, with the same numbers: compiled or not, and by which operations.

The cache is always static here (allocated once for a request), and threads belong to the placement:
neither is a choice of this pass. What compiling takes is spent while the pass runs, on a text of
nothing, and is counted as the pass's seconds, apart from every later measurement.

Error: compiled code and the ways to compute attention sum in different orders: on small models in
fp32, logits moved by less than 1e-5 of the largest.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import proxy

from pydantic import Field

from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.passes.base import Pass, PassContext, Stage
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT

COMPILERS = ("c++", "g++", "clang++")
BACKENDS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
"""torch's names of the ways to compute attention."""
WARM_UP_TOKENS = (64, 37, 1)
"""Lengths of the texts of nothing: the second makes the length free, the third is decode's."""


class Runtime(Pass):
    """Other operations for the same numbers."""

    name: ClassVar[str] = "runtime"
    stage: ClassVar[Stage] = Stage.RUNTIME
    title: ClassVar[str] = "Runtime"
    mechanism: ClassVar[str] = (
        "the same bytes and the same sums, by fewer or other operations: fused kernels"
    )

    decode: Literal["native", "torch"] = Field(
        "native",
        title="Decode",
        description="On a CPU a token is computed in one call of this program's own library where "
        "that can be; torch takes an operation for each step, and shows what a format alone gives.",
    )
    attention: Literal["auto", "flash", "efficient", "math"] = Field(
        "auto",
        title="Attention",
        description="How torch computes attention: the fastest way it has, in pieces (flash, "
        "efficient), or written out (math), which holds all scores in memory.",
    )
    compile: bool = Field(
        False,
        title="Compile",
        description="Let torch.compile fuse what lies between the matrices of each MLP; takes half "
        "a minute at first, which is counted apart.",
    )

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return why this cannot run there, or None."""
        if self.attention == "efficient" and not placement.device.startswith("cuda"):
            return f"efficient attention is for CUDA, not {placement.device}: choose flash or auto."
        if self.attention != "auto" and placement.device == "mps":
            return "mps has one way to compute attention: choose auto."
        if self.compile and placement.device == "cpu" and _compiler() is None:
            return (
                "torch.compile needs a C++ compiler on a CPU, and there is none (Debian: apt "
                "install g++); leave compiling out."
            )
        return None

    def caution(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return what compiling leaves out."""
        if self.compile and placement.device == "cpu" and self.decode == "native":
            return "Compiled is what reads prompts; decode stays with the native step."
        return None

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Let the model compute so; its weights stay as they are.

        Raises:
            InvalidInput: it cannot run here, or torch.compile cannot do this model.
        """
        if blocked := self.blocked_by(model.spec, context.placement):
            raise InvalidInput(f"{self.title} cannot run here: {blocked}")
        if self.decode == "torch":
            model.native = False
        if self.attention != "auto":
            held: Any = proxy(model)  # a model that held itself would outlive its last use
            forward = partial(_within, type(model).forward, BACKENDS[self.attention], held)
            model.forward = forward  # type: ignore[method-assign]
        if self.compile:
            _compile(model, context)
        context.progress(1.0)
        return model


def _within(forward: Any, backend: str, model: GPT, *args: Any, **kwargs: Any) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        found: Tensor = forward(model, *args, **kwargs)
    return found


def _compile(model: GPT, context: PassContext) -> None:
    """Compile every MLP, which is one and the same code, and run the first to have it ready."""
    import torch
    from torch import nn

    from gptcore.linears.clustered import ClusteredLinear
    from gptcore.linears.sparse import SparseLinear

    mlps = [block.get_submodule("mlp") for block in model.blocks]
    plain = nn.Linear | SparseLinear | ClusteredLinear
    if not all(isinstance(one, plain) for mlp in mlps for one in mlp.children()):
        raise InvalidInput(
            "torch.compile cannot look into packed layers: leave compiling out, or the pass that "
            "packed them."
        )
    weight = model.norm.get_parameter("weight")
    for mlp in mlps:
        mlp.compile(dynamic=True)
    try:
        with torch.inference_mode():
            for done, tokens in enumerate(WARM_UP_TOKENS):
                context.progress(done / len(WARM_UP_TOKENS))
                nothing = weight.new_zeros(1, tokens, model.spec.width)
                for mlp in mlps:
                    mlp(nothing)
    except RuntimeError as error:
        said = str(error).strip().splitlines()
        raise InvalidInput(
            f"torch.compile could not do this model ({said[0][:200] if said else 'no reason'}): "
            "leave compiling out."
        ) from None


def _compiler() -> str | None:
    """Return the C++ compiler that torch would call, or None."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, (named, *COMPILERS) if named else COMPILERS)), None)
