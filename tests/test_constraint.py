"""Texts that are held to a rule: every finished one follows it, whatever the model would say."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from gptcore import constraint, weights
from gptcore.constraint import Guide, _unknown_keywords, follows, grammar_of
from gptcore.device import Placement
from gptcore.engine import Engine
from gptcore.errors import InvalidInput
from gptcore.records import Constraint, FinishReason, Request, Sampling
from gptcore.sampling import stages
from gptcore.tokenizer import byte_tokenizer, load_tokenizer
from tests.explain.models import LLAMA_SHAPE, model_of
from tests.tiny import tiny_checkpoint

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8, "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
RULES = {
    "choices": Constraint(choices=("yes", "no", "it depends", 'a "quote" \\ é')),
    "regex": Constraint(regex=r"[A-Z][a-z]{2,6}(, [a-z]{1,4}){0,3}\."),
    "schema": Constraint(json_schema=json.dumps(PERSON)),
}


@pytest.fixture(scope="module")
def bytes_engine() -> Engine:
    return Engine(model_of(LLAMA_SHAPE), byte_tokenizer(LLAMA_SHAPE.vocabulary))


@pytest.fixture(scope="module")
def pieces_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """With tokens of several characters, and one that ends a text."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("constraint") / "tiny")
    model = weights.build(weights.describe(folder), Placement())
    return Engine(model, load_tokenizer(folder))


@pytest.fixture(params=["bytes", "pieces"])
def engine(request: pytest.FixtureRequest, bytes_engine: Engine, pieces_engine: Engine) -> Engine:
    return {"bytes": bytes_engine, "pieces": pieces_engine}[request.param]


def written(engine: Engine, rule: Constraint | None, **fields: Any) -> tuple[str, Any]:
    asked = {"prompt": "Once upon", "max_new_tokens": 90, "temperature": 1.5, **fields}
    generation = engine.start(Request(constraint=rule, **asked))
    return "".join(token.text for token in generation), generation


@pytest.mark.parametrize("name", RULES)
def test_every_finished_text_follows_its_rule(engine: Engine, name: str) -> None:
    """The weights are random, so that without the rule no text would follow it."""
    ended = 0
    texts = set()
    for seed in range(10):
        text, generation = written(engine, RULES[name], seed=seed)
        if generation.finish_reason is FinishReason.EOS:
            ended += 1
            texts.add(text)
            assert follows(RULES[name], text), text
    assert ended >= 6
    assert len(texts) > 1
    free, _ = written(engine, None)
    assert not follows(RULES[name], free)


def test_a_text_ends_as_soon_as_nothing_can_follow(engine: Engine) -> None:
    text, generation = written(engine, Constraint(regex="abc"))
    assert text == "abc"
    assert generation.finish_reason is FinishReason.EOS
    assert generation.new_tokens <= 3


def test_a_rule_without_an_end_is_cut_at_the_limit(engine: Engine) -> None:
    text, generation = written(engine, Constraint(regex="a+b{5000}"), max_new_tokens=12)
    assert generation.finish_reason is FinishReason.LENGTH
    assert re.fullmatch("a+b*", text)


def test_a_rule_holds_for_what_temperature_zero_takes(engine: Engine) -> None:
    text, _ = written(engine, RULES["choices"], temperature=0)
    assert text.removeprefix(" ") in RULES["choices"].choices


def test_the_end_of_text_ends_even_where_it_would_be_ignored(pieces_engine: Engine) -> None:
    text, generation = written(pieces_engine, RULES["regex"], ignore_eos=True, seed=3)
    assert generation.finish_reason is FinishReason.EOS
    assert follows(RULES["regex"], text)


def test_the_first_stage_is_the_models_own_and_the_others_hold_to_the_rule() -> None:
    logits = np.array([3.0, 2.0, 1.0, 0.0], dtype="f4")
    allowed = np.array([False, True, False, True])
    chain = stages(logits, Sampling(temperature=1.0), allowed=allowed)
    plain = stages(logits, Sampling(temperature=1.0))
    assert (chain[0].probabilities() == plain[0].probabilities()).all()
    for stage in chain[1:]:
        wanted = np.where(allowed, np.exp(logits), 0)
        assert stage.probabilities() == pytest.approx(wanted / wanted.sum())
    cold = stages(logits, Sampling(temperature=0), allowed=allowed)[-1]
    assert cold.probabilities().argmax() == 1
    samplers = Sampling(temperature=0.5, top_k=1, top_p=0.5, min_p=0.1, repetition_penalty=2.0)
    assert stages(logits, samplers, (0, 1), allowed)[-1].probabilities()[[0, 2]].sum() == 0


def test_a_branch_goes_on_within_the_rule(bytes_engine: Engine) -> None:
    trunk = tuple(b"ye")
    text, _ = written(bytes_engine, Constraint(choices=("yes", "no")), forced_ids=trunk)
    assert text == "yes"
    with pytest.raises(InvalidInput, match="breaks its choices"):
        written(bytes_engine, Constraint(choices=("yes", "no")), forced_ids=tuple(b"x"))


def test_tokens_that_may_come_are_those_behind_which_the_rule_can_be_met(
    bytes_engine: Engine,
) -> None:
    guide = Guide(Constraint(regex="ab|ac"), bytes_engine.tokenizer, LLAMA_SHAPE.vocabulary)
    assert guide.allowed().nonzero()[0].tolist() == [ord("a")]
    guide.take(ord("a"))
    assert not guide.may_end
    assert guide.allowed().nonzero()[0].tolist() == [ord("b"), ord("c")]
    guide.take(ord("c"))
    assert guide.may_end
    assert guide.complete
    assert len(guide.mask_s) == 3
    assert guide.compile_s > 0


