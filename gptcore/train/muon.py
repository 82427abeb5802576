"""Muon: the update of a matrix is its momentum made orthogonal, so that all directions learn.

torch's own does the same in bf16, which a CPU without such instructions computes ten times more
slowly than fp32; here the steps are in fp32, and matrices of one shape side by side.

Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", for method
and coefficients; Liu et al. 2025, arXiv:2502.16982, for scale and weight decay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial: steep at 0, so that few steps bring small singular values near 1."""
STEPS = 5
LIKE_ADAMW = 0.2
"""An update's root mean square, which is what AdamW's is."""


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices with the same singular vectors and singular values near 1.

    Args:
        matrices: (N, R, C), R at most C; one of zeros stays what it is.

    Returns:
        (N, R, C); the singular values lie between 0.5 and 1.5, unless they were below 1e-3 of the
        norm.
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum and decoupled weight decay."""

    def __init__(
        self, params: ParamsT, *, lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        """Take matrices alone.

        Args:
            params: matrices, or groups of them.
            lr: the learning rate.
            weight_decay: share of the rate by which a weight shrinks at each step.
            momentum: memory of the gradients.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for one in group["params"]:
                if one.grad is not None:
                    alike[min(one.shape), max(one.shape), one.device, one.dtype].append(one)
            for matrices in alike.values():
                self._change(matrices, group)
        return loss

    def _change(self, matrices: Iterable[Tensor], group: dict[str, Any]) -> None:
        """Change matrices of one shape, lying or standing."""
        matrices = list(matrices)
        ahead = []
        for one in matrices:
            assert one.grad is not None
            kept = self.state[one].setdefault("momentum", torch.zeros_like(one))
            kept.mul_(group["momentum"]).add_(one.grad)
            ahead.append(_lying(one.grad + group["momentum"] * kept))
        scale = LIKE_ADAMW * max(matrices[0].shape) ** 0.5
        for one, update in zip(matrices, orthogonal(torch.stack(ahead)), strict=True):
            one.mul_(1 - group["lr"] * group["weight_decay"])
            one.sub_(group["lr"] * scale * (update if one.shape == update.shape else update.mT))


def _lying(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
