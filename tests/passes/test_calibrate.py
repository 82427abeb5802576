"""Calibration: its sums against those of hooks on plain forward passes, and what it holds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gptcore.errors import Cancelled, InvalidInput, NumericalError
from gptcore.model import GPT
from gptcore.passes import calibrate as module
from gptcore.passes.base import PassContext
from gptcore.passes.calibrate import Statistics, calibrate, text_for, text_hash
from gptcore.passes.quantize import Int8
from gptcore.spec import ModelSpec
from tests.passes.small import GPT2, LLAMA, SHAPES, UNTIED, logits, made, placed, text

every_shape = pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)


def silent(ratio: float) -> None:
    pass


def seen_by(model: GPT, ids: torch.Tensor, **how: object) -> dict[str, Statistics]:
    """Return what each layer was given, converting nothing."""
    found: dict[str, Statistics] = {}
    calibrate(
        model, ids, lambda name, linear, seen: found.update({name: seen}), progress=silent, **how
    )
    return found


def inputs_of(model: GPT, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return every input of every linear layer over plain forward passes, (tokens, I)."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = [
        one.register_forward_pre_hook(
            lambda _, given, name=name: found.setdefault(name, []).append(given[0].flatten(0, -2))
        )
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear)
    ]
    for rows in ids.split(16):
        logits(model, rows)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


@every_shape
def test_the_sums_are_those_of_plain_forward_passes(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of another size than the plain passes', so only float rounding differs: 1e-4."""
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 5 * 48)
    model, ids = made(spec), text(spec)
    inputs = inputs_of(model, ids)
    found = seen_by(model, ids, statistics=("hessian", "moments"), head=True)
    assert list(found) == [*(name for name, _ in model.linears()), "head"]
    for name, seen in found.items():
        x = inputs[name]
        assert seen.tokens == len(x) == ids.numel()
        mean = x.T @ x / len(x)
        assert torch.allclose(seen.hessian, mean, rtol=1e-4, atol=1e-4 * mean.abs().max())
        assert torch.allclose(seen.rms, x.square().mean(0).sqrt(), rtol=1e-3, atol=1e-5)
        assert torch.allclose(seen.mean_abs, x.abs().mean(0), rtol=1e-3, atol=1e-5)
        assert torch.allclose(seen.low, x.amin(0), rtol=1e-3, atol=1e-4)
        assert torch.allclose(seen.absmax, x.abs().amax(0), rtol=1e-3, atol=1e-4)


def test_layers_with_one_input_share_one_sum() -> None:
    found = seen_by(made(LLAMA), text(LLAMA))
    first = "blocks.1.attention."
    assert found[f"{first}q"] is found[f"{first}k"] is found[f"{first}v"]
    assert found["blocks.1.mlp.gate"] is found["blocks.1.mlp.up"]
    assert len({id(seen) for seen in found.values()}) == 4 * LLAMA.layers
    assert found[f"{first}q"].low is None  # not asked for


def test_moments_alone_hold_no_matrix() -> None:
    found = seen_by(made(GPT2), text(GPT2), statistics=("moments",))
    assert all(seen.hessian is None for seen in found.values())
    assert all(seen.rms.shape == (48,) for name, seen in found.items() if ".mlp.up" in name)


@every_shape
def test_a_block_is_calibrated_on_what_converted_ones_put_out(spec: ModelSpec) -> None:
    """Every layer of the first block is halved; the sums of the second are the halved model's."""
    model, ids = made(spec), text(spec)
    halved = copy.deepcopy(model)
    for _, linear in halved.linears():
        linear.weight.mul_(0.5)
    expected, plain = inputs_of(halved, ids), inputs_of(model, ids)
    found: dict[str, Statistics] = {}

    def halve(name: str, linear: nn.Linear, seen: Statistics) -> nn.Module:
        found[name] = seen
        fresh = copy.deepcopy(linear)
        fresh.weight.mul_(0.5)
        return fresh

    calibrate(model, ids, halve, progress=silent)
    assert torch.allclose(logits(model, ids[:2]), logits(halved, ids[:2]), atol=1e-4)
    for name in ("blocks.1.attention.q", "blocks.2.attention.q"):
        rms = expected[name].square().mean(0).sqrt()
        assert torch.allclose(found[name].rms, rms, rtol=1e-2, atol=1e-3)
        assert not torch.allclose(
            found[name].rms, plain[name].square().mean(0).sqrt(), rtol=1e-2, atol=1e-3
        )


