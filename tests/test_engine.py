import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gptcore import weights
from gptcore.device import Placement
from gptcore.engine import CPU_CHUNK, LEAST_CHUNK, Engine, chunk_tokens, read
from gptcore.errors import Cancelled, ContextOverflow, InvalidInput, NumericalError
from gptcore.records import STAGES, FinishReason, Request, Token
from gptcore.spec import ModelSpec, gpt
from gptcore.tokenizer import byte_tokenizer

GPT2_SHAPE = gpt(2, 32, 4, context=128, vocabulary=300)
LLAMA_SHAPE = ModelSpec(
    family="llama",
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,
    width=32,
    hidden=48,
    context=128,
    vocabulary=300,
    norm="rmsnorm",
    position="rotary",
    mlp="swiglu",
    bias=False,
    qkv_bias=False,
)


@pytest.fixture(params=[GPT2_SHAPE, LLAMA_SHAPE], ids=["gpt2", "llama"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return tiny_engine(request.param)


def tiny_engine(spec: ModelSpec = GPT2_SHAPE) -> Engine:
    model = weights.build_random(spec, Placement(), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():  # random weights of std 0.02 are near uniform
            if parameter.ndim == 2:
                parameter.mul_(10)
    return Engine(model, byte_tokenizer(spec.vocabulary))


def run(engine: Engine, **fields: Any) -> tuple[list[Token], Any]:
    generation = engine.start(Request(**{"prompt": "Once upon", "max_new_tokens": 20, **fields}))
    return list(generation), generation


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def test_a_prompt_is_broken_off_between_two_blocks_and_can_be_read_again(engine: Engine) -> None:
    model, text, asked = engine.model, list(range(60)), []
    cache = model.new_cache(64)

    def cancelled() -> bool:
        asked.append(cache.length)
        return len(asked) == 2

    with pytest.raises(Cancelled):
        read(model, text, cache, cancelled)
    assert asked == [0, 0]  # before it began, and behind the first of two blocks
    assert cache.length == 0
    with torch.inference_mode():
        whole = model(torch.tensor([text]))[0, -1]
    assert torch.allclose(read(model, text, cache, lambda: False), whole, atol=1e-4)


def test_a_compiled_or_replaced_model_is_read_in_smaller_chunks_at_once(engine: Engine) -> None:
    model = engine.model
    assert chunk_tokens(model) == CPU_CHUNK
    model.forward = model.forward  # type: ignore[method-assign]
    assert not model.divisible
    assert chunk_tokens(model) == CPU_CHUNK  # so small a model reads as many in no time
    model.spec = gpt(48, 1600, 25)
    assert chunk_tokens(model) == LEAST_CHUNK


def test_greedy_with_a_cache_equals_a_full_forward_at_every_step(engine: Engine) -> None:
    tokens, generation = run(engine, temperature=0, max_new_tokens=40)
    text = list(generation.prompt_ids)
    for token in tokens:
        with torch.inference_mode():
            logits = engine.model(torch.tensor([text]))[0, -1]
        assert token.id == int(logits.argmax())
        assert token.logprob == pytest.approx(
            float(torch.log_softmax(logits, 0)[token.id]), abs=1e-4
        )
        text.append(token.id)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(engine: Engine) -> None:
    first, _ = run(engine, temperature=1.5, seed=5)
    again, _ = run(engine, temperature=1.5, seed=5)
    other, _ = run(engine, temperature=1.5, seed=6)
    assert ids(first) == ids(again) != ids(other)


def test_temperature_zero_ignores_the_seed(engine: Engine) -> None:
    assert ids(run(engine, temperature=0, seed=1)[0]) == ids(run(engine, temperature=0, seed=2)[0])


def test_a_branch_keeps_its_trunk_and_takes_the_chosen_token(engine: Engine) -> None:
    trunk, _ = run(engine, temperature=1.0, seed=3)
    other = trunk[5].alternatives[-1].id
    forced = (*ids(trunk)[:5], other)
    branch, generation = run(engine, temperature=1.0, seed=3, forced_ids=forced)
    assert tuple(ids(branch)[:6]) == forced
    assert [token.forced for token in branch[:7]] == [True] * 6 + [False]
    assert generation.new_tokens == 20


def test_a_branch_that_repeats_the_trunk_goes_on_as_the_trunk_did(engine: Engine) -> None:
    trunk, _ = run(engine, temperature=1.0, seed=3)
    branch, _ = run(
        engine, temperature=1.0, seed=3, forced_ids=tuple(ids(trunk)[:8]), max_new_tokens=12
    )
    assert ids(branch) == ids(trunk)


def test_alternatives_are_ranked_and_carry_a_probability_a_stage(engine: Engine) -> None:
    tokens, _ = run(engine, temperature=0.7, top_k=3, alternatives=6)
    for token in tokens:
        raw = [one.probabilities[0] for one in token.alternatives]
        assert raw == sorted(raw, reverse=True)
        assert all(len(one.probabilities) == len(STAGES) for one in token.alternatives)
        assert all(one.probabilities[-1] == 0 for one in token.alternatives[3:])
        chosen = {one.id: one.probabilities for one in token.alternatives}
        if token.id in chosen:
            assert chosen[token.id][-1] == pytest.approx(token.probability)
            assert np.log(chosen[token.id][0]) == pytest.approx(token.logprob, abs=1e-5)


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it(engine: Engine) -> None:
    free, _ = run(engine, temperature=1.0, seed=11)
    text = "".join(token.text for token in free)
    stop = text[4:8]
    stopped, generation = run(engine, temperature=1.0, seed=11, stop=(stop,))
    assert "".join(token.text for token in stopped) == text[: text.index(stop)]
    assert generation.finish_reason is FinishReason.STOP
    assert len(stopped) < len(free)


def test_text_that_only_begins_like_a_stop_string_is_kept(engine: Engine) -> None:
    free, _ = run(engine, temperature=1.0, seed=11)
    text = "".join(token.text for token in free)
    never = text[-3:] + "\u2603 never written"
    kept, generation = run(engine, temperature=1.0, seed=11, stop=(never, text[2:4] + "\u2603"))
    assert "".join(token.text for token in kept) == text
    assert generation.finish_reason is FinishReason.LENGTH


def test_the_limit_is_the_number_of_new_tokens(engine: Engine) -> None:
    for limit in (1, 2, 7):
        tokens, generation = run(engine, max_new_tokens=limit)
        assert len(tokens) == limit == generation.new_tokens


def test_a_generation_ends_where_the_context_does(engine: Engine) -> None:
    tokens, generation = run(engine, prompt="x" * 100, max_new_tokens=1000, ignore_eos=True)
    assert len(generation.prompt_ids) + len(tokens) == engine.model.spec.context
    assert generation.finish_reason is FinishReason.LENGTH


def test_a_prompt_longer_than_the_context_is_refused_or_cut_as_chosen(engine: Engine) -> None:
    prompt = "".join(itertools.islice(itertools.cycle("abcdefghij"), 500))
    with pytest.raises(ContextOverflow, match="500 tokens"):
        run(engine, prompt=prompt)
    tokens, generation = run(engine, prompt=prompt, overflow="cut")
    assert len(tokens) == 20
    assert generation.cut_tokens == 500 - len(generation.prompt_ids) > 0
    assert engine.tokenizer.decode(generation.prompt_ids) == prompt[generation.cut_tokens :]


def test_a_cancellation_takes_effect_within_one_token(engine: Engine) -> None:
    seen: list[Token] = []
    request = Request(prompt="Once", max_new_tokens=100)
    generation = engine.start(request, cancelled=lambda: len(seen) >= 3)
    for token in generation:
        seen.append(token)
    assert len(seen) == 3
    assert generation.finish_reason is FinishReason.CANCELLED


def test_a_nan_ends_the_request_in_the_same_step() -> None:
    engine = tiny_engine()
    calls = itertools.count()

    def poison(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if next(calls) == 3 else output

    engine.model.register_forward_hook(poison)
    seen = []
    with pytest.raises(NumericalError):
        seen.extend(engine.start(Request(prompt="Once", max_new_tokens=100)))
    assert len(seen) == 3


def test_a_forced_token_outside_the_vocabulary_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="300"):
        run(engine, forced_ids=(300,))


def test_times_are_those_of_the_clock_since_the_request_was_sent() -> None:
    engine = tiny_engine()
    ticks = itertools.count(start=100)
    clock: Callable[[], float] = lambda: float(next(ticks))  # noqa: E731
    engine.clock = clock
    generation = engine.start(Request(prompt="Once", max_new_tokens=4), sent_at=90.0)
    tokens = list(generation)
    seconds = [token.seconds for token in tokens]
    assert seconds == sorted(seconds)
    assert generation.first_s == seconds[0] > 10
    assert generation.last_s == seconds[-1]
    assert generation.prefill_s == 1.0


def test_next_logits_equal_the_plain_forward(engine: Engine) -> None:
    prompt = engine.tokenizer.encode("Once upon a time")
    with torch.inference_mode():
        plain = engine.model(torch.tensor([prompt]))[0, -1].numpy()
    assert np.abs(engine.next_logits(prompt) - plain).max() < 1e-5


def test_the_step_that_ends_the_text_is_in_no_time_and_no_count() -> None:
    engine = tiny_engine()
    free = engine.start(Request(prompt="Once", max_new_tokens=6, ignore_eos=True, seed=5))
    written = list(free)
    engine.tokenizer.eos_ids = frozenset({written[3].id})
    cut = next(i for i, one in enumerate(written) if one.id == written[3].id)
    generation = engine.start(Request(prompt="Once", max_new_tokens=6, seed=5))
    tokens = list(generation)
    assert generation.finish_reason is FinishReason.EOS
    assert len(tokens) == generation.new_tokens == cut
    assert generation.last_s == (tokens[-1].seconds if tokens else None)


def test_a_branch_that_is_stopped_in_its_trunk_has_no_new_tokens() -> None:
    engine = tiny_engine()
    seen: list[Token] = []
    request = Request(prompt="Once", forced_ids=tuple(range(20, 120)), max_new_tokens=5)
    generation = engine.start(request, cancelled=lambda: len(seen) > 10)
    for token in generation:
        seen.append(token)
        assert generation.new_tokens == 0
    assert generation.finish_reason is FinishReason.CANCELLED
    assert 10 < len(seen) < 100
    assert all(token.forced for token in seen)
