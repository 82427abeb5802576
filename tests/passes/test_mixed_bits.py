"""Bits of its own for every layer: what is written, what is measured, how bits are dealt out."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gptcore.device import Placement
from gptcore.errors import Cancelled, InvalidInput
from gptcore.linears.quantized import PackedLinear
from gptcore.measure.memory import weight_bytes
from gptcore.model import GPT
from gptcore.passes.mixed_bits import SEQUENCE, SEQUENCES, MixedBits, _short
from gptcore.passes.quantize import Int4, layer_shapes
from gptcore.passes.registry import pass_from_json
from gptcore.passes.sensitivity import Damage, assign, scan
from gptcore.spec import ModelSpec, gpt
from tests.passes.small import applied, kl, logits, made, placed, text

LLAMA = ModelSpec(
    family="llama",
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=16,
    width=64,
    hidden=128,
    context=128,
    vocabulary=192,
    norm="rmsnorm",
    position="rotary",
    mlp="swiglu",
    bias=False,
    qkv_bias=False,
)
"""Rows that are multiples of 16, so that nothing is padded."""
GPT2 = gpt(2, 64, 4, context=64, vocabulary=199)
NAMES = [name for name, _ in layer_shapes(LLAMA)]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["round", "gptq", "awq"])
@pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_layer_gets_the_bits_that_are_written(spec: ModelSpec, method: str) -> None:
    one = MixedBits(
        bits=3, layers="blocks.*.mlp.down:8 blocks.0.*:4 head:8", group=32, method=method
    )
    model, coverage = applied(one, made(spec, "bf16"), text(spec))
    bits = {n: layer.bits for n, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert coverage.ratio == 1.0
    for name in bits:
        # The last entry that fits counts: the whole first block has 4 bits.
        want = 8 if name == "head" else 4 if "blocks.0." in name else 8 if "down" in name else 3
        assert bits[name] == want == one.bits_of(name)


def test_bytes_and_effective_bits_are_those_of_the_layers() -> None:
    one = MixedBits(bits=3, layers="head:8 blocks.0.*:4")
    model = made(LLAMA, "bf16")
    before = weight_bytes(model)[0]
    model, coverage = applied(one, model)
    assert weight_bytes(model)[0] == one.weights_bytes_after(LLAMA, placed("bf16"), before)
    layers = dict(layer_shapes(LLAMA))
    bits = {8: 8 + 16 / 64, 4: 4.5, 3: 3.5}
    stored = sum(bits[one.bits_of(n)] * s.rows * s.columns for n, s in layers.items())
    assert coverage.effective_bits == pytest.approx(stored / LLAMA.matmul_parameters)


def test_one_width_for_all_is_the_uniform_pass() -> None:
    ids = text(LLAMA)
    mixed, _ = applied(MixedBits(), made(LLAMA, "bf16"))
    uniform, _ = applied(Int4(), made(LLAMA, "bf16"))
    assert torch.equal(logits(mixed, ids[:2]), logits(uniform, ids[:2]))


@pytest.mark.parametrize(
    "entry", ["head", "head:5", "head:", ":4", "head=4", "a b:4", "head:4;x:8"]
)
def test_what_is_no_entry_is_refused_in_a_sentence(entry: str) -> None:
    with pytest.raises(InvalidInput, match="is no layer with its bits: write blocks"):
        pass_from_json({"pass": "mixed_bits", "layers": f"blocks.0.*:4 {entry}"})


def test_a_layer_that_does_not_exist_is_named() -> None:
    one = MixedBits(layers="blocks.0.*:8 blocks.7.mlp.down:8")
    assert one.blocked_by(LLAMA, placed("bf16")) == (
        "it has no layer 'blocks.7.mlp.down'; there are blocks.0.attention.q to head."
    )
    assert MixedBits(layers="blocks.1.*:8").blocked_by(LLAMA, placed("bf16")) is None
    assert MixedBits(group=128).blocked_by(LLAMA, placed("bf16")) is None  # down has 128 columns
    everything = MixedBits(bits=8, group=128)
    assert everything.blocked_by(LLAMA, placed("bf16")) is None


def test_a_recipe_says_all() -> None:
    one = MixedBits(bits=3, layers="  head:8   blocks.0.*:4 ", method="gptq")
    assert one.layers == "head:8 blocks.0.*:4"
    assert pass_from_json(json.loads(json.dumps(one.as_json()))) == one
    assert hash(one) == hash(one.model_copy())


def rounded_alone(name: str, bits: int) -> nn.Module:
    """Return the model in which one layer is rounded and all others are exact."""
    other = made(LLAMA, "fp32", std=0.1)
    linear = other.get_submodule(name)
    numbers = MixedBits(bits=bits).format(name).grid().quantize(linear.weight)
    alone = nn.Linear(linear.in_features, linear.out_features, bias=False)
    alone.weight = nn.Parameter(numbers.dequantized(), requires_grad=False)
    parent, _, child = name.rpartition(".")
    setattr(other.get_submodule(parent), child, alone)
    return other


def test_a_scan_expects_what_rounding_a_layer_does() -> None:
    """Against the divergence of the model in which that layer alone was rounded.

    With 512 sequences a damage is known to ± 6 %; at 4 bits the changes are small enough that
    what goes beyond the second order is less than that.
    """
    model = made(LLAMA, "fp32", std=0.1)
    ids = torch.randint(LLAMA.vocabulary, (512, 8), generator=torch.Generator().manual_seed(3))
    found = scan(model, ids, bits=(3, 4, 8), group=64)
    assert [(one.layer, one.bits) for one in found] == [(n, b) for n in NAMES for b in (3, 4, 8)]
    known = {(one.layer, one.bits): one.kl for one in found}
    for name in NAMES:
        assert known[name, 4] == pytest.approx(kl(model, rounded_alone(name, 4), ids), rel=0.3)
        assert known[name, 8] < 0.1 * known[name, 4] < known[name, 3]


def test_a_scan_is_the_same_for_the_same_seed() -> None:
    model, ids = made(LLAMA, "fp32", std=0.1), text(LLAMA)[:2]
    assert scan(model, ids, bits=(4,)) == scan(model, ids, bits=(4,))
    assert scan(model, ids, bits=(4,), seed=1) != scan(model, ids, bits=(4,))


def test_a_scan_leaves_the_model_as_it_was() -> None:
    model, ids = made(GPT2, "bf16"), text(GPT2)[:2]
    modules = dict(model.named_modules())
    copies = {name: tensor.clone() for name, tensor in model.named_parameters()}
    before = logits(model, ids)
    told: list[float] = []
    scan(model, ids, bits=(4,), progress=told.append)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, copies[name]) for name, t in model.named_parameters())
    assert torch.equal(logits(model, ids), before)
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)


def test_a_scan_that_is_stopped_leaves_the_model_as_it_was() -> None:
    model, ids = made(GPT2, "bf16"), text(GPT2)[:2]
    modules = dict(model.named_modules())

    def stop(share: float) -> None:
        if share > 0.3:
            raise Cancelled("Cancelled.")

    with pytest.raises(Cancelled):
        scan(model, ids, bits=(4,), progress=stop)
    assert dict(model.named_modules()) == modules
    assert not [one for one in model.modules() if one._forward_hooks]


def test_groups_that_do_not_divide_are_left_out_of_a_scan() -> None:
    found = scan(made(LLAMA, "fp32"), text(LLAMA)[:1], bits=(4, 8), group=128)
    fours = {one.layer for one in found if one.bits == 4}
    assert fours == {"blocks.0.mlp.down", "blocks.1.mlp.down"}
    assert len([one for one in found if one.bits == 8]) == len(NAMES)


def invented(seed: int) -> list[Damage]:
    """Return damages that fall with the bits, as measured ones do but for noise."""
    random = torch.Generator().manual_seed(seed)
    size = torch.rand(len(NAMES), generator=random) * 3 - 4
    return [
        Damage(name, bits, 10 ** float(exponent) * 4.0 ** (3 - bits))
        for name, exponent in zip(NAMES, size, strict=True)
        for bits in (3, 4, 8)
    ]


def cost(one: MixedBits, damages: list[Damage]) -> tuple[float, float]:
    """Return the sum of damages and the effective bits of a choice."""
    shapes = dict(layer_shapes(LLAMA))
    known = {(each.layer, each.bits): each.kl for each in damages}
    bits = stored = 0.0
    for name in {each.layer for each in damages}:
        shape = shapes[name]
        bits += known[name, one.bits_of(name)]
        stored += one.format(name).stored_bytes(
            shape.rows, shape.columns, False, Placement(precision="bf16")
        )
    weights = sum(shapes[name].rows * shapes[name].columns for name in {d.layer for d in damages})
    return bits, 8 * stored / weights


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), target=st.floats(3.5, 8.5))
def test_bits_are_dealt_out_within_the_target(seed: int, target: float) -> None:
    damages = invented(seed)
    chosen = assign(damages, LLAMA, target)
    damage, bits = cost(chosen, damages)
    assert bits <= target + 1e-9
    for width in (3, 4, 8):
        uniform = MixedBits(bits=width)
        if cost(uniform, damages)[1] <= target:
            assert damage <= cost(uniform, damages)[0] * (1 + 1e-9)


def test_no_choice_of_few_layers_is_much_better() -> None:
    """Against all 3⁵ choices of five layers; what is lost is less than one layer's step."""
    damages = [one for one in invented(5) if one.layer in NAMES[:5]]
    for target in (4.0, 4.5, 5.5):
        damage, _ = cost(assign(damages, LLAMA, target), damages)
        best = min(
            cost(choice, damages)[0]
            for widths in itertools.product((3, 4, 8), repeat=5)
            for choice in [
                MixedBits(layers=" ".join(f"{n}:{w}" for n, w in zip(NAMES, widths, strict=False)))
            ]
            if cost(choice, damages)[1] <= target
        )
        assert damage <= best + max(one.kl for one in damages if one.bits == 3)
        assert damage < sum(one.kl for one in damages if one.bits == 3)


