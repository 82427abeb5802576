import pytest
import torch
from torch.nn import functional as F

from gptcore.errors import InvalidInput
from gptcore.explain.difference import difference, trace
from gptcore.model import GPT
from tests.explain.models import GPT2_SHAPE, IDS, LLAMA_SHAPE, SHAPES, model_of


def changed(layer: int, amount: float) -> GPT:
    """The model with noise in one block's weights."""
    model = model_of()
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.blocks[layer].parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=random)
                parameter.add_(noise * parameter.std() * amount)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_a_variant_does_not_differ_from_itself(name: str) -> None:
    model = model_of(SHAPES[name])
    found = difference(trace(model, IDS), model, IDS)
    assert [one.blocks for one in found.layers] == list(range(SHAPES[name].layers + 1))
    assert all(one.cosine == pytest.approx(1, abs=1e-6) for one in found.layers)
    assert all(one.accumulated == 0 and not one.introduced for one in found.layers)
    assert found.kl_nats.max() < 1e-6
    assert found.first_divergence is None
    assert found.same_top_ratio == 1


def test_the_block_that_was_changed_is_the_one_that_introduces_the_error() -> None:
    found = difference(trace(model_of(), IDS), changed(1, 0.1), IDS)
    introduced = [one.introduced for one in found.layers]
    assert introduced[0] is None
    assert introduced[1] == introduced[3] == 0
    assert introduced[2] is not None
    assert introduced[2] > 0.01
    accumulated = [one.accumulated for one in found.layers]
    assert accumulated[:2] == [0, 0]
    assert accumulated[2] == pytest.approx(introduced[2])  # nothing was wrong in front of it
    assert accumulated[3] > 0
    assert found.layers[3].cosine < 1


def test_divergence_is_that_of_the_distributions() -> None:
    a, b = model_of(), changed(0, 0.3)
    found = difference(trace(a, IDS), b, IDS)
    with torch.inference_mode():
        of_a, of_b = (one(torch.tensor([IDS]))[0].log_softmax(-1) for one in (a, b))
    wanted = F.kl_div(of_b, of_a, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(found.kl_nats, wanted, atol=1e-4)
    assert found.kl_nats.max() > 0.01
    for row, logs in zip(found.true_probabilities, (of_a, of_b), strict=True):
        assert torch.allclose(row, logs[range(len(IDS) - 1), IDS[1:]].exp(), atol=1e-5)
    apart = [i for i in range(len(IDS)) if of_a[i].argmax() != of_b[i].argmax()]
    assert found.first_divergence == apart[0]
    assert found.same_top_ratio == pytest.approx(1 - len(apart) / len(IDS))


def test_fewer_layers_leave_the_predictions_to_compare() -> None:
    shorter = model_of()
    del shorter.blocks[1]
    found = difference(trace(model_of(), IDS), shorter, IDS)
    assert found.layers == ()
    assert found.kl_nats.max() > 0


def test_another_vocabulary_is_refused() -> None:
    other = model_of(LLAMA_SHAPE.model_copy(update={"vocabulary": 280}))
    with pytest.raises(InvalidInput, match="300 tokens apart and the second 280"):
        difference(trace(model_of(), IDS), other, IDS)


def test_models_of_two_families_still_compare_their_predictions() -> None:
    found = difference(trace(model_of(), IDS), model_of(GPT2_SHAPE), IDS)
    assert found.layers == ()
    assert found.kl_nats.min() >= 0
