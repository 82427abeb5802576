"""How much each token of a text speaks for the next one: two methods, and how far to trust them.

leaving out   the text is read again without one token; its score is how much the log-probability of
              the prediction falls. It is what the model really does, token by token.
gradients     integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365, by captum) along the
              straight line from a baseline to the embeddings. The scores of all tokens should add
              up to the difference between the two ends; how far they miss it is the completeness
              error. On deep models with RMSNorm the line crosses a rough landscape and the error
              stays far above 5 % with any number of steps that one would wait for: SmolLM2 shows
              20 to 1,000 %. Above 5 % the scores are called unreliable, and leaving out leads.

Faithfulness is measured by deletion: tokens are taken out in the order of a method's scores, and
the mean probability of the prediction over the curve is held against that of random orders. A
method that found what matters lets it fall sooner.

Letters of shapes: B texts, T tokens, W width, V vocabulary.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gptcore.errors import InvalidInput
from gptcore.explain.excerpt import batch_of, stream_of

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT

MOST_TOKENS = 96
RELIABLE_RATIO = 0.05
"""The largest completeness error at which integrated gradients are shown as reliable."""
DELETIONS = 24
"""Points of a deletion curve at most, beside the whole text."""
RANDOM_ORDERS = 5
AT_ONCE = 2048
"""Tokens that run through the model together."""
PROJECTIONS = frozenset({"q", "k", "v", "out", "gate", "up", "down"})
LINEAR_RATIO = 0.1
"""How far the gradient of a layer with rounded inputs may miss that of a linear one."""
NO_GRADIENT = (
    "This variant has no gradients: {layer} computes with packed weights. Leaving tokens out works "
    "without them; for gradients choose fp32 or bf16."
)

Baseline = Literal["mean", "zero"]
Tell = Callable[[float], None]


def silent(ratio: float) -> None:
    """Report nothing."""


def log_probability(model: GPT, texts: Sequence[Sequence[int]], target: int) -> list[float]:
    """Return the natural log of the probability that ``target`` comes next after each text.

    Args:
        model: on its device.
        texts: token ids, all of one length, at least 1.
        target: a token id.
    """
    import torch

    with torch.inference_mode():
        batch = batch_of(model, texts)
        logits = model(batch, last_only=True)[:, -1]  # (B, V)
        found: list[float] = logits.float().log_softmax(-1)[:, target].tolist()
        return found


def in_batches(
    model: GPT, texts: Sequence[Sequence[int]], target: int, tell: Tell = silent
) -> list[float]:
    """Return ``log_probability`` of many texts of any lengths, as many at once as is good."""
    found = [0.0] * len(texts)
    waiting = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    done = 0
    while done < len(texts):
        length = len(texts[waiting[done]])
        most = max(1, AT_ONCE // length)
        batch = [i for i in waiting[done : done + most] if len(texts[i]) == length]
        for i, one in zip(
            batch, log_probability(model, [texts[i] for i in batch], target), strict=True
        ):
            found[i] = one
        done += len(batch)
        tell(done / len(texts))
    return found


def leave_one_out(
    model: GPT, ids: Sequence[int], target: int, *, tell: Tell = silent
) -> list[float]:
    """Return how much the log-probability of ``target`` falls without each token, in nats.

    The rest of the text closes up, so what follows stands one position earlier.

    Args:
        model: on its device.
        ids: T token ids, at least 2.
        target: the token whose probability is explained.
        tell: told the share done; may raise to stop.
    """
    whole = log_probability(model, [ids], target)[0]
    without = [[*ids[:i], *ids[i + 1 :]] for i in range(len(ids))]
    return [whole - one for one in in_batches(model, without, target, tell)]


@dataclass(frozen=True, slots=True)
class Gradients:
    """What integrated gradients found."""

    scores: list[float]
    """Nats of log-probability that each token brings, from the baseline to the text."""
    difference: float
    """Log-probability of the text − that of the baseline: what the scores should add up to."""
    steps: int

    @property
    def completeness_error(self) -> float:
        """|Σ scores − difference| ÷ |difference|."""
        return abs(sum(self.scores) - self.difference) / max(abs(self.difference), 1e-12)

    @property
    def reliable(self) -> bool:
        """Whether the error is at most 5 %."""
        return self.completeness_error <= RELIABLE_RATIO


def integrated_gradients(
    model: GPT,
    ids: Sequence[int],
    target: int,
    *,
    steps: int = 64,
    baseline: Baseline = "mean",
    tell: Tell = silent,
) -> Gradients:
    """Return integrated gradients of log p(target) over the embeddings, by captum.

    Args:
        model: on its device; its weights need no gradients.
        ids: T token ids.
        target: the token whose probability is explained.
        steps: points on the line, by Gauss–Legendre.
        baseline: where the line begins: the mean embedding of the vocabulary at every position, or
            the zero vector.
        tell: told the share done; may raise to stop.

    Raises:
        InvalidInput: a layer of this variant has no gradient.
    """
    import torch
    from captum.attr import IntegratedGradients

    _require_gradients(model, ids)
    done = 0

    def score(embeddings: Tensor) -> Tensor:
        nonlocal done
        found = _after_embeddings(model, embeddings)[:, target]
        done += len(embeddings)
        tell(min(1.0, done / (steps + 2)))
        return found

    with torch.enable_grad():
        start = _embedded(model, ids)  # (1, T, W)
        begin = (_mean_embedding(model) if baseline == "mean" else 0 * start[0, 0]).expand_as(start)
        parts = IntegratedGradients(score).attribute(
            start, begin, n_steps=steps, internal_batch_size=max(1, AT_ONCE // len(ids))
        )
    with torch.no_grad():
        difference = score(start) - score(begin)
    return Gradients(
        scores=[float(one) for one in parts[0].float().sum(-1)],
        difference=float(difference[0]),
        steps=steps,
    )


@dataclass(frozen=True, slots=True)
class Deletion:
    """The probability of the prediction while tokens are taken out."""

    removed: list[int]
    """Number of tokens taken out at each point, from 0."""
    probabilities: list[float]

    @property
    def mean(self) -> float:
        """Mean over the curve: the area under it, from 0 to 1; low where what matters went first.

        By the trapezoid rule over the number of tokens taken out.
        """
        area = sum(
            (b - a) * (p + q) / 2
            for a, b, p, q in zip(
                self.removed,
                self.removed[1:],
                self.probabilities,
                self.probabilities[1:],
                strict=False,
            )
        )
        span = self.removed[-1] - self.removed[0]
        return area / span if span else self.probabilities[0]


def deletion_curves(
    model: GPT,
    ids: Sequence[int],
    target: int,
    orders: Sequence[Sequence[int]],
    *,
    tell: Tell = silent,
) -> list[Deletion]:
    """Return a curve for each order in which the tokens are taken out, all but the last of it.

    Args:
        model: on its device.
        ids: T token ids, at least 2.
        target: the token whose probability is watched.
        orders: each the T positions, what goes first standing first.
        tell: told the share done; may raise to stop.
    """
    import math

    most = len(ids) - 1
    points = sorted(
        {round(i * most / min(DELETIONS, most)) for i in range(min(DELETIONS, most) + 1)}
    )
    texts = [
        [id for position, id in enumerate(ids) if position not in set(order[:gone])]
        for order in orders
        for gone in points
    ]
    found = [math.exp(one) for one in in_batches(model, texts, target, tell)]
    size = len(points)
    return [Deletion(points, found[i : i + size]) for i in range(0, len(found), size)]


def by_score(scores: Sequence[float]) -> list[int]:
    """Return the positions, the largest score first."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def random_orders(length: int, seed: int = 0) -> list[list[int]]:
    """Return the orders that a method is held against."""
    drawn = random.Random(seed)
    return [drawn.sample(range(length), length) for _ in range(RANDOM_ORDERS)]


