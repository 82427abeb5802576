from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptcore import weights
from gptcore.device import Placement
from gptcore.engine import Engine
from gptcore.errors import Cancelled, InvalidInput
from gptcore.explain.worth import PARTS, Worth, least_worth, losses, without_heads, worth
from gptcore.model import GPT
from gptcore.passes.base import PassContext
from gptcore.passes.drop_layers import DropLayers
from gptcore.tokenizer import load_tokenizer
from tests.explain.models import IDS, SHAPES, model_of


def plain_logits(model: GPT) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS]))[0, :-1]


def plain_losses(model: GPT) -> Tensor:
    return F.cross_entropy(plain_logits(model), torch.tensor(IDS[1:]), reduction="none")


@pytest.mark.parametrize("name", SHAPES)
def test_a_head_is_worth_what_its_weights_are_worth(name: str) -> None:
    """Each head is compared with a model from whose weights it was taken out."""
    model, spec = model_of(SHAPES[name]), SHAPES[name]
    loss, found = worth(model, IDS)
    whole = plain_losses(model)
    assert loss == pytest.approx(float(whole.mean()), abs=1e-5)
    heads = {(one.layer, one.head): one for one in found if one.part == "head"}
    assert set(heads) == {(layer, head) for layer in range(spec.layers) for head in range(4)}
    for (layer, head), one in heads.items():
        cut = model_of(spec)
        with torch.no_grad():
            width = spec.head_width
            cut.blocks[layer].attention.out.weight[:, head * width : (head + 1) * width] = 0
        change = plain_losses(cut) - whole
        moved = F.kl_div(
            plain_logits(cut).log_softmax(-1),
            plain_logits(model).log_softmax(-1),
            log_target=True,
            reduction="none",
        ).sum(-1)
        assert one.kl_nats == pytest.approx(float(moved.mean()), abs=1e-4)
        assert one.loss_change == pytest.approx(float(change.mean()), abs=1e-4)
        assert one.standard_error == pytest.approx(
            float(change.std() / len(change) ** 0.5), abs=1e-4
        )


def test_layers_are_worth_what_a_model_without_them_loses() -> None:
    model = model_of()
    _, found = worth(model, IDS)
    whole = plain_losses(model).mean()
    for layer in range(3):
        parts = {one.part: one for one in found if one.layer == layer and one.part != "head"}
        assert tuple(parts) == PARTS
        without = model_of()
        del without.blocks[layer]
        assert parts["block"].loss_change == pytest.approx(
            float(plain_losses(without).mean() - whole), abs=1e-4
        )
        for part, name in (("attention", "out"), ("mlp", "down")):
            without = model_of()
            with torch.no_grad():
                getattr(getattr(without.blocks[layer], part), name).weight.zero_()
            assert parts[part].loss_change == pytest.approx(
                float(plain_losses(without).mean() - whole), abs=1e-4
            )


def test_heads_switched_off_together_come_back() -> None:
    model = model_of()
    before = losses(model, IDS)
    with without_heads(model, [(0, 1), (0, 3), (2, 0)]):
        off = losses(model, IDS)
    cut = model_of()
    with torch.no_grad():
        for layer, head in ((0, 1), (0, 3), (2, 0)):
            cut.blocks[layer].attention.out.weight[:, head * 8 : head * 8 + 8] = 0
    assert torch.allclose(off, plain_losses(cut), atol=1e-4)
    assert torch.equal(losses(model, IDS), before)
    assert not torch.allclose(off, before, atol=1e-3)


def test_a_head_that_is_not_there_is_refused() -> None:
    with (
        pytest.raises(InvalidInput, match="heads 0 to 3, not 4"),
        without_heads(model_of(), [(0, 4)]),
    ):
        pass


def test_the_ranking_begins_with_what_is_missed_least() -> None:
    found = [
        Worth("head", 0, 0, -0.5, 0.1, kl_nats=0.5),
        Worth("block", 0, None, -1.0, 0.1, kl_nats=0.0),
        Worth("head", 0, 1, -0.2, 0.1, kl_nats=0.1),
        Worth("head", 1, 0, 0.1, 0.1, kl_nats=0.2),
    ]
    assert [(one.layer, one.head) for one in least_worth(found)] == [(0, 1), (1, 0), (0, 0)]
    assert least_worth(found, "block") == [found[1]]


def test_it_tells_after_every_layer_and_can_be_stopped() -> None:
    told: list[tuple[float, int]] = []

    def tell(ratio: float, found: list[Worth]) -> None:
        told.append((ratio, len(found)))
        if len(told) == 2:
            raise Cancelled("Cancelled.")

    model = model_of()
    with pytest.raises(Cancelled):
        worth(model, IDS, tell=tell)
    assert told == [(1 / 3, 7), (2 / 3, 14)]
    assert not any(module._forward_pre_hooks for module in model.modules())


READ = "Every evening the keeper climbed the stairs of the lighthouse to light the lamp."
HELD_OUT = (
    "Water boils at one hundred degrees Celsius at sea level. On a high mountain the pressure of "
    "the air is lower, so it boils earlier, and food takes longer to cook there."
)


@pytest.mark.smollm2
@pytest.mark.slow
def test_pruning_by_the_ranking_beats_pruning_at_random(smollm2_engine: Engine) -> None:
    """At equal size, on a text that the ranking has not seen, against each of three draws."""
    model, tokenizer = smollm2_engine.model, smollm2_engine.tokenizer
    _, found = worth(model, tokenizer.encode(READ))
    ranked = [(one.layer, one.head or 0) for one in least_worth(found)]
    text = tokenizer.encode(HELD_OUT)

    def loss_without(off: list[tuple[int, int]]) -> float:
        with without_heads(model, off):
            return float(losses(model, text).mean())

    taken = len(ranked) // 5
    ours = loss_without(ranked[:taken])
    for seed in range(3):
        order = torch.randperm(len(ranked), generator=torch.Generator().manual_seed(seed))
        assert ours < loss_without([ranked[i] for i in order[:taken]])


@pytest.mark.smollm2
@pytest.mark.slow
def test_dropping_layers_by_the_ranking_beats_dropping_at_random(smollm2_gguf: Path) -> None:
    """A model that really is smaller, on a text that the ranking has not seen."""
    checkpoint = weights.describe(smollm2_gguf)
    tokenizer = load_tokenizer(checkpoint.directory)
    read, held_out = tokenizer.encode(READ), tokenizer.encode(HELD_OUT)

    def model() -> GPT:
        return weights.build(checkpoint, Placement(threads=1))

    def loss_without(chosen: tuple[int, ...]) -> float:
        smaller = DropLayers(chosen=chosen, compensated=False).apply(
            model(), PassContext(placement=Placement())
        )
        assert smaller.spec.layers == checkpoint.spec.layers - 3
        return float(losses(smaller, held_out).mean())

    _, found = worth(model(), read)
    ranked = [one.layer for one in least_worth(found, "block")]
    ours = loss_without(tuple(ranked[:3]))
    for seed in range(3):
        order = torch.randperm(len(ranked), generator=torch.Generator().manual_seed(seed))
        assert ours < loss_without(tuple(order[:3].tolist()))
