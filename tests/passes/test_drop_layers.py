"""Leaving out blocks: which ones go, that the rest is untouched, and what it says of itself."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.measure.memory import weight_bytes
from gptcore.model import GPT
from gptcore.passes.calibrate import Residual
from gptcore.passes.drop_layers import DropLayers, influences, least_missed, make_up
from gptcore.spec import ModelSpec
from tests.passes.small import LLAMA, SHAPES, UNTIED, applied, kl, logits, made, placed, text

every_shape = pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)


def weaken(model: nn.Module, layer: int, by: float) -> None:
    """Let a block add less to the residual stream."""
    block = model.blocks[layer]
    for one in (block.attention.out, block.mlp.down):
        one.weight.mul_(by)
        if one.bias is not None:
            one.bias.mul_(by)


@every_shape
@pytest.mark.parametrize("weak", [0, 1, 2])
def test_the_block_that_does_least_goes(spec: ModelSpec, weak: int) -> None:
    model, ids = made(spec), text(spec)
    weaken(model, weak, 0.01)
    kept = [block for i, block in enumerate(model.blocks) if i != weak]
    before = logits(model, ids[:4])
    model, _ = applied(DropLayers(layers=1, compensated=False), model, ids)
    assert list(model.blocks) == kept
    assert model.spec == spec.model_copy(update={"layers": 2})
    assert (logits(model, ids[:4]) - before).norm() < 0.1 * before.norm()


def test_a_block_that_does_nothing_can_go_without_a_trace() -> None:
    model, ids = made(LLAMA), text(LLAMA)
    weaken(model, 1, 0.0)
    before = logits(model, ids[:4])
    model, _ = applied(DropLayers(layers=1, compensated=False), model, ids)
    assert logits(model, ids[:4]).equal(before)
    again = made(LLAMA)
    weaken(again, 1, 0.0)
    made_up, _ = applied(DropLayers(layers=1), again, ids)
    assert torch.allclose(logits(made_up, ids[:4]), before, atol=1e-4)


@every_shape
def test_measured_blocks_go_one_after_another_each_the_least_missed(spec: ModelSpec) -> None:
    """Written out: every block left out by itself, by running the model without it."""
    spec = spec.model_copy(update={"layers": 4})
    ids = text(spec, sequences=12)
    whole = made(spec)
    gone, damages = least_missed(whole, ids, range(4), 2, lambda share: None)

    def damage(without: set[int]) -> float:
        model = made(spec)
        model.blocks = nn.ModuleList(b for i, b in enumerate(model.blocks) if i not in without)
        return kl(whole, model, ids)

    first = min(range(4), key=lambda i: damage({i}))
    second = min({0, 1, 2, 3} - {first}, key=lambda i: damage({first, i}))
    assert gone == {first, second}
    assert damages[second] == pytest.approx(damage(gone), rel=1e-4)
    assert set(damages) == {0, 1, 2, 3} - {first}


@every_shape
def test_by_influence_alone_those_of_least_influence_go(spec: ModelSpec) -> None:
    model, ids = made(spec), text(spec)
    order = sorted(range(3), key=influences(model, Residual(model, ids)).__getitem__)
    kept = [block for i, block in enumerate(model.blocks) if i in order[2:]]
    model, coverage = applied(DropLayers(layers=2, measured=False), model, ids)
    assert list(model.blocks) == kept
    assert [name for name, _ in coverage.skipped] == [f"blocks.{order[2]}"]


def recorded(model: GPT, ids: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a block's MLP writes, and what comes out of the block: (tokens, W) float64."""
    seen: list[torch.Tensor] = []
    block = model.blocks[layer]
    hooks = [
        one.register_forward_hook(lambda _, given, out: seen.append(out.flatten(0, 1).double()))
        for one in (block.mlp, block)
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1]


@every_shape
@pytest.mark.parametrize("gone", [{1}, {1, 2}, {2}, {1, 3}])
def test_the_mlp_in_front_of_a_gap_makes_up_for_it_as_least_squares_would(
    spec: ModelSpec, gone: set[int]
) -> None:
    spec = spec.model_copy(update={"layers": 5})
    ids, exact = text(spec, sequences=12), made(spec)
    model = made(spec)
    before = [block.mlp.down for block in model.blocks]
    make_up(model, ids, gone)
    changed = {i for i, block in enumerate(model.blocks) if block.mlp.down is not before[i]}
    assert changed == {i for i in range(5) if i + 1 in gone and i not in gone}
    front = min(gone) - 1
    last = next(i for i in range(front + 1, 5) if i + 1 not in gone)
    m, y = recorded(exact, ids, front)
    _, wanted = recorded(exact, ids, last)
    best = torch.linalg.lstsq(m, m + wanted - y).solution
    model.blocks = nn.ModuleList(b for i, b in enumerate(model.blocks) if i not in gone)
    written, out = recorded(model, ids, front)
    left, least = (out - wanted).square().sum(), (m @ best + y - m - wanted).square().sum()
    assert least * 0.999 <= left <= least * 1.02 < (y - wanted).square().sum()
    assert torch.allclose(written, m @ best, atol=0.05 * float(m.std()))


