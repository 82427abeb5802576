import json

import pytest

from gptcore.errors import Cancelled
from gptcore.explain.profile import BETWEEN, MARK, STEPS, TRACED, Operation, Profile, profile
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
    assert Profile(parts, 1.0, (), "").named == 3
    assert Profile(parts, 0.9, (), "").named == 3
    assert Profile(parts[:1], 0.5, (), "").named == 1


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