def test_more_bits_that_measure_worse_are_not_taken() -> None:
    """A measured damage has noise: what takes more and is worse is no choice."""
    damages = [Damage(NAMES[0], 3, 0.1), Damage(NAMES[0], 4, 0.2), Damage(NAMES[0], 8, 0.3)]
    assert assign(damages, LLAMA, 8.5).bits_of(NAMES[0]) == 3


def test_fewer_bits_than_there_are_is_refused_in_a_sentence() -> None:
    with pytest.raises(InvalidInput, match=r"^3\.4 bits a weight are fewer than .* least, 3\.5 wi"):
        assign(invented(1), LLAMA, 3.4)


def test_what_was_assigned_is_better_than_uniform_bits_of_the_same_size() -> None:
    """On a model whose second block matters less: its way out is scaled down."""
    model, ids = made(LLAMA, "fp32", std=0.1), text(LLAMA)[:8]
    for linear in (model.blocks[1].attention.out, model.blocks[1].mlp.down):
        linear.weight = nn.Parameter(linear.weight * 0.02, requires_grad=False)
    chosen = assign(scan(model, ids), LLAMA, 4.5)

    def like() -> object:
        other = made(LLAMA, "fp32", std=0.1)
        other.load_state_dict(model.state_dict())
        return other.bfloat16()

    mixed, coverage = applied(chosen, like())
    uniform, even = applied(Int4(), like())
    assert coverage.effective_bits <= even.effective_bits + 1e-9
    assert kl(model, mixed, ids) < 0.85 * kl(model, uniform, ids)