@every_shape
def test_a_shorter_model_is_nearer_where_it_was_made_up_for(spec: ModelSpec) -> None:
    ids, whole = text(spec), made(spec)
    plain, _ = applied(DropLayers(layers=1, chosen=(1,), compensated=False), made(spec), ids)
    better, coverage = applied(DropLayers(layers=1, chosen=(1,)), made(spec), ids)
    assert kl(whole, better, ids) < kl(whole, plain, ids)
    assert weight_bytes(better) == weight_bytes(plain)
    assert coverage.stored_bytes == 0


@every_shape
def test_nothing_in_front_of_the_first_block_makes_up_for_it(spec: ModelSpec) -> None:
    one, ids = DropLayers(chosen=(0,)), text(spec)
    model = made(spec)
    kept = list(model.blocks)[1:]
    downs = [block.mlp.down for block in kept]
    model, _ = applied(one, model, ids)
    assert [block.mlp.down for block in model.blocks] == downs


def test_influence_is_one_minus_the_cosine_of_what_goes_in_and_out() -> None:
    model, ids = made(UNTIED), text(UNTIED)
    states: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, given, out: states.append((given[0], out)))
        for block in model.blocks
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    expected = [
        1 - torch.cosine_similarity(before, after, dim=-1).mean().item() for before, after in states
    ]
    found = influences(model, Residual(model, ids))
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) == 3


@every_shape
def test_dropping_none_changes_no_logit(spec: ModelSpec) -> None:
    exact, ids = made(spec), text(spec)[:2]
    model, coverage = applied(DropLayers(layers=0), made(spec))
    assert logits(model, ids).equal(logits(exact, ids))
    assert coverage.ratio == 0.0
    assert not DropLayers(layers=0).needs_calibration


@every_shape
def test_the_predicted_bytes_are_those_that_are_left(spec: ModelSpec) -> None:
    one = DropLayers(layers=2)
    model, coverage = applied(one, made(spec), text(spec))
    after = one.weights_bytes_after(spec, placed(), spec.weights_bytes("fp32"))
    assert after == weight_bytes(model)[0] == model.spec.weights_bytes("fp32")
    assert one.spec_after(spec) == model.spec
    assert coverage.converted_weights == 2 * (spec.matmul_parameters - 199 * 48) // 3
    assert coverage.effective_bits == 0.0
    assert len(coverage.skipped) == 1


def test_a_shorter_model_decodes_through_its_cache() -> None:
    model, _ = applied(DropLayers(layers=1), made(LLAMA), text(LLAMA))
    ids = text(LLAMA, sequences=1, tokens=10)
    cache = model.new_cache(10)
    assert cache.k.shape[0] == 2
    with torch.inference_mode():
        steps = torch.cat([model(ids[:, t : t + 1], cache)[0] for t in range(10)])
    assert torch.allclose(steps, logits(model, ids)[0], atol=1e-4)


def test_a_model_cannot_lose_all_its_layers() -> None:
    one = DropLayers(layers=3)
    assert one.blocked_by(LLAMA, Placement()) == (
        "it has 3 layers, of which 3 cannot go: drop fewer."
    )
    assert DropLayers(layers=2).blocked_by(LLAMA, Placement()) is None
    with pytest.raises(InvalidInput, match=r"^Drop layers cannot run here: it has 3 layers"):
        applied(one, made(LLAMA), text(LLAMA))


def test_it_needs_a_text() -> None:
    with pytest.raises(InvalidInput, match="choose a calibration text"):
        applied(DropLayers(), made(LLAMA))


@every_shape
def test_chosen_layers_go_without_a_text(spec: ModelSpec) -> None:
    model = made(spec)
    kept = model.blocks[1]
    one = DropLayers(chosen=(2, 0), compensated=False)
    assert not one.needs_calibration
    assert one.spec_after(spec).layers == 1
    model, coverage = applied(one, model, None)
    assert list(model.blocks) == [kept]
    assert coverage.skipped == (("blocks.1", "it was not chosen"),)


def test_a_chosen_layer_that_is_not_there_is_named() -> None:
    assert "no layer 3" in str(DropLayers(chosen=(1, 3)).blocked_by(LLAMA, placed()))
    assert "cannot go" in str(DropLayers(chosen=(0, 1, 2)).blocked_by(LLAMA, placed()))
    assert DropLayers(chosen="2, 0").chosen == DropLayers(chosen="(0, 2)").chosen == (0, 2)
    assert DropLayers(chosen="").chosen == ()
    for chosen in ((1, 1), (-1,), "0 0"):
        with pytest.raises(ValidationError, match="chosen once"):
            DropLayers(chosen=chosen)