def test_layers_that_are_not_wanted_are_not_visited() -> None:
    found = seen_by(made(LLAMA), text(LLAMA), wanted=lambda name: name.endswith(".v"))
    assert list(found) == [f"blocks.{i}.attention.v" for i in range(3)]


def test_no_hook_is_left_behind_even_where_a_visit_fails() -> None:
    model = made(LLAMA)

    def fail(name: str, linear: nn.Linear, seen: Statistics) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        calibrate(model, text(LLAMA), fail, progress=silent)
    assert not any(one._forward_pre_hooks for one in model.modules())


def test_progress_rises_from_block_to_block_up_to_one() -> None:
    told: list[float] = []
    calibrate(made(LLAMA), text(LLAMA), lambda *_: None, progress=told.append, head=True)
    assert told == sorted(told)
    assert 0 < told[0] <= 0.1  # a batch of the first of four stops
    assert told[-1] == 1.0


def test_hidden_states_are_there_once_and_no_logits() -> None:
    """What is alive between two batches: the hidden states, and not those of every block."""
    model, ids = made(LLAMA), text(LLAMA)
    text_states = module.Residual(model, ids)
    before = [x.data_ptr() for x in text_states.batches]
    text_states.advance(0, progress=silent)
    assert sum(x.numel() for x in text_states.batches) == ids.numel() * LLAMA.width
    assert [x.data_ptr() for x in text_states.batches] != before


def test_nan_out_of_a_block_is_named() -> None:
    model = made(UNTIED)
    model.blocks[1].mlp.down.bias[3] = float("nan")
    with pytest.raises(NumericalError, match="came out of block 1 on the calibration text"):
        calibrate(model, text(UNTIED), lambda *_: None, progress=silent)


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (torch.zeros(3, 0, dtype=torch.long), "an array of sequences × tokens, not (3, 0)"),
        (torch.zeros(2000, dtype=torch.long), "an array of sequences × tokens, not (2000,)"),
        (torch.zeros(20, 129, dtype=torch.long), "129 tokens and this model reads at most 128"),
        (torch.full((20, 100), 199), "token id 199, which is not in the vocabulary of 199"),
        (torch.full((20, 100), -1), "token id -1, which is not in the vocabulary of 199"),
    ],
    ids=str,
)
def test_a_text_that_does_not_fit_is_refused_in_a_sentence(
    ids: torch.Tensor, sentence: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        calibrate(made(LLAMA), ids, lambda *_: None, progress=silent)
    assert sentence in str(refused.value)


def test_no_text_and_a_short_one_are_refused_in_a_sentence() -> None:
    context = PassContext(placement=placed())
    with pytest.raises(InvalidInput, match=r"^8-bit weights .* choose a calibration text\.$"):
        text_for(Int8(), context)
    context.calibration_ids = torch.zeros(3, 100, dtype=torch.long)
    with pytest.raises(InvalidInput, match=r"has 300 tokens, and 8-bit .* needs 1,024 at least"):
        text_for(Int8(), context)
    assert text_for(Int8(), context, least=300) is context.calibration_ids


def test_the_hash_of_a_text_is_that_of_its_ids_and_their_arrangement() -> None:
    ids = torch.arange(12)
    assert text_hash(ids.view(3, 4)) == text_hash(ids.view(3, 4).int())
    assert text_hash(ids.view(3, 4)) != text_hash(ids.view(4, 3))
    assert text_hash(ids.view(3, 4)) != text_hash(ids.flip(0).view(3, 4))
    assert text_hash(ids.view(3, 4)).startswith("sha256:")
