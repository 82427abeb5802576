import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gptcore import model as model_module
from gptcore import weights
from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.explain.attention import Heads, attention_weights, characters, look, small
from gptcore.explain.packed import pack, unpack
from gptcore.model import GPT
from tests.explain.models import IDS, SHAPES, model_of
from tests.families import CASES

FP32 = 2e-6
"""weights · V against the fused operation, as a share of the largest output: rounding only."""


def layers_of(model: GPT, ids: list[int]) -> list[Heads]:
    found: list[Heads] = []
    look(model, ids, lambda layer, heads: found.append(heads))
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_weights_times_values_are_what_the_models_own_attention_computes(name: str) -> None:
    model = model_of(SHAPES[name])
    into_out: list[Tensor] = []
    for block in model.blocks:
        block.attention.out.register_forward_pre_hook(lambda module, args: into_out.append(args[0]))
    for heads, seen in zip(layers_of(model, IDS), into_out, strict=True):
        assert heads.fused
        assert heads.disagreement < FP32
        again = heads.weights @ heads.v  # (H, T, D)
        joined = again.transpose(0, 1).flatten(1)  # (T, H · D)
        assert torch.allclose(joined, seen[0], atol=1e-4 * float(seen.abs().max()))


@pytest.mark.parametrize("name", SHAPES)
def test_rows_sum_to_one_and_never_look_ahead(name: str) -> None:
    for heads in layers_of(model_of(SHAPES[name]), IDS):
        sums = heads.weights.sum(-1)
        assert (sums - 1).abs().max() < 1e-5
        assert heads.weights.triu(1).abs().max() == 0


@pytest.mark.parametrize("name", ["gpt2", "llama-untied", "qwen2-biases", "qwen3-norms"])
def test_weights_are_those_of_transformers(name: str, tmp_path) -> None:
    case = CASES[name]
    ours = weights.build(weights.describe(case.save(tmp_path / "model")), Placement())
    ids = [int(one) for one in np.random.default_rng(0).integers(0, 200, 24)]
    theirs = case.model(torch.tensor([ids]), output_attentions=True).attentions
    for heads, wanted in zip(layers_of(ours, ids), theirs, strict=True):
        assert torch.allclose(heads.weights, wanted[0], atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_an_attention_without_the_fused_operation_is_computed_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(SHAPES[name])
    wanted = layers_of(model, IDS)

    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        return attention_weights(q, k) @ v

    monkeypatch.setattr(model_module, "attend", plain)
    for found, fused in zip(layers_of(model, IDS), wanted, strict=True):
        assert not found.fused
        assert found.disagreement < FP32
        assert torch.allclose(found.weights, fused.weights, atol=1e-5)


def test_an_attention_with_nothing_to_look_at_is_refused() -> None:
    class Opaque(torch.nn.Module):
        def forward(self, x: Tensor, *_: object) -> Tensor:
            return x

    model = model_of()
    model.blocks[1].attention = Opaque()
    with pytest.raises(InvalidInput, match="without its last pass"):
        layers_of(model, IDS)


def test_looking_leaves_the_model_as_it_was() -> None:
    model = model_of()
    before = model(torch.tensor([IDS]))
    layers_of(model, IDS)
    assert torch.equal(model(torch.tensor([IDS])), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_small_pictures_keep_the_sums_of_rows() -> None:
    weights = attention_weights(torch.randn(3, 77, 8), torch.randn(3, 77, 8))
    pictures = small(weights, 10)
    assert pictures.shape == (3, 10, 10)
    assert (pictures.sum(-1) - 1).abs().max() < 1e-5
    assert pictures.triu(1).abs().max() == 0
    assert torch.equal(small(weights, 100), weights)


def test_characters_of_heads_that_are_known() -> None:
    length = 9
    first, itself, previous = (torch.zeros(length, length) for _ in range(3))
    first[:, 0] = 1
    itself.fill_diagonal_(1)
    previous[0, 0] = 1
    previous.diagonal(-1).fill_(1)
    even = torch.ones(length, length).tril()
    even /= even.sum(-1, keepdim=True)
    a, b, c, d = characters(5, torch.stack((first, itself, previous, even)))
    assert (a.layer, a.head, a.first, a.itself, a.entropy_bits) == (5, 0, 1, 0, 0)
    assert (b.itself, b.distance) == (1, 0)
    assert (c.previous, c.distance) == (1, 1)
    wanted = sum(math.log2(row + 1) for row in range(1, length)) / (length - 1)
    assert d.entropy_bits == pytest.approx(wanted)


def test_packed_rows_still_sum_to_one() -> None:
    weights = attention_weights(torch.randn(512, 64), torch.randn(512, 64)).numpy()
    back = unpack(pack(weights))
    assert np.abs(back.sum(-1) - 1).max() < 1e-3
    assert np.abs(back - weights).max() < 1 / 2048


@pytest.mark.parametrize("kind", ["float16", "float32", "uint8", "int32"])
def test_an_array_comes_back_from_json(kind) -> None:
    array = np.arange(24).reshape(2, 3, 4)
    back = unpack(pack(array, kind))
    assert (back == array).all()
    assert back.shape == array.shape
