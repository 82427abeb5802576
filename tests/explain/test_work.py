"""The Work around the looks: every result is JSON, small, and what the functions found."""

import base64
import gzip
import json
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gptcore.errors import Cancelled, InvalidInput
from gptcore.explain.packed import unpack
from gptcore.explain.work import Explain
from gptcore.host.works import WORKS, work_from_json
from gptcore.passes.base import PassContext
from gptcore.recipe import Recipe, Variant, place
from gptcore.records import RunKind
from gptcore.work import Loaded
from tests.explain.models import LLAMA_SHAPE, TEXT
from tests.measure.desk import FakeDesk, variant

MAX_RESULT_BYTES = 2 * 2**20
LONG = LLAMA_SHAPE.model_copy(update={"context": 1024, "head_width": 64, "layers": 4})
A, B = variant(1, LLAMA_SHAPE), variant(2, LLAMA_SHAPE)


def performed(desk: FakeDesk | None = None, **fields: Any) -> dict[str, Any]:
    work = Explain(**{"variant": A, "prompt": TEXT, **fields})
    result = dict(work.perform(desk or FakeDesk()))
    text = json.dumps(result)
    assert len(text) < MAX_RESULT_BYTES
    return json.loads(text)


@pytest.mark.parametrize("what", ["attention", "lens", "attribution", "worth", "profile"])
def test_every_look_tells_its_text_and_survives_json(what: str) -> None:
    text = performed(what=what)["text"]
    assert "".join(text["texts"]) == TEXT
    assert text["ids"] == list(TEXT.encode())
    assert text["left_out"] == 0


def test_attention_holds_one_head_and_a_picture_of_all() -> None:
    found = performed(what="attention", layer=2, head=3)
    tokens = len(TEXT)
    q, k, v = (unpack(found[name]) for name in "qkv")
    assert q.shape == k.shape == v.shape == (tokens, 8)
    weights = unpack(found["weights"])
    assert np.abs(weights.sum(-1) - 1).max() < 1e-3
    scores = q @ k.T / np.sqrt(8)
    scores[np.triu_indices(tokens, 1)] = -np.inf
    again = np.exp(scores - scores.max(-1, keepdims=True))
    assert np.abs(again / again.sum(-1, keepdims=True) - weights).max() < 2e-3
    assert np.abs(weights @ v - unpack(found["output"])).max() < 2e-3 * np.abs(v).max()
    assert unpack(found["small"]).shape == (3, 4, 20, 20)
    assert found["heads"] == [4, 4, 4]
    assert len(found["characters"]) == 12
    assert found["fused"]
    assert found["disagreement"] < 1e-5


def test_a_long_text_is_windowed_and_its_result_stays_small() -> None:
    found = performed(what="attention", variant=variant(1, LONG), prompt="abcdefgh" * 100)
    assert found["text"]["left_out"] == 800 - 512
    assert unpack(found["weights"]).shape == (512, 512)
    assert np.abs(unpack(found["weights"]).sum(-1) - 1).max() < 1e-3


def test_a_context_shorter_than_the_window_windows_too() -> None:
    found = performed(what="lens", prompt="x" * 200, variant=variant(1))  # reads 64
    assert len(found["text"]["ids"]) == 64
    assert found["text"]["left_out"] == 136


@pytest.mark.parametrize(("field", "last"), [("layer", 2), ("head", 3)])
def test_a_layer_or_head_that_is_not_there_is_named_with_the_last(field: str, last: int) -> None:
    with pytest.raises(InvalidInput, match=f"{last + 1} was asked for; .* 0 to {last}"):
        performed(what="attention", **{field: last + 1})


def test_the_lens_ends_with_the_models_own_words() -> None:
    desk = FakeDesk()
    found = performed(desk, what="lens")
    engine = desk.load(A).engine
    best = int(engine.next_logits(found["text"]["ids"]).argmax())
    ids = unpack(found["ids"])
    assert ids.shape == (4, len(TEXT), 3)
    assert ids[-1, -1, 0] == best
    assert found["words"][str(best)] == engine.tokenizer.token_text(best)
    assert np.abs(unpack(found["kl_nats"])[-1]).max() < 1e-3


def test_attribution_tells_both_methods_and_which_leads() -> None:
    found = performed(what="attribution", steps=16)
    methods = found["methods"]
    assert set(methods) == {"leave_one_out", "gradients"}
    for one in methods.values():
        assert len(one["scores"]) == len(TEXT)
        assert len(one["deletion"]) == len(found["removed"])
    reliable = methods["gradients"]["completeness_error"] <= 0.05
    assert methods["gradients"]["reliable"] == reliable
    assert found["leads"] == ("gradients" if reliable else "leave_one_out")
    assert len(found["random"]) == 5


def test_one_method_alone_leads() -> None:
    assert performed(what="attribution", method="leave_one_out")["leads"] == "leave_one_out"
    assert performed(what="attribution", method="gradients", steps=8)["leads"] == "gradients"


def test_another_token_than_the_likeliest_can_be_explained() -> None:
    found = performed(what="attribution", target_id=65, method="leave_one_out")
    assert found["target"] == {"id": 65, "text": "A"}
    with pytest.raises(InvalidInput, match="300 is not in the vocabulary of 300"):
        performed(what="attribution", target_id=300)


def test_the_likeliest_tokens_are_offered() -> None:
    desk = FakeDesk()
    found = performed(desk, what="attribution", method="leave_one_out")
    offered = found["candidates"]
    assert offered[0]["id"] == found["target"]["id"]
    logits = torch.from_numpy(desk.load(A).engine.next_logits(list(TEXT.encode())))
    wanted = logits.softmax(-1).topk(len(offered))
    assert [one["id"] for one in offered] == wanted.indices.tolist()
    assert [one["probability"] for one in offered] == pytest.approx(wanted.values.tolist())


