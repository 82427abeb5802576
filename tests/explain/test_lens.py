import math

import pytest
import torch

from gptcore.errors import Cancelled
from gptcore.explain.lens import lens, logits_by_depth
from tests.explain.models import IDS, SHAPES, model_of


@pytest.mark.parametrize("name", SHAPES)
def test_the_last_layer_equals_the_models_output_exactly(name: str) -> None:
    model = model_of(SHAPES[name])
    with torch.inference_mode():
        wanted = model(torch.tensor([IDS]))[0]
    depths = list(logits_by_depth(model, IDS))
    assert len(depths) == SHAPES[name].layers + 1
    assert torch.equal(depths[-1], wanted)
    assert not torch.allclose(depths[-2], wanted)


def test_what_is_told_of_each_depth_follows_from_its_logits() -> None:
    model = model_of()
    final = model(torch.tensor([IDS]))[0].log_softmax(-1)
    best = final.argmax(-1)
    for depth, logits in zip(lens(model, IDS), logits_by_depth(model, IDS), strict=True):
        p = logits.softmax(-1)
        assert torch.equal(depth.ids[:, 0], p.argmax(-1))
        assert torch.allclose(depth.probabilities[:, 0], p.max(-1).values)
        assert torch.allclose(depth.final_probability, p[range(len(IDS)), best])
        assert torch.allclose(depth.next_probability, p[range(len(IDS) - 1), IDS[1:]])
        entropy = -(p * p.clamp_min(1e-30).log2()).sum(-1)
        assert torch.allclose(depth.entropy_bits, entropy, atol=1e-4)
        kl = (final.exp() * (final - p.log())).sum(-1)
        assert torch.allclose(depth.kl_nats, kl, atol=1e-4)


def test_the_end_diverges_from_itself_by_nothing_and_the_beginning_by_something() -> None:
    depths = lens(model_of(), IDS)
    assert depths[-1].kl_nats.abs().max() < 1e-6
    assert depths[0].kl_nats.mean() > 0.01
    assert all((depth.entropy_bits <= math.log2(300) + 1e-4).all() for depth in depths)


def test_it_can_be_stopped_between_two_blocks() -> None:
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise Cancelled("Cancelled.")

    with pytest.raises(Cancelled):
        lens(model_of(), IDS, check=check)