def _after_embeddings(model: GPT, embeddings: Tensor) -> Tensor:
    """Return log-probabilities of the token after texts given as embeddings, (B, V) float32.

    Args:
        model: on its device.
        embeddings: (B, T, W), before positions are added.
    """
    import torch

    hook = model.embedding.register_forward_hook(lambda module, args, made: embeddings)
    try:
        shape = embeddings.shape[:2]
        nothing = torch.zeros(shape, dtype=torch.long, device=embeddings.device)
        logits: Tensor = model(nothing, last_only=True)[:, -1]
    finally:
        hook.remove()
    return logits.float().log_softmax(-1)


def _embedded(model: GPT, ids: Sequence[int]) -> Tensor:
    """Return the embeddings of a text before positions are added, (1, T, W), without gradients."""
    import torch

    with torch.no_grad():
        found: Tensor = model.embedding(batch_of(model, [ids]))
        return found.detach().clone()


def _mean_embedding(model: GPT) -> Tensor:
    """Return the mean embedding of the vocabulary, (W,), in the stream's dtype."""
    import torch

    vocabulary = range(model.spec.vocabulary)
    parts = [
        _embedded(model, vocabulary[begin : begin + AT_ONCE])[0].float().sum(0)
        for begin in range(0, len(vocabulary), AT_ONCE)
    ]
    return (torch.stack(parts).sum(0) / len(vocabulary)).to(stream_of(model).dtype)


def _require_gradients(model: GPT, ids: Sequence[int]) -> None:
    """Refuse a model in which a layer has no true gradient, which would only make scores wrong.

    Raises:
        InvalidInput: naming the first such layer.
    """
    import torch
    from torch import nn

    given: dict[str, tuple[nn.Module, Tensor]] = {}

    def keep(name: str) -> Callable[[Any, Any], None]:
        return lambda module, args: given.update({name: (module, args[0])})

    hooks = [
        module.register_forward_pre_hook(keep(f"blocks.{name}"))
        for name, module in model.blocks.named_modules()
        if name.rpartition(".")[2] in PROJECTIONS and type(module) is not nn.Linear
    ]
    try:
        with torch.no_grad():
            _after_embeddings(model, _embedded(model, ids))
    finally:
        for hook in hooks:
            hook.remove()
    for name, (module, x) in given.items():
        if not _has_gradient(module, x):
            raise InvalidInput(NO_GRADIENT.format(layer=name))


def _has_gradient(linear: Any, x: Tensor) -> bool:
    """Return whether a layer that stands for a linear one has the gradient of a linear one.

    Of f(x) = Wx + b the gradient gives back f(x) − f(0), whatever W is. Some operations only seem
    to have a gradient: they let the flow pass by or end in silence.
    """
    import torch

    x = x.detach().clone().requires_grad_()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            made = linear(x)
            change = (made - linear(torch.zeros_like(x))).detach()
            (gradient,) = torch.autograd.grad(made, x, change)
        except (RuntimeError, Warning):
            return False
    whole = float(change.float().pow(2).sum())
    return abs(float((gradient.float() * x.float()).sum()) - whole) <= LINEAR_RATIO * whole
