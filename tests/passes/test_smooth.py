"""SmoothQuant with static ranges: what it folds, what it knows beforehand, what it is worth."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from gptcore.device import Placement
from gptcore.errors import InvalidInput, NumericalError
from gptcore.linears import resident_bytes
from gptcore.linears.quantized import StaticInt8Linear
from gptcore.measure.memory import weight_bytes
from gptcore.passes.calibrate import Statistics, calibrate
from gptcore.passes.quantize import Int8
from gptcore.passes.registry import pass_from_json
from gptcore.passes.smooth import Int8Static, expected_error, smoothing_scale
from tests.passes.small import (
    GPT2,
    LLAMA,
    SHAPES,
    UNTIED,
    applied,
    kl,
    logits,
    made,
    text,
    with_outliers,
)

every_shape = pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
pytestmark = pytest.mark.usefixtures("one_thread")


@every_shape
def test_every_layer_is_converted_and_the_bytes_are_as_predicted(spec) -> None:
    model = made(spec)
    before = weight_bytes(model)[0]
    model, coverage = applied(Int8Static(), model, text(spec))
    assert coverage.ratio == 1.0
    assert weight_bytes(model)[0] == Int8Static().weights_bytes_after(spec, Placement(), before)
    assert weight_bytes(model)[0] == resident_bytes(model)
    static = [one for one in model.modules() if isinstance(one, StaticInt8Linear)]
    assert len(static) == sum(shape.count for shape in spec.linears)


@every_shape
def test_without_smoothing_the_weights_are_those_of_int8(spec) -> None:
    """0 is the neutral setting: only the activations' ranges differ."""
    static, _ = applied(Int8Static(smoothing=0.0), made(spec), text(spec))
    dynamic, _ = applied(Int8(), made(spec))
    for name, one in static.named_modules():
        if isinstance(one, StaticInt8Linear):
            assert torch.equal(one.numbers().codes, dynamic.get_submodule(name).numbers().codes)


@every_shape
def test_ranges_are_those_of_the_text_after_smoothing(spec) -> None:
    """Seen by running the smoothed model's own float layers on the text again."""
    ids = text(spec)
    static, _ = applied(Int8Static(smoothing=0.0), made(spec), ids)
    known = {}
    calibrate(
        made(spec),
        ids,
        lambda name, linear, seen: known.update({name: seen}),
        progress=lambda share: None,
        statistics=("moments",),
        head=True,
    )
    for name, seen in known.items():
        layer = static.get_submodule(name)
        assert layer.low == pytest.approx(min(seen.low.min().item(), 0.0))
        assert layer.high == pytest.approx(max(seen.high.max().item(), 0.0))


def test_the_expected_error_is_that_of_rounding() -> None:
    """Within a fifth of what rounding inputs and weights really does to the outputs."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 64, generator=random) * torch.logspace(-1, 1, 64)
    weight = torch.randn(32, 64, generator=random)
    seen = Statistics(
        len(x), rms=x.square().mean(0).sqrt(), low=x.amin(0), high=x.amax(0), mean_abs=None
    )
    for scale in (torch.ones(64), x.abs().amax(0).sqrt()):
        step = float(((x / scale).max() - (x / scale).min()) / 255)
        inputs = ((x / scale) / step).round() * step
        rows = (weight * scale).abs().amax(1, keepdim=True) / 127
        rounded = ((weight * scale) / rows).round() * rows
        really = (inputs @ rounded.T - x @ weight.T).square().mean(0).sum().item()
        assert expected_error([weight], seen, scale) == pytest.approx(really, rel=0.2)


def test_smoothing_of_one_makes_all_channels_equally_large() -> None:
    absmax = torch.tensor([0.5, 4.0, 100.0])
    weights = [torch.ones(2, 3), torch.full((4, 3), 0.5)]
    assert torch.allclose(absmax / smoothing_scale(weights, absmax, 1.0), torch.ones(3))
    half = smoothing_scale(weights, absmax, 0.5)
    assert torch.allclose(half, absmax.sqrt())  # the weights' largest are all 1
    assert (smoothing_scale([torch.zeros(2, 3)], torch.zeros(3), 0.5) > 0).all()


@pytest.mark.parametrize("spec", [LLAMA, UNTIED, GPT2], ids=["llama", "untied", "gpt2"])
def test_smoothing_helps_where_channels_stand_out(spec) -> None:
    ids = text(spec)
    exact = with_outliers(made(spec, std=0.1))
    gap = {
        smoothing: kl(
            exact, applied(Int8Static(smoothing=smoothing), copy.deepcopy(exact), ids)[0], ids[:8]
        )
        for smoothing in (0.0, 0.5)
    }
    assert gap[0.5] < 0.65 * gap[0.0]


def test_the_same_comes_out_twice_and_nothing_is_written_to() -> None:
    ids, model = text(UNTIED), made(UNTIED)
    given = dict(model.named_parameters())
    copies = {name: tensor.clone() for name, tensor in given.items()}
    first, again = applied(Int8Static(), model, ids)[0], applied(Int8Static(), made(UNTIED), ids)[0]
    assert torch.equal(logits(first, ids[:2]), logits(again, ids[:2]))
    assert all(torch.equal(tensor, copies[name]) for name, tensor in given.items())


def test_it_asks_for_a_text_and_refuses_what_is_no_number() -> None:
    assert Int8Static().needs_calibration
    with pytest.raises(InvalidInput, match="was given none: choose a calibration text"):
        applied(Int8Static(), made(LLAMA))
    model = made(UNTIED)
    model.blocks[1].mlp.up.weight[3, 5] = float("nan")
    with pytest.raises(NumericalError, match=r"^blocks\.1\.mlp\.up holds NaN"):
        applied(Int8Static(), model, text(UNTIED))


def test_the_head_can_be_left_as_it_is() -> None:
    model, coverage = applied(Int8Static(head=False), made(LLAMA), text(LLAMA))
    assert isinstance(model.head, nn.Linear)
    assert coverage.skipped == (("head", "the output head was to be left as it is"),)


def test_it_is_a_value_with_its_own_fields() -> None:
    one = Int8Static(smoothing=0.7)
    assert pass_from_json(json.loads(json.dumps(one.as_json()))) == one
    assert repr(one) == "Int8Static(smoothing=0.7)"
    with pytest.raises(InvalidInput, match="Smoothing"):
        pass_from_json({"pass": "int8_static", "smoothing": 1.5})
    assert Int8Static().blocked_by(GPT2, Placement(device="cuda:0")) == (
        "its operation is for the CPU, not cuda:0; choose int8 there."
    )
    assert Int8Static().blocked_by(GPT2, Placement()) is None
