"""Narrower blocks: real shapes, the best cut where it is known, least squares for the rest."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from gptcore.errors import InvalidInput, NumericalError
from gptcore.measure.memory import weight_bytes
from gptcore.model import GPT
from gptcore.passes import shrink
from gptcore.passes.low_rank import LowRank
from gptcore.passes.shrink import Shrink, cut_inputs, rows_of
from gptcore.spec import ModelSpec
from tests.passes.small import LLAMA, SHAPES, UNTIED, applied, kl, logits, made, placed, text

every_shape = pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)


def hessian_of(columns: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=random)
    x = (x + x.roll(1, 1)) * torch.logspace(-0.5, 0.5, columns)
    return x.T @ x / len(x)


def layer(rows: int, columns: int, seed: int = 1) -> nn.Linear:
    random = torch.Generator().manual_seed(seed)
    made = nn.Linear(columns, rows).requires_grad_(False)
    made.weight.copy_(torch.randn(rows, columns, generator=random))
    return made


def loss(weight: torch.Tensor, hessian: torch.Tensor, stay: torch.Tensor) -> float:
    """Return the squared error of the least squares weights on the inputs that stay, damped."""
    gap = weight.double().clone()
    gap[:, stay] -= least_squares(weight, hessian, stay)
    return (gap @ damped(hessian) * gap).sum().item()


def least_squares(weight: torch.Tensor, hessian: torch.Tensor, stay: torch.Tensor) -> torch.Tensor:
    exact = damped(hessian)
    return torch.linalg.solve(exact[stay][:, stay], exact[stay] @ weight.double().T).T


def damped(hessian: torch.Tensor) -> torch.Tensor:
    exact = hessian.double()
    return exact + 0.01 * exact.diagonal().mean() * torch.eye(len(exact))


@every_shape
@pytest.mark.parametrize(
    "fields", [{"neurons": 0.5}, {"groups": 0.5}, {"neurons": 0.7, "groups": 0.5}]
)
def test_a_shrunk_model_is_an_ordinary_one_of_the_new_spec(spec: ModelSpec, fields: dict) -> None:
    one = Shrink(**{"neurons": 1.0, **fields})
    model, coverage = applied(one, made(spec), text(spec))
    after = one.spec_after(spec)
    assert model.spec == after
    assert after.heads * spec.kv_heads == spec.heads * after.kv_heads
    fresh = GPT(after)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    ids = text(spec)[:2]
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(logits(fresh, ids), logits(model, ids), atol=1e-5)
    before = spec.weights_bytes("fp32")
    assert one.weights_bytes_after(spec, placed(), before) == weight_bytes(model)[0] < before
    assert 0 < coverage.effective_bits < 32
    assert coverage.total_weights == spec.matmul_parameters


@every_shape
def test_keeping_all_changes_no_logit(spec: ModelSpec) -> None:
    exact, ids = made(spec), text(spec)[:2]
    model, coverage = applied(Shrink(neurons=1.0), made(spec))
    assert logits(model, ids).equal(logits(exact, ids))
    assert coverage.ratio == 0.0


@pytest.mark.parametrize("size", [1, 2])
def test_the_first_to_go_is_the_one_that_costs_least(size: int) -> None:
    """Every group is tried, solving anew without it."""
    for seed in range(5):
        hessian, weight = hessian_of(8, seed), layer(6, 8, seed).weight
        n = 8 // size
        stays = [torch.tensor([i for i in range(8) if i // size != gone]) for gone in range(n)]
        costs = [loss(weight, hessian, stay) for stay in stays]
        stay, _ = cut_inputs(weight, hessian, size, n - 1)
        assert stay.equal(stays[costs.index(min(costs))])


def test_half_of_the_neurons_come_near_the_best_half() -> None:
    for seed in range(5):
        hessian, weight = hessian_of(8, seed), layer(6, 8, seed).weight
        every = [
            loss(weight, hessian, torch.tensor(stay))
            for stay in itertools.combinations(range(8), 4)
        ]
        ours = loss(weight, hessian, cut_inputs(weight, hessian, 1, 4)[0])
        assert ours <= 1.5 * min(every)
        assert 2 * ours < sorted(every)[len(every) // 2]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("rounds", [1, 4])
def test_what_stays_is_least_squares(
    size: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rounds it took, against solving once for all that stays."""
    monkeypatch.setattr(shrink, "ROUNDS", rounds)
    hessian, weight = hessian_of(24), layer(6, 24).weight
    stay, fitted = cut_inputs(weight, hessian, size, 12 // size)
    assert len(stay) == 12
    assert torch.allclose(fitted, least_squares(weight, hessian, stay), atol=1e-6)


def test_a_neuron_that_repeats_another_goes_without_a_trace() -> None:
    model, ids = made(LLAMA), text(LLAMA)
    for block in model.blocks:
        for name in ("gate", "up"):
            weight = getattr(block.mlp, name).weight
            weight[64:] = weight[:32]
    before = logits(model, ids[:4])
    model, _ = applied(Shrink(neurons=0.67), model, ids)
    assert model.spec.hidden == 64
    # The damping keeps 1 % from being exact.
    assert (logits(model, ids[:4]) - before).norm() < 0.05 * before.norm()


@every_shape
def test_refitting_beats_cutting(spec: ModelSpec) -> None:
    exact, other = made(spec), text(spec, seed=8)[:8]
    half = spec.model_copy(update={"hidden": spec.hidden // 3 * 2 // 32 * 32})
    ours, _ = applied(Shrink(neurons=half.hidden / spec.hidden), made(spec), text(spec))
    assert ours.spec.hidden == half.hidden
    cut = made(spec)
    stay = torch.arange(half.hidden)
    for block in cut.blocks:
        for name in ("gate", "up"):
            if hasattr(block.mlp, name):
                setattr(block.mlp, name, rows_of(getattr(block.mlp, name), stay))
        block.mlp.down.weight = nn.Parameter(block.mlp.down.weight[:, stay], requires_grad=False)
    assert kl(exact, ours, other) < 0.8 * kl(exact, cut, other)


def test_the_same_text_gives_the_same_model() -> None:
    one, two = (applied(Shrink(neurons=0.5), made(LLAMA), text(LLAMA))[0] for _ in range(2))
    assert one.blocks[2].mlp.down.weight.equal(two.blocks[2].mlp.down.weight)


def test_no_tensor_that_came_in_is_written_to() -> None:
    model = made(UNTIED)
    given = dict(model.named_parameters())
    copies = {name: tensor.clone() for name, tensor in given.items()}
    applied(Shrink(neurons=0.5, groups=0.5), model, text(UNTIED))
    assert all(tensor.equal(copies[name]) for name, tensor in given.items())


def test_nan_no_text_and_layers_of_an_earlier_pass_are_refused_in_a_sentence() -> None:
    model = made(LLAMA)
    model.blocks[0].mlp.down.weight[3, 5] = float("nan")
    with pytest.raises(NumericalError, match=r"^blocks\.0\.mlp\.down holds NaN"):
        applied(Shrink(neurons=0.5), model, text(LLAMA))
    with pytest.raises(InvalidInput, match="choose a calibration text"):
        applied(Shrink(neurons=0.5), made(LLAMA))
    model, _ = applied(LowRank(method="plain", share=0.5), made(LLAMA))
    with pytest.raises(InvalidInput, match=r"a LowRankLinear of an earlier pass"):
        applied(Shrink(neurons=0.5), model, text(LLAMA))


def test_a_share_that_rounds_to_all_is_cautioned() -> None:
    assert Shrink(neurons=0.9).caution(LLAMA, placed()) == (
        "90% of 96 neurons, rounded, are all of them."
    )
    assert Shrink(neurons=1.0, groups=0.9).caution(LLAMA, placed()) == (
        "90% of 2 head groups, rounded, are all of them."
    )
    assert Shrink(neurons=0.5).caution(LLAMA, placed()) is None
