import math

import pytest
import torch
from torch import nn

from gptcore.errors import Cancelled, InvalidInput
from gptcore.explain.attribution import (
    Deletion,
    by_score,
    deletion_curves,
    in_batches,
    integrated_gradients,
    leave_one_out,
    log_probability,
    random_orders,
)
from gptcore.model import GPT
from tests.explain.models import IDS, SHAPES, model_of

TARGET = 101
TEXT = IDS[:12]


def plainly(model: GPT, ids: list[int]) -> float:
    """The log-probability of the target by one full forward pass."""
    with torch.inference_mode():
        return float(model(torch.tensor([ids]))[0, -1].log_softmax(-1)[TARGET])


@pytest.mark.parametrize("name", SHAPES)
def test_leaving_out_is_the_fall_of_the_log_probability(name: str) -> None:
    model = model_of(SHAPES[name])
    whole = plainly(model, TEXT)
    wanted = [whole - plainly(model, [*TEXT[:i], *TEXT[i + 1 :]]) for i in range(len(TEXT))]
    assert leave_one_out(model, TEXT, TARGET) == pytest.approx(wanted, abs=1e-4)


def test_texts_of_many_lengths_come_back_in_their_order() -> None:
    model = model_of()
    texts = [TEXT[:5], TEXT, TEXT[:5][::-1], TEXT[:2], TEXT[1:], TEXT[:1]]
    wanted = [plainly(model, text) for text in texts]
    assert in_batches(model, texts, TARGET) == pytest.approx(wanted, abs=1e-4)


def riemann(model: GPT, ids: list[int], steps: int) -> list[float]:
    """Integrated gradients from the mean embedding, by the midpoint rule and nothing else."""
    weight = model.embedding.weight
    start = weight[ids][None]
    begin = weight.mean(0).expand_as(start)
    total = torch.zeros_like(start)
    for step in range(steps):
        point = begin + (step + 0.5) / steps * (start - begin)
        point = point.detach().requires_grad_()
        x = point
        if model.spec.position == "learned":
            x = x + model.positions.weight[: len(ids)]
        _, where = model.enter(torch.tensor([ids]))
        for layer, block in enumerate(model.blocks):
            x = block(x, where, None, layer)
        model.head(model.norm(x))[0, -1].log_softmax(-1)[TARGET].backward()
        assert point.grad is not None
        total += point.grad / steps
    return (total * (start - begin)).sum(-1)[0].tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_captums_gradients_are_those_of_a_plain_sum(name: str) -> None:
    """The two rules of integration differ, so both need enough steps to be near the integral."""
    model = model_of(SHAPES[name], scale=4.0)
    found = integrated_gradients(model, TEXT, TARGET, steps=128)
    assert found.scores == pytest.approx(riemann(model, TEXT, 400), abs=0.01, rel=0.03)


def test_scores_add_up_on_a_smooth_model_and_the_error_tells_so() -> None:
    model = model_of(scale=4.0)
    found = integrated_gradients(model, TEXT, TARGET, steps=64)
    mean = model.embedding.weight.mean(0)
    hook = model.embedding.register_forward_hook(lambda m, a, made: mean.expand_as(made))
    from_baseline = plainly(model, TEXT)
    hook.remove()
    assert found.difference == pytest.approx(plainly(model, TEXT) - from_baseline, abs=1e-4)
    assert found.completeness_error < 0.05
    assert found.reliable


def test_scores_that_miss_the_difference_are_called_unreliable() -> None:
    found = integrated_gradients(model_of(scale=25.0), TEXT, TARGET, steps=8)
    missed = abs(sum(found.scores) - found.difference) / abs(found.difference)
    assert found.completeness_error == pytest.approx(missed)
    assert missed > 0.05
    assert not found.reliable


def test_a_layer_without_gradients_is_named_and_not_passed_over() -> None:
    class Packed(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = (linear,)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.linear[0](x)

    model = model_of()
    model.blocks[1].mlp.up = Packed(model.blocks[1].mlp.up)
    with pytest.raises(InvalidInput, match=r"blocks\.1\.mlp\.up computes with packed weights"):
        integrated_gradients(model, TEXT, TARGET)
    assert len(leave_one_out(model, TEXT, TARGET)) == len(TEXT)


def test_gradients_leave_no_trace_in_the_model() -> None:
    model = model_of()
    before = plainly(model, TEXT)
    integrated_gradients(model, TEXT, TARGET, steps=8)
    assert plainly(model, TEXT) == before
    assert all(one.grad is None and not one.requires_grad for one in model.parameters())


def test_deletion_takes_the_tokens_in_the_order_given() -> None:
    model = model_of()
    order = by_score(leave_one_out(model, TEXT, TARGET))
    (curve,) = deletion_curves(model, TEXT, TARGET, [order])
    assert curve.removed == list(range(len(TEXT)))  # one token stays
    for gone, found in zip(curve.removed, curve.probabilities, strict=True):
        kept = [id for i, id in enumerate(TEXT) if i not in order[:gone]]
        assert found == pytest.approx(math.exp(plainly(model, kept)), abs=1e-5)


def test_a_long_texts_curve_is_thinned_and_keeps_its_ends() -> None:
    model = model_of()
    (curve,) = deletion_curves(model, IDS * 2, TARGET, [list(range(len(IDS) * 2))])
    assert len(curve.removed) == 25
    assert (curve.removed[0], curve.removed[-1]) == (0, 2 * len(IDS) - 1)


def test_the_mean_of_a_curve_is_its_area() -> None:
    assert Deletion([0, 1, 3], [1.0, 0.0, 0.0]).mean == pytest.approx(0.5 / 3)
    assert Deletion([0, 2, 4], [0.2, 0.2, 0.2]).mean == pytest.approx(0.2)


def test_random_orders_are_orders_and_differ() -> None:
    orders = random_orders(20)
    assert all(sorted(one) == list(range(20)) for one in orders)
    assert len({tuple(one) for one in orders}) == len(orders)
    assert random_orders(20) == orders


def test_it_can_be_stopped() -> None:
    def tell(ratio: float) -> None:
        raise Cancelled("Cancelled.")

    with pytest.raises(Cancelled):
        integrated_gradients(model_of(), TEXT, TARGET, tell=tell)
    with pytest.raises(Cancelled):
        leave_one_out(model_of(), TEXT, TARGET, tell=tell)


@pytest.mark.smollm2
@pytest.mark.slow
def test_leaving_out_is_more_faithful_than_chance_on_a_real_model(smollm2_engine) -> None:
    """Its curve falls sooner than that of every random order, so no luck is in it."""
    engine = smollm2_engine
    ids = engine.tokenizer.encode("Rome is in Italy. The capital of France is")
    target = int(engine.next_logits(ids).argmax())
    assert engine.tokenizer.token_text(target) == " Paris"
    order = by_score(leave_one_out(engine.model, ids, target))
    ours, *chance = deletion_curves(engine.model, ids, target, [order, *random_orders(len(ids))])
    assert ours.mean < min(one.mean for one in chance)
    assert log_probability(engine.model, [ids], target)[0] > math.log(0.3)
