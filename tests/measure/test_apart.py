"""KL at each token of a written text: that of whole forward passes, nothing for A against A."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptcore.errors import ContextOverflow, InvalidInput
from gptcore.measure.apart import Apart
from gptcore.records import Request
from tests.measure.desk import TINY, FakeDesk, variant

A, B = variant(0), variant(1)
REQUEST = Request(prompt="The fox")
ANSWERS = ((5, 9, 2, 7), (1, 1, 3))


def read(desk: FakeDesk | None = None, **changes: Any) -> dict[str, Any]:
    fields = {"variant": A, "against": B, "request": REQUEST, "answers": ANSWERS}
    return dict(Apart(**{**fields, **changes}).perform(desk or FakeDesk()))


@pytest.mark.parametrize("room", [1, 4])
def test_it_is_what_whole_forward_passes_say(room: int) -> None:
    """With room for one variant, the other's logits wait on the CPU: the same numbers."""
    desk, found = FakeDesk(), read(FakeDesk(room=room))
    models = [desk.load(one).engine.model for one in (A, B)]
    prompt, _ = desk.load(A).engine.prompt_ids(REQUEST)
    assert found["prompt_tokens"] == len(prompt)
    for answer, told in zip(ANSWERS, found["texts"], strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.inference_mode():
            p, q = (one(ids)[0, len(prompt) - 1 : -1].double().softmax(-1) for one in models)
        kl = (p * (p / q).log()).sum(-1)
        assert told["kl_nats"] == pytest.approx(kl.tolist(), rel=1e-4)
        true = torch.tensor(answer)[:, None]
        assert told["p_a"] == pytest.approx(p.gather(1, true)[:, 0].tolist(), rel=1e-4)
        assert told["p_b"] == pytest.approx(q.gather(1, true)[:, 0].tolist(), rel=1e-4)


def test_a_variant_is_not_apart_from_itself() -> None:
    for told in read(against=A)["texts"]:
        assert set(told["kl_nats"]) == {0.0}


def test_other_tokens_and_too_long_a_text_are_refused() -> None:
    other = variant(2, TINY.model_copy(update={"vocabulary": 280}))
    with pytest.raises(InvalidInput, match="different tokenizers"):
        read(against=other)
    with pytest.raises(ContextOverflow, match="at most 64: write a shorter text"):
        read(answers=((1,) * 60,))
