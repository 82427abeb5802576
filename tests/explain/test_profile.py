import json

import pytest

from gptcore.engine import Engine
from gptcore.errors import Cancelled
from gptcore.explain.profile import (
    BETWEEN,
    MARK,
    NATIVE,
    STEPS,
    TRACED,
    Operation,
    Profile,
    profile,
)
from gptcore.kernels.linear import NativeLinear
from gptcore.kernels.step import step_of
from gptcore.passes.base import PassContext
from gptcore.recipe import Recipe, place
from gptcore.spec import gpt
from gptcore.tokenizer import byte_tokenizer
from gptcore.weights import build_random
from tests.explain.models import IDS, model_of


def test_the_parts_of_a_step_add_up_and_name_what_ran() -> None:
    found = profile(model_of(), IDS)
    assert sum(one.seconds for one in found.operations) == pytest.approx(found.step_s, rel=0.02)
    seconds = [one.seconds for one in found.operations]
    assert seconds == sorted(seconds, reverse=True)
    calls = {one.name: one.calls for one in found.operations}
    assert calls["aten::linear"] == 3 * 7 + 1  # the projections of 3 blocks, and the head
    assert calls[BETWEEN] == 1
    assert len(found.plain_s) == STEPS
    assert found.step_s > 0

    covered = sum(one.seconds for one in found.operations[: found.named])
    assert covered >= 0.9 * found.step_s * 0.98
    assert found.named < len(found.operations)

    events = json.loads(found.trace)["traceEvents"]
    marks = [one for one in events if one.get("name") == MARK and one.get("ph") == "X"]
    assert len(marks) == TRACED
    assert any(one.get("name") == "aten::linear" for one in events)


def test_the_longest_that_make_up_nine_tenths_are_counted() -> None:
    parts = tuple(Operation(str(s), s, 1) for s in (0.5, 0.3, 0.1, 0.06, 0.04))
    assert Profile(parts, 1.0, (), (), "").named == 3
    assert Profile(parts, 0.9, (), (), "").named == 3
    assert Profile(parts[:1], 0.5, (), (), "").named == 1


def test_a_text_as_long_as_the_context_leaves_room_for_the_step() -> None:
    model = model_of()
    assert profile(model, (IDS * 10)[: model.spec.context]).step_s > 0


def test_it_can_be_stopped_between_steps() -> None:
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked > 4:
            raise Cancelled("Cancelled.")

    with pytest.raises(Cancelled):
        profile(model_of(), IDS, check=check)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_native_step_is_timed_whole_and_its_layers_are_named(precision: str) -> None:
    """Our own library runs in no operation of torch's: unnamed, it would all be Python's."""
    placement, recipe = place(precision, "cpu", 1, Recipe())
    model = build_random(gpt(2, 128, 2, context=64, vocabulary=300), placement).eval()
    for one in recipe.passes:
        model = one.apply(model, PassContext(placement=placement))
    engine = Engine(model, byte_tokenizer(300))
    found = profile(engine.model, [1, 2, 3])
    names = {one.name: one.calls for one in found.operations}
    assert bool(found.native_s) == (step_of(model) is not None)
    assert any(name.startswith("aten::") for name in names)
    if any(isinstance(one, NativeLinear) for one in model.modules()):
        assert names[NATIVE] == 2 * 6 + 2
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