def test_leaving_out_is_known_before_the_gradients_are() -> None:
    desk = FakeDesk()
    performed(desk, what="attribution", steps=8)
    assert set(desk.partials[0]["methods"]) >= {"leave_one_out"}


def test_worth_grows_with_every_layer_that_is_done() -> None:
    desk = FakeDesk()
    found = performed(desk, what="worth")
    assert [len(one["parts"]) for one in desk.partials] == [7, 14, 21]
    assert len(found["parts"]) == 21
    assert found["loss"] > 0


def test_two_variants_are_held_against_each_other_where_only_one_fits() -> None:
    desk = FakeDesk(room=1)
    found = performed(desk, what="difference", other=B)
    assert desk.loads == [A.model, B.model]
    assert len(found["layers"]) == 4
    assert len(found["kl_nats"]) == len(found["a"]) == len(found["b"]) == len(TEXT)
    assert max(found["kl_nats"]) > 1e-4
    assert Explain(what="difference", variant=A, other=B, prompt="ab").variants_used() == (A, B)


def test_tokens_of_other_tokenizers_are_not_held_against_each_other() -> None:
    other: Variant = variant(2, LLAMA_SHAPE.model_copy(update={"vocabulary": 280}))
    with pytest.raises(InvalidInput, match="other tokens"):
        performed(what="difference", other=other)


def test_the_trace_of_a_profile_opens() -> None:
    desk = FakeDesk()
    found = performed(desk, what="profile")
    trace = json.loads(gzip.decompress(base64.b64decode(found["trace"])))
    assert trace["traceEvents"]
    # What is kept is the step as it is really made: the native one, where there is a compiler.
    assert desk.kept["decode_step_s"] == tuple(found["native_s"] or found["plain_s"])


@pytest.mark.parametrize("what", ["attention", "lens", "attribution", "worth", "profile"])
def test_every_look_can_be_stopped(what: str) -> None:
    with pytest.raises(Cancelled):
        performed(FakeDesk(checks=1), what=what)


@pytest.mark.parametrize("what", ["attention", "lens", "attribution", "worth"])
def test_a_text_too_short_to_look_into_is_one_sentence(what: str) -> None:
    with pytest.raises(InvalidInput, match="has 1 token and at least"):
        performed(what=what, prompt="a")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": ""}, "at least 1 character"),
        ({"prompt": "a\x00b"}, "NUL"),
        ({"what": "everything"}, "attention"),
        ({"layer": -1}, "greater than or equal to 0"),
        ({"steps": 10_000}, "less than or equal to 512"),
        ({"what": "difference"}, "needs a second variant"),
        ({"other": B}, "only a difference"),
    ],
)
def test_bad_orders_are_refused_before_anything_runs(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Explain(**{"what": "lens", "variant": A, "prompt": TEXT, **fields})


def test_the_host_can_read_the_order_back() -> None:
    assert WORKS[RunKind.EXPLAIN] is Explain
    work = Explain(what="difference", variant=A, other=B, prompt=TEXT, layer=1)
    assert work_from_json(RunKind.EXPLAIN, json.loads(work.model_dump_json())) == work


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_variant_of_packed_weights_can_be_looked_into(precision: str) -> None:
    """Packed layers keep no matrix, and a packed embedding no numbers of the stream's kind."""

    class PackingDesk(FakeDesk):
        def load(self, variant: Variant) -> Loaded:
            loaded = super().load(variant)
            for one in variant.recipe.passes:
                context = PassContext(placement=variant.placement)
                loaded.engine.model = one.apply(loaded.engine.model, context).eval()
            return loaded

    placement, recipe = place(precision, "cpu", 1, Recipe())
    packed = A.model_copy(update={"placement": placement, "recipe": recipe})
    for what in ("attention", "lens", "worth", "profile"):
        performed(PackingDesk(), what=what, variant=packed)
    found = performed(PackingDesk(), what="difference", other=packed)
    assert max(found["kl_nats"]) > 0
    assert all(one["introduced"] > 0 for one in found["layers"][1:])
    found = performed(PackingDesk(), what="attribution", variant=packed)
    assert "leave_one_out" in found["methods"]
    assert ("gradients" in found["methods"]) == (found["gradients_problem"] is None)
    if precision == "int8":  # rounds its inputs, which torch's operation has no gradient for
        assert "blocks.0.attention.q computes with packed weights" in found["gradients_problem"]


def test_texts_are_held_to_a_rule_and_what_that_costs_is_told() -> None:
    desk = FakeDesk()
    held = {"constraint": {"choices": ["yes", "no"]}, "texts": 6, "temperature": 1.5}
    found = performed(desk, what="constraint", held=held)
    assert [one["text"].strip() in ("yes", "no") for one in found["texts"]] == [True] * 6
    assert all(one["finished"] and one["follows"] for one in found["texts"])
    assert [one["seed"] for one in found["texts"]] == list(range(6))
    assert len(found["free"]) == 5
    assert not any(one["follows"] for one in found["free"])
    assert 0 < found["mask_s"] < found["step_s"]
    assert found["compile_s"] > 0
    assert len(desk.partials[0]["texts"]) == 1
    assert "".join(found["text"]["texts"]) == TEXT


def test_a_rule_that_cannot_be_followed_fails_before_anything_is_written() -> None:
    desk = FakeDesk()
    with pytest.raises(InvalidInput, match="uniqueItems"):
        performed(desk, what="constraint",
                  held={"constraint": {"json_schema": '{"uniqueItems": true}'}})  # fmt: skip
    assert not desk.partials
    with pytest.raises(ValidationError, match="needs the texts"):
        performed(what="constraint")
