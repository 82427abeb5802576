"""Texts side by side: the tokens of each are those that it gets alone, to the bit, in fp32.

Every comparison is of all that a token is but its time: id, log-probability, alternatives. The
shapes are random models of both kinds, computed by our own library and by torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from gptcore import batching, kernels
from gptcore.batching import Advance, Batch
from gptcore.engine import Engine, Generation
from gptcore.errors import DoesNotFit, NumericalError
from gptcore.kernels.step import NativeStep
from gptcore.kv_cache import QuantizedKVCache
from gptcore.records import Constraint, FinishReason, Request, Token
from gptcore.tokenizer import byte_tokenizer
from tests.kernels.shapes import SPECS, native, random_model

pytestmark = pytest.mark.usefixtures("one_thread")

PLENTY = 2**30
NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(bool(kernels.unavailable()), reason=str(kernels.unavailable())),
)


def engine_of(spec: str = "llama", path: str = "torch", form: str = "fp32") -> Engine:
    model = native(random_model(SPECS[spec]), form)
    model.native = path == "native"
    engine = Engine(model, byte_tokenizer(211))
    assert engine.decoder.startswith(path)
    return engine


def batch_of(engine: Engine, *, budget_bytes: int = PLENTY, most: int = 32) -> Batch:
    """Return a batch that reads for no longer than a step takes."""
    return Batch(engine, budget_bytes=budget_bytes, most=most, least_reading_s=0.0)


def asked(prompt: str = "Once upon a time", **fields: Any) -> Request:
    return Request(**{"prompt": prompt, "max_new_tokens": 30, "ignore_eos": True, **fields})


def timeless(tokens: Sequence[Token]) -> list[Token]:
    return [replace(one, seconds=0.0) for one in tokens]


def alone(engine: Engine, request: Request) -> list[Token]:
    return timeless(list(engine.start(request)))


def written(batch: Batch, generations: Sequence[Generation]) -> dict[Generation, list[Token]]:
    """Go on until all have ended, and return the tokens of each."""
    found: dict[Generation, list[Token]] = {one: [] for one in generations}
    while len(batch):
        for advance in batch.step():
            assert advance.error is None
            found[advance.generation] += timeless(advance.tokens)
    return found


def ticking() -> Callable[[], float]:
    """Return a clock on which every look takes a second: prompts are read piece by piece."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let prompts have several chunks, of several pieces."""
    monkeypatch.setattr("gptcore.engine.chunk_tokens", lambda model: 32)


VARIED = (
    asked(temperature=0),
    asked("The fox said, " * 8, temperature=1.3, seed=7, max_new_tokens=50),
    asked("a", temperature=0.7, top_k=20, top_p=0.9, seed=3),
    asked("river " * 20, temperature=1.0, min_p=0.05, repetition_penalty=1.3, seed=11),
    asked("branch", forced_ids=tuple(range(40, 120)), temperature=1.0, seed=5),
    asked("choose", constraint=Constraint(regex="[a-f]{12}"), temperature=1.0, ignore_eos=False),
    asked("no others", alternatives=0, temperature=1.0, seed=1, max_new_tokens=1),
    asked("x" * 180, temperature=0.9, seed=2, overflow="cut", max_new_tokens=70),
    asked("many", alternatives=20, temperature=0, max_new_tokens=44),
    asked("the ninth, for which the weights are read twice", temperature=1.0, seed=9),
)


@pytest.mark.parametrize("path", [NATIVE, "torch"])
@pytest.mark.parametrize("spec", ["llama", "gpt2", "qwen3"])
def test_texts_that_join_and_leave_are_those_that_are_written_alone(spec: str, path: str) -> None:
    engine = engine_of(spec, path)
    wanted = [alone(engine, one) for one in VARIED]
    engine.clock = ticking()
    batch = batch_of(engine)
    generations = [engine.start(one, shortcuts=True) for one in VARIED]
    found: dict[Generation, list[Token]] = {one: [] for one in generations}
    coming = iter(generations)
    for step in itertools.count():
        if step % 3 == 0 and (one := next(coming, None)):
            batch.add(one)
        if not len(batch):
            break
        for advance in batch.step():
            assert advance.error is None
            found[advance.generation] += timeless(advance.tokens)
    for generation, tokens in zip(generations, wanted, strict=True):
        assert found[generation] == tokens
        assert generation.finish_reason is not None
    assert max(one.most_others for one in generations) > 3


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("torch", "bf16"),
        *(
            pytest.param("native", form, marks=NATIVE.marks)
            for form in ("bf16", "int8, rows", "int4, groups of 64")
        ),
    ],
)
def test_every_format_gets_the_bits_of_one_text(path: str, form: str) -> None:
    engine = engine_of(path=path, form=form)
    wanted = [alone(engine, one) for one in VARIED]
    engine.clock = ticking()
    batch = batch_of(engine)
    generations = [engine.start(one, shortcuts=True) for one in VARIED]
    for one in generations:
        batch.add(one)
    found = written(batch, generations)
    assert [found[one] for one in generations] == wanted