def test_the_tokenizer_is_prepared_once(bytes_engine: Engine) -> None:
    ticks = iter(range(1000))
    made = [
        Guide(Constraint(regex=rule), bytes_engine.tokenizer, LLAMA_SHAPE.vocabulary,
              clock=lambda: float(next(ticks)))
        for rule in ("a", "b")
    ]  # fmt: skip
    assert made[0].compile_s == made[1].compile_s == 1.0  # one tick, by the clock that was given
    again = [written(bytes_engine, Constraint(regex="a"))[1].guide.prepare_s for _ in range(2)]
    assert max(again) < 0.05


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"x": {"not": {"type": "string"}}}}, "not"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
        ({"type": "string", "minLenght": 3}, "minLenght"),
        ({"type": "object", "properties": {"a": {"typ": "string"}}}, "typ"),
        ({"anyOf": [{"type": "string"}, {"kind": 1}]}, "kind"),
        ({"type": "string", "format": "nonsense"}, "nonsense"),
        ({"type": "strng"}, "strng"),
        ({"type": "string", "minLength": -1}, "minLength"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/$defs/nobody"}, "nobody"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"enum": []}, "empty"),
        (False, "false"),
        ([1], "schema"),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_followed_is_refused_by_what_hinders(
    bytes_engine: Engine, schema: Any, named: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        written(bytes_engine, Constraint(json_schema=json.dumps(schema)))
    said = str(refused.value)
    assert named in said
    assert said.endswith(".")
    assert "\n" not in said
    assert len(said) < 320


def test_a_name_of_a_property_is_no_keyword() -> None:
    schema = {"type": "object", "properties": {"minLenght": {"type": "string"}}}
    assert grammar_of(Constraint(json_schema=json.dumps(schema)))


def test_every_keyword_of_the_standard_is_known() -> None:
    known = {
        keyword
        for vocabulary in Draft202012Validator.META_SCHEMA["allOf"]
        for keyword in _vocabulary(vocabulary["$ref"])
    }
    assert len(known) > 40
    for keyword in known - {"$recursiveRef", "$recursiveAnchor"}:
        assert list(_unknown_keywords({keyword: 1}, "schema", 0)) == [], keyword


def _vocabulary(reference: str) -> list[str]:
    from jsonschema_specifications import REGISTRY

    contents = REGISTRY.contents(f"https://json-schema.org/draft/2020-12/{reference}")
    return list(contents["properties"])


def test_a_schema_that_needs_itself_without_end_is_refused(bytes_engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="without an end"):
        written(bytes_engine, Constraint(json_schema='{"$ref": "#"}'))
    endless = {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}
    with pytest.raises(InvalidInput, match="without an end"):
        written(bytes_engine, Constraint(json_schema=json.dumps(endless)))


def test_a_tree_that_can_end_is_followed(bytes_engine: Engine) -> None:
    tree = {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}]}
    rule = Constraint(json_schema=json.dumps(tree))
    finished = 0
    for seed in range(10):
        text, generation = written(bytes_engine, rule, seed=seed)
        if generation.finish_reason is FinishReason.EOS:
            finished += 1
            assert follows(rule, text)
    assert finished


@pytest.mark.parametrize(
    ("regex", "named"), [("(a", "unclosed group"), ("(?=a)b", "look-around"), ("[z-a]", "range")]
)
def test_an_expression_that_cannot_be_used_is_one_sentence(
    bytes_engine: Engine, regex: str, named: str
) -> None:
    with pytest.raises(InvalidInput, match=named) as refused:
        written(bytes_engine, Constraint(regex=regex))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["{", "", "nothing", "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500]
)
def test_a_schema_that_is_no_json_or_too_deep_is_one_sentence(text: str) -> None:
    with pytest.raises((InvalidInput, ValidationError)):
        grammar_of(Constraint(json_schema=text))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "is empty"),
        ({"regex": "a", "choices": ("b",)}, "not several"),
        ({"choices": ("a", " ")}, "a choice is empty"),
        ({"choices": ("a", "b\x00")}, "NUL"),
        ({"regex": "a" * 20_001}, "at most 20000"),
    ],
)
def test_a_rule_is_exactly_one_and_can_be_read(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Constraint(**fields)


def test_following_is_judged_without_the_library_that_guides() -> None:
    assert follows(Constraint(choices=("yes",)), " yes")
    assert not follows(Constraint(choices=("yes",)), "yes!")
    assert follows(Constraint(regex="a+"), "aaa")
    assert not follows(Constraint(regex="a+"), "aab")
    assert follows(Constraint(regex="[a-z&&[^b]]"), "a") is not False
    assert follows(Constraint(regex="(?<n>a)(?"), "a") is None
    rule = RULES["schema"]
    assert follows(rule, '{"name": "ab", "age": 3, "tags": []}')
    assert not follows(rule, '{"name": "ab", "age": 300, "tags": []}')
    assert not follows(rule, '{"name": "ab"')


def test_an_expression_that_takes_for_ever_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint, "MATCH_S", 0.05)
    assert follows(Constraint(regex="(a|aa)+(a|aa)+(a|aa)+b"), "a" * 200) is None


@pytest.mark.smollm2
@pytest.mark.slow
def test_a_real_models_texts_follow_a_schema(smollm2_gguf) -> None:
    checkpoint = weights.describe(smollm2_gguf)
    torch.set_num_threads(1)
    engine = Engine(weights.build(checkpoint, Placement()), load_tokenizer(checkpoint.directory))
    rule = RULES["schema"]
    for seed in range(4):
        text, generation = written(engine, rule, prompt="A person as JSON:", seed=seed)
        assert generation.finish_reason is FinishReason.EOS
        assert follows(rule, text), text
