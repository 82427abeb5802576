"""Distillation: what a teacher expects after every token, kept on disk, and the student's distance.

Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531: the student's cross-entropy with the text, and
its KL divergence from the teacher with both softened by a temperature t, times t² so that the two
gradients stay of one size. Hidden states: FitNets (Romero et al. 2014, arXiv:1412.6550), without a
projection, so widths must be equal.

The teacher is asked once for every window of the training text. Its likeliest tokens are kept with
their log-probabilities at t, in 16 bits; the rest of the vocabulary counts as one further outcome.
So the divergence is that of a coarser distribution: at most the whole one, and 0 where both agree.

Letters of shapes: B sequences, T tokens, V vocabulary, K kept tokens, W width.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptcore.errors import InvalidInput, StoreError
from gptcore.paths import cache_dir
from gptcore.spec import ModelSpec
from gptcore.train.origin import Origin
from gptcore.train.settings import Training
from gptcore.train.tokens import Data
from gptcore.train.vocabulary import tokenizer_id

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gptcore.model import GPT

LEAST = 1e-12
"""No probability's logarithm is taken as lower than this one's."""


class Teacher:
    """Answers what it expects in a window; what it said once is read from disk."""

    def __init__(
        self,
        model: GPT,
        student: GPT,
        *,
        id: str,
        data: Data,
        settings: Training,
        window: int,
        autocast: torch.autocast,
    ) -> None:
        self._model = model.eval()
        self._settings, self._window, self._autocast = settings, window, autocast
        self._kept = _Kept(id, data, settings, window, model.spec.vocabulary)
        self._seen: list[Tensor] = []
        """The student's hidden states of the last forward pass."""
        if settings.hidden_ratio:
            for block in student.blocks:
                block.register_forward_hook(self._see)
        self._layers = matched_layers(len(student.blocks), len(model.blocks))

    def _see(self, module: torch.nn.Module, given: Any, out: Tensor) -> None:
        if module.training:
            self._seen.append(out)

    def loss(self, begins: Sequence[int], inputs: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the KL divergence to the teacher, times t², and the distance of hidden states.

        Args:
            begins: where the windows stand in the training text.
            inputs: (B, T) int64, these windows.
            logits: (B, T, V) of the student, with their gradient.

        Returns:
            Two scalars with gradients; the second is 0 where hidden states are not matched.
        """
        import torch

        hidden: list[Tensor] = []
        if self._settings.hidden_ratio or not self._kept.has(begins):
            with torch.no_grad(), self._autocast, _watched(self._model, hidden):
                expected = self._model(inputs)
            self._kept.keep(begins, *self.softened(expected))
        ids, expected_log = (one.to(logits.device) for one in self._kept.read(begins))
        near = divergence(ids, expected_log, logits, self._settings.teaching_temperature)
        far = logits.new_zeros(())
        for mine, at in zip(self._seen, self._layers, strict=False):
            his = hidden[at].float()
            far = far + (mine.float() - his).square().mean() / his.square().mean()
        self._seen.clear()
        return near, far / len(self._layers)

    def softened(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the likeliest tokens, (B, T, K), and the logs of ``divergence``, (B, T, K+1)."""
        import torch

        log = (logits.float() / self._settings.teaching_temperature).log_softmax(-1)
        kept, ids = log.topk(min(self._settings.teaching_top, log.shape[-1]), dim=-1)
        rest = log.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        return ids, torch.cat([kept, rest], dim=-1).clamp_min(math.log(LEAST))


def divergence(ids: Tensor, expected: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher ‖ student) at a temperature, times its square, mean over all tokens.

    Args:
        ids: (B, T, K) int64, the teacher's likeliest tokens.
        expected: (B, T, K+1), logs of their probabilities and of the rest's; made to sum to 1.
        logits: (B, T, V) of the student.
        temperature: by which both are softened.
    """
    import torch

    expected = expected.float().log_softmax(-1)
    mine = (logits.float() / temperature).log_softmax(-1).gather(2, ids)  # (B, T, K)
    rest = (1.0 - mine.exp().sum(-1, keepdim=True)).clamp_min(LEAST).log()
    difference = expected - torch.cat([mine, rest], dim=-1)
    return temperature**2 * (expected.exp() * difference).sum(-1).mean()


def matched_layers(student: int, teacher: int) -> list[int]:
    """Return the teacher's layer for each of the student's: evenly spread, the last to the last."""
    return [round((at + 1) * teacher / student) - 1 for at in range(student)]


def require_teacher(
    teacher: Origin, student: ModelSpec, tokenizer: str, settings: Training
) -> None:
    """Refuse a teacher that the student cannot learn from.

    Raises:
        InvalidInput: it reads other tokens, fewer at once, or its hidden states differ in width.
    """
    spec = teacher.spec
    if tokenizer_id(teacher.directory) != tokenizer or spec.vocabulary != student.vocabulary:
        raise InvalidInput(
            f"{teacher.name} reads other tokens than the student: a student needs its teacher's "
            "tokenizer."
        )
    window = min(settings.window or student.context, student.context)
    if window > spec.context:
        raise InvalidInput(
            f"{teacher.name} reads at most {spec.context:,} tokens at once, and a sequence has "
            f"{window:,}: choose a shorter window."
        )
    if settings.hidden_ratio and spec.width != student.width:
        raise InvalidInput(
            f"Hidden states of width {student.width} cannot be matched with {teacher.name}'s of "
            f"{spec.width}: choose the same width, or match none."
        )


class _Kept:
    """The teacher's answers on disk: mapped, filled window by window, good for any later training.

    ``done`` has one byte a window, written after the window's numbers: what a killed process left
    half-written is not done.
    """

    def __init__(
        self, id: str, data: Data, settings: Training, window: int, vocabulary: int
    ) -> None:
        self._window = window
        count = max(1, (data.train.tokens - 1) // window)
        top = min(settings.teaching_top, vocabulary)
        wide = vocabulary > 2**16
        key = repr((id, data.train.sha256, window, top, settings.teaching_temperature))
        folder = cache_dir() / "teachers" / hashlib.sha256(key.encode()).hexdigest()[:24]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._ids = _mapped(folder / "ids", (count, window, top), "u4" if wide else "u2")
            self._log = _mapped(folder / "log", (count, window, top + 1), "f2")
            self._done = _mapped(folder / "done", (count,), "u1")
        except OSError as error:
            raise StoreError(
                f"The teacher's answers could not be kept in {folder.parent}: "
                f"{error.strerror or error}. Make room, or name another data folder in GPTLAB_DATA."
            ) from None

    def has(self, begins: Sequence[int]) -> bool:
        return all(self._done[begin // self._window] for begin in begins)

    def keep(self, begins: Sequence[int], ids: Tensor, log: Tensor) -> None:
        for row, begin in enumerate(begins):
            at = begin // self._window
            self._ids[at] = ids[row].cpu().numpy()
            self._log[at] = log[row].cpu().numpy()
            self._done[at] = 1

    def read(self, begins: Sequence[int]) -> tuple[Tensor, Tensor]:
        import torch

        at = [begin // self._window for begin in begins]
        return (
            torch.from_numpy(self._ids[at].astype(np.int64)),
            torch.from_numpy(self._log[at].astype(np.float32)),
        )


def _mapped(file: Path, shape: tuple[int, ...], kind: str) -> np.memmap[Any, Any]:
    if not file.exists():
        with file.open("ab") as made:
            made.truncate(int(np.prod(shape)) * np.dtype(kind).itemsize)
    return np.memmap(file, dtype=kind, mode="r+", shape=shape)


@contextlib.contextmanager
def _watched(model: GPT, hidden: list[Tensor]) -> Iterator[None]:
    """Collect what every block gives, while the context lasts."""
    hooks = [
        block.register_forward_hook(lambda module, given, out: hidden.append(out))
        for block in model.blocks
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
