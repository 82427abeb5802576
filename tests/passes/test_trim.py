"""Trimming: what is cut, that nothing else changes, and that any text can still be written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gptcore import weights
from gptcore.device import Placement
from gptcore.engine import Engine
from gptcore.errors import ContextOverflow, InvalidInput
from gptcore.measure.memory import weight_bytes
from gptcore.model import GPT
from gptcore.passes.base import PassContext
from gptcore.passes.quantize import Int8
from gptcore.passes.trim import Trim
from gptcore.records import Message, Request
from gptcore.spec import ModelSpec
from gptcore.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from gptcore.weights.gguf import converted
from tests.passes.small import GPT2, SHAPES, applied, logits, made, placed, text
from tests.tiny import TEXT, tiny_checkpoint

every_shape = pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
ONE_TEXT = TEXT[0]
CUT = Trim(vocabulary="text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def ids_of(tokenizer: Tokenizer, written: str = ONE_TEXT) -> torch.Tensor:
    """Return (N, T) of a text that is repeated until it is long enough to calibrate with."""
    ids = tokenizer.encode(written)
    return torch.tensor([ids] * (1 + 1024 // len(ids)))


def cut(
    folder: Path, tokenizer: Tokenizer | None, *, tied: bool = True
) -> tuple[GPT, GPT, PassContext]:
    """Return a model, the same one cut to the text's tokens, and what it was cut with."""
    plain, model = (weights.build(weights.describe(folder), placed()) for _ in range(2))
    if not tied:
        for one in (plain, model):
            own = one.head.weight.detach().clone().flip(0)
            one.head.weight = nn.Parameter(own, requires_grad=False)
            one.spec = one.spec.model_copy(update={"tied_head": False})
    given = byte_tokenizer(320) if tokenizer is None else tokenizer
    context = PassContext(placement=placed(), tokenizer=tokenizer, calibration_ids=ids_of(given))
    return plain, CUT.apply(model, context), context


@every_shape
def test_a_shorter_context_changes_no_logit_and_refuses_what_is_longer(spec: ModelSpec) -> None:
    one, ids = Trim(context=40), text(spec)
    plain, model = made(spec), made(spec)
    before = weight_bytes(model)[0]
    context = PassContext(placement=placed())
    model = one.apply(model, context)
    assert logits(model, ids[:2, :40]).equal(logits(plain, ids[:2, :40]))
    with pytest.raises(ContextOverflow, match="do not fit into 40"):
        model(ids[:1, :41])
    assert model.spec == one.spec_after(spec)
    assert weight_bytes(model)[0] == one.weights_bytes_after(spec, Placement(), before)
    assert (weight_bytes(model)[0] < before) == (spec is GPT2)
    assert not context.coverage  # no multiplication is concerned


@every_shape
def test_without_a_cut_nothing_changes_and_the_coverage_is_none(spec: ModelSpec) -> None:
    ids = text(spec)
    model, coverage = applied(Trim(), made(spec))
    assert logits(model, ids[:2]).equal(logits(made(spec), ids[:2]))
    assert coverage.ratio == 0
    assert dict(coverage.skipped)["head"] == "all tokens stay"


def test_a_longer_context_is_refused() -> None:
    said = "its context has 64 positions; 65 would be more."
    assert Trim(context=65).blocked_by(GPT2, Placement()) == said
    with pytest.raises(InvalidInput, match="65 would be more"):
        applied(Trim(context=65), made(GPT2))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_logits_of_kept_tokens_are_as_before(
    folder: Path, whole: Tokenizer, tied: bool
) -> None:
    plain, model, context = cut(folder, whole, tied=tied)
    assert context.tokenizer is not None
    _, kept = whole.trimmed(set(whole.encode(ONE_TEXT)))
    old, new = whole.encode(ONE_TEXT), context.tokenizer.encode(ONE_TEXT)
    assert [kept[id] for id in new] == old
    before, after = (logits(one, torch.tensor([ids])) for one, ids in ((plain, old), (model, new)))
    assert 256 < len(kept) < 320  # so that something is cut, and bytes are not
    assert (after - before[..., kept]).abs().max() < 1e-5 * before.abs().max()
    assert model.spec.vocabulary == len(kept) == model.head.out_features
    assert (model.head.weight is model.embedding.weight) == tied
    assert torch.tensor(kept)[context.calibration_ids].equal(ids_of(whole))
    coverage = context.coverage["trim"]
    assert coverage.converted_weights == 320 * 32
    assert coverage.stored_bytes == len(kept) * 32 * 4
    assert weight_bytes(plain)[0] - weight_bytes(model)[0] == (2 - tied) * (320 - len(kept)) * 128


def test_ids_stay_in_order_and_special_tokens_stay(whole: Tokenizer) -> None:
    some, kept = whole.trimmed(set(whole.encode(ONE_TEXT)))
    assert kept == sorted(set(kept))
    assert set(whole.encode(ONE_TEXT)) <= set(kept)
    assert whole.eos_ids <= set(kept)
    assert {kept[id] for id in some.eos_ids} == whole.eos_ids
    chat = (Message(role="user", content="Once upon a time"),)
    first = [one.encode_prompt("", chat)[0] for one in (some, whole)]
    assert kept[first[0]] == first[1]
    assert whole.token_text(first[1]) == "<|im_start|>"


@given(written=st.text(max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_can_still_be_written(whole: Tokenizer, written: str) -> None:
    some, kept = whole.trimmed(set(whole.encode(ONE_TEXT)))
    ids = some.encode(written)
    assert some.decode(ids) == written
    assert max(ids, default=0) < len(kept)


@pytest.mark.smollm2
def test_the_vocabulary_of_a_real_model_is_cut_to_a_text(smollm2_gguf: Path) -> None:
    whole = load_tokenizer(converted(smollm2_gguf, lambda ratio: None))
    story = (
        "The river rose 3 feet overnight – “again”, said Zoë, and moved her books upstairs.\n" * 3
    )
    ids = whole.encode(story)
    some, kept = whole.trimmed(set(ids))
    assert len(kept) < 1000 < whole.vocabulary
    assert [kept[id] for id in some.encode(story)] == ids
    other = "def f(x): return {'ключ': x ** 2}  # 漢字"
    assert some.decode(some.encode(other)) == other


def test_a_trimmed_model_writes_with_its_tokenizer(folder: Path, whole: Tokenizer) -> None:
    _, model, context = cut(folder, whole)
    assert context.tokenizer is not None
    request = Request(prompt="Once upon", temperature=0.0, max_new_tokens=8, ignore_eos=True)
    tokens = list(Engine(model, context.tokenizer).start(request))
    assert len(tokens) == 8
    assert max(token.id for token in tokens) < model.spec.vocabulary


def test_what_cannot_be_cut_is_refused_in_a_sentence(folder: Path, whole: Tokenizer) -> None:
    with pytest.raises(InvalidInput, match="no vocabulary of their own"):
        byte_tokenizer(320).trimmed({1, 2})
    with pytest.raises(InvalidInput, match="without the model's tokenizer"):
        cut(folder, None)
    with pytest.raises(InvalidInput, match="was given none: choose a calibration text"):
        applied(CUT, made(GPT2))
    model = weights.build(weights.describe(folder), placed())
    context = PassContext(placement=placed(), tokenizer=whole, calibration_ids=ids_of(whole))
    packed = Int8().apply(model, context)
    with pytest.raises(InvalidInput, match="put the trimming first"):
        CUT.apply(packed, context)
