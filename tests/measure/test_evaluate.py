"""The evaluation as a work: its result, what is told meanwhile, its refusals and its end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from gptcore.errors import Cancelled, ContextOverflow, DoesNotFit, InvalidInput
from gptcore.measure import evaluate as module
from gptcore.measure.evaluate import Evaluate
from gptcore.measure.perplexity import Logits, Windowing, model_logits
from gptcore.model import GPT
from gptcore.recipe import Variant
from gptcore.records import RunKind
from gptcore.spec import gpt
from tests.measure.desk import TINY, FakeDesk, variant

PROMISED = {"perplexity", "bits_per_byte", "scored_tokens", "identity"}
PROMISED_AGAINST = {
    "kl_mean",
    "kl_p99",
    "same_top_ratio",
    "log_ppl_ratio_mean",
    "log_ppl_ratio_se",
}
"""The keys that scripts and teams rely on."""
SHORT = Windowing(window=32, stride=16, max_tokens=400)

pytestmark = pytest.mark.usefixtures("data_folder")


def work(against: Variant | None = None, **more: object) -> Evaluate:
    given = {"variant": variant(), "windowing": SHORT, "prompts": 2, "new_tokens": 5}
    return Evaluate.model_validate(given | {"against": against} | more)


def test_the_result_has_the_promised_keys_and_is_json() -> None:
    desk = FakeDesk()
    found = work().perform(desk)
    assert set(found) >= PROMISED
    assert not set(found) & PROMISED_AGAINST
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["perplexity"] == pytest.approx(300, rel=0.05)  # random weights know nothing
    assert found["scored_tokens"] == found["identity"]["scored_positions"] == 399
    assert found["identity"]["bos"] is None
    assert (found["text"], found["text_tokens"], found["model"]) == ("evaluation", 400, "tiny-0")
    assert desk.phases[-1] == ("window 24 of 24", 1.0)
    assert len(desk.kept["nll_nats_per_token"]) == 24


def test_against_another_variant_it_has_the_rest() -> None:
    desk = FakeDesk()
    found = work(variant(1)).perform(desk)
    assert set(found) >= PROMISED | PROMISED_AGAINST
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    other = found["against"]
    assert math.log(other["perplexity"] / found["perplexity"]) == pytest.approx(
        found["log_ppl_ratio_mean"]
    )
    assert (found["model"], other["model"]) == ("tiny-0", "tiny-1")
    assert found["kl_mean"] > 0
    assert found["alternated"] is False
    assert found["greedy"]["prompts"] == 2
    assert found["greedy"]["new_tokens"] == 5
    assert (
        other["perplexity"]
        == work().model_copy(update={"variant": variant(1)}).perform(desk)["perplexity"]
    )
    assert desk.loads == ["tiny-0", "tiny-1"]
    assert len(desk.kept["kl_nats_per_token"]) == 24


def test_four_are_measured_together_and_the_first_of_them_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = [variant(seed) for seed in (1, 2, 3)]
    alone = [work(one).perform(FakeDesk()) for one in others]
    opened: list[object] = []

    def counted(model: GPT) -> Logits:
        opened.append(model)
        return model_logits(model)

    monkeypatch.setattr(module, "model_logits", counted)
    desk = FakeDesk()
    found = work(others[0], further=others[1:]).perform(desk)
    assert len(opened) == 4
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    assert {**found, "further": []} == alone[0]
    for one, expected in zip(found["further"], alone[1:], strict=True):
        assert one == {name: expected[name] for name in one}
        assert set(one) >= PROMISED_AGAINST | {"against", "greedy"}
    assert {"c_kl_nats_per_token", "d_nll_nats_per_token"} <= set(desk.kept)


def test_further_variants_need_a_first_one() -> None:
    with pytest.raises(ValidationError, match="there are further variants but no B"):
        work(further=[variant(1)])


def test_a_variant_against_itself_is_exactly_zero() -> None:
    found = work(variant()).perform(FakeDesk())
    for name in ("log_ppl_ratio_mean", "log_ppl_ratio_se", "kl_mean", "kl_p99", "delta_p_rms"):
        assert found[name] == 0.0, name
    assert found["same_top_ratio"] == 1.0
    assert found["greedy"]["first_divergent"] == (None, None)
    assert found["perplexity"] == found["against"]["perplexity"]


def test_two_that_do_not_fit_together_alternate_and_give_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = work(variant(1)).perform(FakeDesk())
    monkeypatch.setattr(module, "MAX_HELD_BYTES", (31 + 7 * 16) * 300 * 4)  # 8 of 24
    desk = FakeDesk(room=1)
    found = work(variant(1)).perform(desk)
    assert found["alternated"] is True
    assert {**found, "alternated": False} == together
    # Two to look at each, two in the first of three rounds, one in each other, two for the texts.
    assert desk.loads == ["tiny-0", "tiny-1"] * 4


def test_what_is_known_so_far_is_told_and_kept_when_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TOLD_EVERY_S", 0.0)
    desk = FakeDesk(checks=30)
    with pytest.raises(Cancelled):
        work(variant(1)).perform(desk)
    assert desk.partials
    partial = desk.partials[-1]
    assert 0 < partial["scored_tokens"] < 399
    assert partial["identity"]["scored_positions"] == partial["scored_tokens"]
    assert set(partial) >= PROMISED | PROMISED_AGAINST
    assert partial["greedy"] is None


def test_it_stops_between_two_greedy_tokens() -> None:
    whole = FakeDesk(checks=10_000)
    work(variant(1)).perform(whole)
    assert whole.checks is not None
    used = 10_000 - whole.checks
    desk = FakeDesk(checks=used - 3)
    with pytest.raises(Cancelled):
        work(variant(1)).perform(desk)
    assert desk.phases[-1] == ("writing greedily", 0.75)
    assert desk.partials[-1]["scored_tokens"] == 399


def test_no_prompts_leave_the_greedy_texts_out() -> None:
    desk = FakeDesk()
    found = work(variant(1), prompts=0).perform(desk)
    assert found["greedy"] is None
    assert "writing greedily" not in {text for text, _ in desk.phases}


def test_greedy_texts_are_cut_to_what_the_context_holds() -> None:
    found = work(variant(1), new_tokens=500).perform(FakeDesk())
    assert found["greedy"]["new_tokens"] == TINY.context - 1


REFUSED = {
    "window": ({"windowing": Windowing(window=65)}, ContextOverflow, "window of 65 .* tiny-0, 64"),
    "no text": ({"text": "missing"}, InvalidInput, "There is no text file missing|'missing'"),
    "calibration": ({"text": "calibration"}, InvalidInput, "is the calibration text"),
    "bos": ({"windowing": Windowing(window=32, bos=True)}, InvalidInput, "no first-of-text token"),
    "vocabulary": (
        {"against": variant(1, TINY.model_copy(update={"vocabulary": 301}))},
        InvalidInput,
        "different tokenizers",
    ),
    "shorter context": (
        {"against": variant(1, gpt(2, 32, 2, context=16, vocabulary=300))},
        ContextOverflow,
        "context of tiny-1, 16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_evaluated_is_refused_before_any_window(case: str) -> None:
    changes, kind, said = REFUSED[case]
    desk = FakeDesk()
    with pytest.raises(kind, match=said):
        work(**changes).perform(desk)
    assert not [text for text, _ in desk.phases if text.startswith("window")]


@pytest.mark.parametrize(("content", "said"), [("", "is empty"), ("a", "has 1 token to read")])
def test_an_empty_text_and_one_of_a_single_token_are_refused(
    content: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(content)
    with pytest.raises(InvalidInput, match=said):
        work(text=str(file)).perform(FakeDesk())


def test_a_text_of_two_tokens_is_scored_without_an_error_of_the_mean(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ab")
    found = work(variant(1), text=str(file)).perform(FakeDesk())
    assert found["scored_tokens"] == 1
    assert found["nll_se"] is found["log_ppl_ratio_se"] is None
    assert found["greedy"]["prompts"] == 1


def test_a_variant_that_cannot_be_loaded_ends_it() -> None:
    with pytest.raises(DoesNotFit):
        work(variant(1)).perform(FakeDesk(broken={"tiny-1": 0}))


def test_variants_on_two_devices_are_refused() -> None:
    other = variant(1).model_copy(
        update={"placement": variant().placement.model_copy(update={"device": "cuda:0"})}
    )
    with pytest.raises(ValidationError, match="variants are on cpu and cuda:0"):
        work(other)


def test_it_is_a_work_of_its_kind_that_comes_back_from_json() -> None:
    one = work(variant(1))
    assert one.kind is RunKind.EVALUATE
    assert [each.model for each in one.variants_used()] == ["tiny-0", "tiny-1"]
    assert Evaluate.model_validate(json.loads(one.model_dump_json())) == one