@pytest.mark.parametrize("bits", [8, 4])
def test_texts_with_a_cache_of_few_bits_are_those_that_are_written_alone(bits: int) -> None:
    engine = engine_of("qwen3")
    engine.model.cache_kind = partial(QuantizedKVCache, bits=bits)
    wanted = [alone(engine, one) for one in VARIED[:4]]
    engine.clock = ticking()
    batch = batch_of(engine)
    generations = [engine.start(one, shortcuts=True) for one in VARIED[:4]]
    for one in generations:
        batch.add(one)
    found = written(batch, generations)
    assert [found[one] for one in generations] == wanted


@pytest.mark.parametrize("path", [NATIVE, "torch"])
def test_a_stop_string_ends_its_own_text_alone(path: str) -> None:
    engine = engine_of(path=path)
    free = "".join(one.text for one in alone(engine, asked(temperature=1.0, seed=4)))
    stop = free[6:9]
    requests = [asked(temperature=1.0, seed=4, stop=(stop,)), asked("other", temperature=0)]
    wanted = [alone(engine, one) for one in requests]
    batch = batch_of(engine)
    generations = [engine.start(one) for one in requests]
    for one in generations:
        batch.add(one)
    found = written(batch, generations)
    assert [found[one] for one in generations] == wanted
    assert generations[0].finish_reason is FinishReason.STOP
    assert generations[1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("path", [NATIVE, "torch"])
def test_every_text_gets_a_token_a_step_while_a_long_prompt_is_read(path: str) -> None:
    engine = engine_of(path=path)
    engine.clock = ticking()
    batch = batch_of(engine)
    writers = [engine.start(asked(seed=i, max_new_tokens=100)) for i in range(3)]
    for one in writers:
        batch.add(one)
    while any(one.new_tokens == 0 for one in writers):
        list(batch.step())
    reader = engine.start(asked("y" * 200))
    batch.add(reader)
    steps = 0
    while reader.new_tokens == 0:
        told = {one.generation: one.tokens for one in batch.step()}
        assert [len(told[one]) for one in writers] == [1, 1, 1]
        steps += 1
    assert steps >= 6  # seven chunks of 32 tokens, several pieces each


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_a_long_one_for_many_short() -> None:
    engine = engine_of()
    engine.clock = ticking()
    batch = batch_of(engine)
    writer = engine.start(asked(max_new_tokens=200))
    batch.add(writer)
    while writer.new_tokens == 0:
        list(batch.step())
    long = engine.start(asked("l" * 220, max_new_tokens=2))
    short = engine.start(asked("s" * 10, max_new_tokens=2))
    batch.add(long)
    batch.add(short)
    begun: list[Generation] = []
    after_short = 0
    while len(batch) > 1:
        for advance in batch.step():
            if advance.tokens and advance.generation not in (*begun, writer):
                begun.append(advance.generation)
        if short in begun and long not in begun and after_short < 40:
            batch.add(engine.start(asked("s" * 10, max_new_tokens=2, seed=after_short)))
            after_short += 1
    assert begun[0] is short
    # Were the shortest always next, the long one would come behind all forty.
    assert 1 < begun.index(long) < 40


def test_reading_takes_no_longer_than_a_step_of_the_others() -> None:
    engine = engine_of()
    now = [0.0]
    engine.clock = lambda: now[0]
    pieces: list[float] = []

    class Slow(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            now[0] += 0.25 if x.shape[1] > 1 else 0.5
            pieces.append(x.shape[1])
            return self.inner(x, *rest)  # type: ignore[no-any-return]

    engine.model.blocks[0] = Slow(engine.model.blocks[0])
    engine.model.blocks[1] = Slow(engine.model.blocks[1])
    batch = batch_of(engine)
    batch.add(writer := engine.start(asked(max_new_tokens=60)))
    while writer.new_tokens < 2:
        list(batch.step())
    batch.add(reader := engine.start(asked("y" * 150)))
    gaps = []
    while reader.new_tokens == 0:
        before = now[0]
        list(batch.step())
        gaps.append(now[0] - before)
    assert max(gaps) <= 2.0  # a step takes 1.0, and reading as long again
    assert sum(one > 1 for one in pieces) >= 10


def test_a_text_that_is_stopped_ends_within_a_step_and_the_others_go_on() -> None:
    engine = engine_of()
    stop: set[int] = set()
    requests = [asked(seed=i, temperature=1.0) for i in range(3)]
    wanted = [alone(engine, one) for one in requests]
    generations = [
        engine.start(one, cancelled=lambda i=i: i in stop) for i, one in enumerate(requests)
    ]
    batch = batch_of(engine)
    found: dict[Generation, list[Token]] = {one: [] for one in generations}
    for one in generations:
        batch.add(one)
    while len(batch):
        for advance in batch.step():
            found[advance.generation] += timeless(advance.tokens)
        if len(found[generations[1]]) == 5:
            stop.add(1)
    assert generations[1].finish_reason is FinishReason.CANCELLED
    assert 5 <= len(found[generations[1]]) <= 6
    for i in (0, 2):
        assert found[generations[i]] == wanted[i]


def test_a_text_that_waits_to_be_read_or_let_in_is_stopped_at_once() -> None:
    engine = engine_of()
    engine.clock = ticking()
    stop: set[str] = set()

    def start(name: str, prompt: str = "z" * 150) -> Generation:
        return engine.start(asked(prompt), cancelled=lambda: name in stop)

    batch = batch_of(engine, most=3)
    writer, first, second, outside = (
        start("writer", "w"),
        start("first"),
        start("second"),
        start("outside"),
    )
    batch.add(writer)
    while writer.new_tokens == 0:
        list(batch.step())
    for one in (first, second, outside):
        batch.add(one)
    list(batch.step())
    stop.update({"second", "outside"})
    told = {one.generation: one for one in batch.step()}
    for one in (second, outside):
        assert told[one].ended
        assert one.finish_reason is FinishReason.CANCELLED
        assert one.new_tokens == 0
    written(batch, [writer, first])
    assert first.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("path", [NATIVE, "torch"])
def test_a_text_whose_logits_are_no_numbers_fails_alone(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(path=path)
    requests = [asked(seed=i, temperature=1.0) for i in range(3)]
    wanted = [alone(engine, one) for one in requests]
    real, calls = batching.together, itertools.count()

    def poisoned(model: Any, ids: Any, caches: Any) -> list[Callable[[], torch.Tensor]]:
        found = [one() for one in real(model, ids, caches)]
        if next(calls) == 4:
            found[1] = found[1] * float("nan")
        return [lambda one=one: one for one in found]

    monkeypatch.setattr(batching, "together", poisoned)
    batch = batch_of(engine)
    generations = [engine.start(one) for one in requests]
    for one in generations:
        batch.add(one)
    broken, found = [], {one: list[Token]() for one in generations}
    while len(batch):
        for advance in batch.step():
            found[advance.generation] += timeless(advance.tokens)
            if advance.error:
                broken.append(advance)
    (only,) = broken
    assert only.generation is generations[1]
    assert isinstance(only.error, NumericalError)
    assert generations[1].finish_reason is FinishReason.ERROR
    assert 0 < len(found[generations[1]]) < 30
    assert found[generations[0]] == wanted[0]
    assert found[generations[2]] == wanted[2]


@pytest.mark.parametrize("path", [NATIVE, "torch"])
def test_where_a_common_step_breaks_only_the_text_that_broke_it_fails(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(path=path)
    requests = [asked(seed=i, temperature=1.0) for i in range(3)]
    wanted = [alone(engine, one) for one in requests]
    generations = [engine.start(one) for one in requests]
    real = batching.decode

    def decode(model: Any, id: int, cache: Any) -> torch.Tensor:
        if cache is generations[2].cache and cache.length > 25:
            raise RuntimeError("this cache cannot be read")
        return real(model, id, cache)

    def unless_broken(step: Any, ids: Any, caches: Any) -> torch.Tensor:
        if any(one is generations[2].cache and one.length > 25 for one in caches):
            raise RuntimeError("one of these cannot be read")
        return whole(step, ids, caches)

    whole = NativeStep.batch
    monkeypatch.setattr(NativeStep, "batch", unless_broken)
    monkeypatch.setattr(batching, "decode", decode)
    batch = batch_of(engine)
    for one in generations:
        batch.add(one)
    told: list[Advance] = []
    while len(batch):
        told += batch.step()
    (broken,) = (one for one in told if one.error)
    assert broken.generation is generations[2]
    for i in (0, 1):
        tokens = [t for one in told if one.generation is generations[i] for t in one.tokens]
        assert timeless(tokens) == wanted[i]


def test_texts_take_no_more_memory_than_the_budget_and_wait_in_order() -> None:
    engine = engine_of()
    generations = [engine.start(asked(seed=i)) for i in range(6)]
    probe = batch_of(engine)
    needed = probe.needed_bytes(generations[0])
    cache = engine.model.new_cache(generations[0].capacity)
    assert needed == cache.k.nbytes + cache.v.nbytes
    batch = batch_of(engine, budget_bytes=2 * needed + needed // 2)
    for one in generations:
        batch.add(one)
    ends, most = [], 0
    while len(batch):
        for advance in batch.step():
            if advance.ended:
                ends.append(advance.generation)
        most = max(most, batch.used_bytes)
    assert most == 2 * needed
    assert ends == generations
    assert max(one.most_others for one in generations) == 1


def test_a_text_for_which_there_never_will_be_room_is_refused_with_the_way_out() -> None:
    engine = engine_of()
    small, large = engine.start(asked()), engine.start(asked(max_new_tokens=200))
    batch = batch_of(engine, budget_bytes=Batch(engine, budget_bytes=1).needed_bytes(small))
    with pytest.raises(DoesNotFit, match=r"up to 216 tokens needs .* MiB .* fewer new tokens"):
        batch.add(large)
    assert len(batch) == 0
    batch.add(small)
    assert len(written(batch, [small])[small]) == 30


@pytest.mark.skipif(bool(kernels.unavailable()), reason=str(kernels.unavailable()))
def test_a_beginning_that_another_text_has_read_is_not_read_again() -> None:
    engine = engine_of(path="native", form="int8, rows")
    system = "You are a fox that lives by the river. " * 3
    requests = [asked(system + "one", temperature=0), asked(system + "two", temperature=0)]
    wanted = [alone(engine, one) for one in requests]
    batch = batch_of(engine)
    first, second = (engine.start(one, shortcuts=True) for one in requests)
    batch.add(first)
    before: list[Token] = []
    while first.new_tokens == 0:
        for advance in batch.step():
            before += timeless(advance.tokens)
    batch.add(second)
    found = written(batch, [first, second])
    assert second.reused_tokens == len(system)
    assert before + found[first] == wanted[0]
    assert found[second] == wanted[1]


@pytest.mark.skipif(bool(kernels.unavailable()), reason=str(kernels.unavailable()))
def test_two_chats_in_turns_read_only_what_is_new_to_each() -> None:
    engine = engine_of(path="native", form="int8, rows")
    said = {"fox": "The fox asks. " * 3, "owl": "An owl answers. " * 3}
    for turn in range(3):
        for name in said:
            generation = engine.start(asked(said[name], temperature=0), shortcuts=True)
            batch = batch_of(engine)
            batch.add(generation)
            tokens = written(batch, [generation])[generation]
            if turn:
                assert len(generation.prompt_ids) - generation.reused_tokens <= 12
            # As ids, since random bytes are no text that could be read back.
            answer = "".join(chr(97 + one.id % 26) for one in tokens[:4])
            said[name] += answer + " go on"


@pytest.mark.skipif(bool(kernels.unavailable()), reason=str(kernels.unavailable()))
def test_a_text_guesses_ahead_while_it_is_alone_and_again_when_the_others_left() -> None:
    model = random_model(SPECS["gpt2"])
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(0)  # all tokens are equally likely, and the first is taken
    engine = Engine(native(model, "int8, rows"), byte_tokenizer(211))
    request = asked(temperature=0, max_new_tokens=150)
    wanted = alone(engine, request)
    generation = engine.start(request, shortcuts=True)
    batch = batch_of(engine)
    batch.add(generation)
    found: list[Token] = []
    guessed: list[int] = []
    other: Generation | None = None
    while len(batch):
        for advance in batch.step():
            if advance.generation is generation:
                found += timeless(advance.tokens)
        if generation.lookup:
            guessed.append(generation.lookup.guessed)
        if len(found) == 40:
            batch.add(other := engine.start(asked("b", max_new_tokens=40)))
    assert other is not None
    assert found == wanted
    assert guessed[39] > 0
    assert guessed[45] == guessed[75]
    assert guessed[-1] > guessed[75]
    assert generation.how["most_others"] == 1
