"""Guessing ahead and taking over a prefix: the same tokens, to the bit, with less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptcore import kernels
from gptcore.device import Placement
from gptcore.engine import Engine, Generation, prefill
from gptcore.errors import InvalidInput
from gptcore.kernels.linear import NativeLinear
from gptcore.kernels.step import NativeStep, adopt, step_of
from gptcore.lookup import DRAFTED, GUESSES, LOOKED_UP, PAUSE, Lookup
from gptcore.measure.memory import weight_bytes
from gptcore.model import GPT, Draft
from gptcore.passes.base import PassContext
from gptcore.passes.draft import DraftModel
from gptcore.records import Request
from gptcore.tokenizer import byte_tokenizer
from tests.kernels.shapes import SPECS, native, random_model, some_ids

pytestmark = pytest.mark.skipif(bool(kernels.unavailable()), reason=str(kernels.unavailable()))

FORMS = ["fp32", "bf16", "int8, rows", "int4, groups of 64"]


def engine_of(form: str, spec: str = "llama") -> Engine:
    return Engine(native(random_model(SPECS[spec]), form), byte_tokenizer(211))


def written(
    engine: Engine, *, shortcuts: bool, **fields: Any
) -> tuple[list[int], list[float], Generation]:
    request = Request(**{"prompt": "once upon a time", "max_new_tokens": 60, **fields})
    generation = engine.start(request, shortcuts=shortcuts)
    tokens = list(generation)
    return [one.id for one in tokens], [one.logprob for one in tokens], generation


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_guessing_changes_no_token_and_no_probability(form: str, temperature: float) -> None:
    # Random models fall into loops when greedy, where guesses are right, and leave them when drawn.
    engine = engine_of(form)
    plain = written(engine, shortcuts=False, temperature=temperature, seed=3)
    quick = written(engine, shortcuts=True, temperature=temperature, seed=3)
    assert quick[0] == plain[0]
    assert quick[1] == plain[1]


def drafted(form: str, spec: str = "llama", **fields: Any) -> Engine:
    """An engine whose model has a draft."""
    model = native(random_model(SPECS[spec]), form)
    model = DraftModel(**fields).apply(model, PassContext(placement=Placement(threads=1)))
    return Engine(model, byte_tokenizer(211))


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("form", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", ["llama", "gpt2"])
def test_a_draft_changes_no_token_and_no_probability(
    spec: str, form: str, temperature: float, shortcuts: bool
) -> None:
    fields = {"temperature": temperature, "seed": 4, "repetition_penalty": 1.2}
    plain = written(engine_of(form, spec), shortcuts=False, **fields)
    quick = written(drafted(form, spec), shortcuts=shortcuts, **fields)
    assert quick[0] == plain[0]
    assert quick[1] == plain[1]
    assert quick[2].lookup is not None
    assert quick[2].lookup.guessed > 0
    assert quick[2].steps == 59 - quick[2].lookup.accepted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_of_a_draft_like_the_model_are_right(temperature: float) -> None:
    # The draft draws with the random numbers of the text, so its draws are the text's.
    model, draft = (native(random_model(SPECS["llama"]), "fp32") for _ in range(2))
    model.draft = Draft(draft, guesses=4, cost=0.1)
    _, _, quick = written(
        Engine(model, byte_tokenizer(211)), shortcuts=False, temperature=temperature
    )
    assert quick.lookup is not None
    assert quick.lookup.accepted == quick.lookup.guessed
    assert quick.steps == 12  # 59 tokens behind the first, five a step


def with_a_wrong_draft() -> GPT:
    """Return a model whose draft has all weights negated."""
    model, draft = random_model(SPECS["llama"]), random_model(SPECS["llama"])
    for parameter in draft.parameters():
        parameter.neg_()
    model = native(model, "fp32")
    model.draft = Draft(native(draft, "fp32"), guesses=3, cost=0.5)
    return model


def test_a_draft_that_is_mostly_wrong_pauses_and_one_token_needs_no_guess() -> None:
    model = with_a_wrong_draft()
    engine = Engine(model, byte_tokenizer(211))
    _, _, quick = written(engine, shortcuts=False, temperature=1.0)
    assert quick.lookup is not None
    assert quick.lookup.guessed <= 2 * 3 * DRAFTED  # of 60 tokens: then 32 without, then the rest
    _, _, short = written(engine, shortcuts=False, max_new_tokens=1)
    assert short.steps == 0


def test_the_draft_shares_what_it_does_not_pack_and_is_counted() -> None:
    engine = drafted("fp32")
    model = engine.model
    assert model.draft is not None
    twin = model.draft.model
    assert twin.embedding.weight is model.embedding.weight
    assert isinstance(twin.blocks[0].mlp.up, NativeLinear)
    assert isinstance(model.blocks[0].mlp.up, torch.nn.Linear)
    assert not any(module is twin for module in model.modules())
    alone = weight_bytes(engine_of("fp32").model)
    assert weight_bytes(model)[1] == alone[1]
    assert 1.1 * alone[0] < weight_bytes(model)[0] < 1.3 * alone[0]


def test_a_packed_model_gets_no_draft_and_a_gpu_none_either() -> None:
    packed = native(random_model(SPECS["llama"]), "int8, rows")
    with pytest.raises(InvalidInput, match="weights in floating point"):
        DraftModel().apply(packed, PassContext(placement=Placement(threads=1)))
    there = Placement.model_construct(device="cuda:0", precision="bf16", threads=0)
    assert "native step" in str(DraftModel().blocked_by(SPECS["llama"], there))


def test_a_text_that_repeats_itself_takes_fewer_steps_than_tokens() -> None:
    model = random_model(SPECS["gpt2"])
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(0)  # all tokens are equally likely, and the first is taken
    engine = Engine(native(model, "int8, rows"), byte_tokenizer(211))
    _, _, plain = written(engine, shortcuts=False, temperature=0)
    ids, _, quick = written(engine, shortcuts=True, temperature=0)
    assert len(set(ids)) == 1
    assert plain.steps == 59
    assert quick.steps < 20
    assert quick.lookup is not None
    assert quick.lookup.accepted == 59 - quick.steps
    assert quick.lookup.accepted <= quick.lookup.guessed <= GUESSES * quick.steps
    assert quick.how["accepted_tokens"] == quick.lookup.accepted


def test_guesses_that_are_wrong_become_rare() -> None:
    # Every gram occurred before, and what stood behind it never comes again.
    model = native(random_model(SPECS["llama"]), "bf16")
    block = [5, 6, 7]
    text = [one for i in range(30, 60) for one in (*block, i)]
    assert isinstance(adopt(model), NativeStep)
    cache = model.new_cache(256)
    prefill(model, text, cache)
    lookup = Lookup.of(model, cache, text)
    assert lookup is not None
    asked = []
    for i in range(60, 90):
        for id in (*block, i):
            before = lookup.guessed
            lookup.after(id, 100)
            asked.append(lookup.guessed > before)
    assert lookup.accepted < LOOKED_UP * GUESSES
    assert sum(asked) <= 3 * LOOKED_UP
    assert not any(asked[-PAUSE:])


def test_a_draft_that_is_mostly_wrong_does_not_stop_what_is_looked_up() -> None:
    """A text of one phrase again and again, behind words that the draft never guesses."""
    model = with_a_wrong_draft()
    first, phrase = list(range(30, 70)), [5, 6, 7, 8, 9, 10, 11, 12]
    text = [1, 2, 3]
    cache = model.new_cache(256)
    assert isinstance(adopt(model), NativeStep)
    assert model.draft is not None
    adopt(model.draft.model)
    prefill(model, text, cache)
    lookup = Lookup.of(model, cache, text)
    assert lookup is not None
    for id in (*first, *phrase):
        lookup.after(id, 100)
    wrong, right = lookup.guessed, lookup.accepted
    for id in phrase * 4:
        lookup.after(id, 100)
    assert right == 0
    assert wrong > 0
    assert lookup.accepted >= 3 * len(phrase)


def test_no_more_is_guessed_than_is_wanted_or_fits() -> None:
    model = native(random_model(SPECS["llama"]), "bf16")
    assert isinstance(adopt(model), NativeStep)
    cache = model.new_cache(12)
    prefill(model, [4] * 8, cache)
    lookup = Lookup.of(model, cache, [4] * 8)
    assert lookup is not None
    lookup.after(4, 3)
    assert lookup.guessed == 2
    for _ in range(3):
        lookup.after(4, 100)
    assert cache.length <= 12


@pytest.mark.parametrize("form", FORMS)
def test_what_a_text_has_in_common_with_the_last_is_not_computed_again(form: str) -> None:
    engine, prompt = engine_of(form), "the same beginning, " * 5
    first = written(engine, shortcuts=True, prompt=prompt, temperature=0, max_new_tokens=9)
    fresh = written(engine_of(form), shortcuts=False, prompt=prompt + "x", temperature=0)
    again = written(engine, shortcuts=True, prompt=prompt + "x", temperature=0)
    assert again[:2] == fresh[:2]
    assert first[2].reused_tokens == 0
    exact = step_of(engine.model)
    assert exact is not None
    # Where bits depend on what is read together, whole chunks alone are taken over.
    assert again[2].reused_tokens == (100 if exact.exact else 0)


def test_whole_chunks_of_a_float_model_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcore.engine.chunk_tokens", lambda model: 32)
    engine, prompt = engine_of("bf16"), "a float model reads in chunks, " * 4
    written(engine, shortcuts=True, prompt=prompt)
    again = written(engine, shortcuts=True, prompt=prompt + "and goes on", temperature=0)
    fresh = written(engine, shortcuts=False, prompt=prompt + "and goes on", temperature=0)
    assert again[2].reused_tokens == 96
    assert again[:2] == fresh[:2]


def test_a_chat_goes_on_from_the_answer_that_was_written() -> None:
    engine = engine_of("int8, rows")
    ids, _, _ = written(engine, shortcuts=True, prompt="question", temperature=0, max_new_tokens=20)
    known = [*engine.tokenizer.encode("question"), *ids]
    cache = engine.cache_for([*known, 1, 2, 3], 100)
    assert cache.length == len(known) - 1
    twin = engine.model.new_cache(100)
    prefill(engine.model, known[:-1], twin)
    assert torch.equal(cache.k[:, :, :, : cache.length], twin.k[:, :, :, : cache.length])


def test_a_text_of_its_own_takes_over_nothing() -> None:
    engine = engine_of("int8, rows")
    written(engine, shortcuts=True, prompt="one")
    assert written(engine, shortcuts=True, prompt="two")[2].reused_tokens == 0
    written(engine, shortcuts=False, prompt="two three")
    assert written(engine, shortcuts=True, prompt="two three")[2].reused_tokens == 3


def test_the_oldest_texts_are_let_go_of_where_there_is_no_more_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of("int8, rows")
    cache = engine.model.new_cache(4 + 60)
    room = 2 * (cache.k.nbytes + cache.v.nbytes)
    monkeypatch.setattr("gptcore.engine.KEPT_BYTES", room)

    def reused(prompt: str) -> int:
        return int(written(engine, shortcuts=True, prompt=prompt)[2].reused_tokens)

    assert [reused(one) for one in ("aaaa", "bbbb", "cccc")] == [0, 0, 0]
    assert [reused(one) for one in ("bbbb", "cccc")] == [3, 3]
    assert reused("aaaa") == 0
    written(engine, shortcuts=True, prompt="d" * 150)  # too large to be kept
    assert reused("cccc") == 3
    engine.forget()
    assert reused("cccc") == 0


def test_every_token_is_given_its_own_time() -> None:
    ticks = iter(range(10_000))
    engine = engine_of("int8, rows")
    engine.clock = lambda: float(next(ticks))
    request = Request(prompt="tick tick tick tick", max_new_tokens=30, temperature=0)
    seconds = [one.seconds for one in engine.start(request, shortcuts=True)]
    assert seconds == sorted(set(seconds))


def test_reading_packed_weights_does_not_depend_on_the_chunks() -> None:
    model = native(random_model(SPECS["qwen2"]), "int8, rows")
    engine = Engine(model, byte_tokenizer(211))
    ids = some_ids(model.spec, 100)
    whole, pieces = engine.model.new_cache(100), engine.model.new_cache(100)
    first = prefill(model, ids, whole)
    for begin in range(0, 100, 33):
        second = prefill(model, ids[begin : begin + 33], pieces)
    assert torch.equal(first, second)