def weak_second_block() -> GPT:
    """Return a model whose second block matters less, in bf16: its way out is scaled down."""
    model = made(LLAMA, "fp32", std=0.1)
    for linear in (model.blocks[1].attention.out, model.blocks[1].mlp.down):
        linear.weight = nn.Parameter(linear.weight * 0.02, requires_grad=False)
    return model.bfloat16()


def test_bits_that_the_pass_deals_out_are_those_of_a_scan() -> None:
    one, ids = MixedBits(effective_bits=4.5), text(LLAMA, sequences=16, tokens=128)
    model, coverage = applied(one, weak_second_block(), ids)
    chosen = assign(scan(weak_second_block().float(), ids), LLAMA, 4.5)
    written, _ = applied(chosen, weak_second_block(), ids)
    assert chosen.layers
    assert torch.equal(logits(model, ids[:2]), logits(written, ids[:2]))
    assert coverage.effective_bits is not None
    assert coverage.effective_bits <= 4.5 + 1e-9
    uniform, _ = applied(Int4(), weak_second_block())
    assert kl(weak_second_block(), model, ids) < 0.85 * kl(weak_second_block(), uniform, ids)


def test_dealt_bits_keep_the_method_and_what_is_packed_beside() -> None:
    one = MixedBits(effective_bits=5.0, group=32, method="awq", head=False)
    dealt = one.dealt(made(LLAMA, "bf16"), text(LLAMA))
    assert (dealt.method, dealt.head, dealt.group, dealt.effective_bits) == ("awq", False, 32, 0.0)
    assert dealt.layers


def test_a_long_text_is_scanned_in_short_sequences() -> None:
    ids = torch.arange(40 * 300).view(40, 300)
    short = _short(ids)
    assert short.shape == (SEQUENCES, SEQUENCE)
    assert short[1].equal(ids[0, SEQUENCE : 2 * SEQUENCE])
    assert _short(ids[:, :64]).shape == (40, 64)
    assert _short(ids[:3]).shape == (6, SEQUENCE)


@pytest.mark.parametrize("bits", [3.5, 4.5, 6.0, 8.0, 9.0])
def test_what_dealt_bits_will_take_is_about_known_before(bits: float) -> None:
    one, model = MixedBits(effective_bits=bits), made(LLAMA, "bf16")
    expected = one.weights_bytes_after(LLAMA, placed("bf16"), weight_bytes(model)[0])
    model, _ = applied(one, model, text(LLAMA))
    assert weight_bytes(model)[0] == pytest.approx(expected, rel=0.1)


def test_bits_are_written_or_dealt_out_and_a_text_is_needed_for_the_latter() -> None:
    assert MixedBits(effective_bits=4.5).needs_calibration
    assert not MixedBits().needs_calibration
    assert "effective_bits" not in MixedBits(layers="head:8").as_json()
    with pytest.raises(InvalidInput, match="exclude each other: leave one of the two out"):
        pass_from_json({"pass": "mixed_bits", "layers": "head:8", "effective_bits": 4.5})
    with pytest.raises(InvalidInput, match="No layer has fewer than 3 bits: choose that or more"):
        pass_from_json({"pass": "mixed_bits", "effective_bits": 2})
    with pytest.raises(InvalidInput, match=r"^3\.2 bits a weight are fewer than"):
        applied(MixedBits(effective_bits=3.2), made(LLAMA, "bf16"), text(LLAMA))
    with pytest.raises(InvalidInput, match="choose a calibration text"):
        applied(MixedBits(effective_bits=4.5), made(LLAMA, "bf16"))
