"""The recorded step: its numbers are those of the model, whatever stands behind what is known.

There is no CUDA device where these run, so what records is replaced by one that calls again.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptcore import captured
from gptcore.batching import Batch
from gptcore.captured import CapturedStep, captured_rows, captured_step, step_at
from gptcore.engine import Engine, decode
from gptcore.errors import ContextOverflow
from gptcore.model import GPT, KVCache
from gptcore.passes.base import PassContext
from gptcore.passes.kv_cache import KVCacheBits
from gptcore.passes.runtime import Runtime
from gptcore.records import Request
from gptcore.spec import ModelSpec
from gptcore.tokenizer import byte_tokenizer
from tests.passes.small import SHAPES, made, placed, text

every_shape = pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)


def again(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Stand in for a recording: what does it again writes into the same tensor."""
    result = run()
    return lambda: result.copy_(run()), result


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    monkeypatch.setattr(captured, "record", again)


def filled(model: GPT, ids: Tensor, capacity: int, behind: float = float("nan")) -> KVCache:
    """Return a cache that knows a text; what is behind it is filled with a number."""
    cache = model.new_cache(capacity, len(ids))
    cache.k.fill_(behind)
    cache.v.fill_(behind)
    with torch.inference_mode():
        model(ids, cache)
    return cache


@every_shape
@pytest.mark.parametrize("texts", [1, 3])
def test_every_position_is_that_of_the_model(spec: ModelSpec, texts: int) -> None:
    model, ids = made(spec), text(spec, sequences=texts, tokens=32)
    step = captured_step(model, cache := filled(model, ids[:, :5], 32))
    assert isinstance(step, CapturedStep)
    with torch.inference_mode():
        whole = model(ids)
    for at in range(5, 32):
        found = step(ids[:, at])
        assert found.shape == (texts, spec.vocabulary)
        assert torch.allclose(found, whole[:, at], atol=1e-4 * float(whole.std()))
    assert cache.length == 32
    with pytest.raises(ContextOverflow, match="33 positions do not fit into 32"):
        step(ids[:, 0])


@every_shape
def test_the_numbers_behind_the_position_count_for_nothing(spec: ModelSpec) -> None:
    model, ids = made(spec), text(spec, sequences=1, tokens=8)
    positions = torch.tensor([8])
    one, other = (filled(model, ids, 40, behind) for behind in (0.0, 1e4))
    with torch.inference_mode():
        first, second = (step_at(model, ids[:, :1], positions, cache) for cache in (one, other))
    assert torch.equal(first, second)


def test_a_cache_that_was_cut_goes_on_where_it_ends() -> None:
    spec = SHAPES["llama"]
    model, ids = made(spec), text(spec, sequences=1, tokens=30)
    step = captured_step(model, cache := filled(model, ids[:, :20], 48))
    assert step is not None
    for at in range(20, 30):
        step(ids[:, at])
    cache.truncate(12)
    with torch.inference_mode():
        whole = model(ids)
    assert torch.allclose(step(ids[:, 12])[0], whole[0, 12], atol=1e-4 * float(whole.std()))
    assert captured_step(model, cache) is step


@every_shape
def test_an_engine_writes_the_same_text_and_says_what_decodes(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptcore.engine.adopt", lambda model: "not on this device.")
    spec = spec.model_copy(update={"vocabulary": 512})
    request = Request(prompt="Once", temperature=0, max_new_tokens=24, ignore_eos=True)

    def written() -> tuple[list[int], str]:
        generation = Engine(made(spec), byte_tokenizer(512)).start(request)
        return [one.id for one in generation], str(generation.how["decoder"])

    ids, decoder = written()
    assert decoder.startswith("CUDA graph, recorded in ")
    monkeypatch.setattr(captured, "DEVICES", ())
    assert written()[0] == ids
    assert not written()[1].startswith("CUDA graph")


def refusals() -> list[tuple[str, Callable[[], tuple[GPT, KVCache]], str]]:
    """Return what is not recorded, and a word of the reason."""
    spec = SHAPES["llama"]

    def by_torch() -> tuple[GPT, KVCache]:
        model = Runtime(decode="torch").apply(made(spec), PassContext(placement=placed()))
        return model, model.new_cache(40)

    def quantized() -> tuple[GPT, KVCache]:
        model = KVCacheBits(bits=8).apply(made(spec), PassContext(placement=placed()))
        return model, model.new_cache(40)

    def replaced() -> tuple[GPT, KVCache]:
        model = made(spec)
        model.forward = model.forward
        return model, model.new_cache(40)

    def short() -> tuple[GPT, KVCache]:
        model = made(spec)
        return model, model.new_cache(captured.LEAST_STEPS - 1)

    return [
        ("runtime", by_torch, "were asked for, one by one"),
        ("cache", quantized, "no step is recorded over a QuantizedKVCache"),
        ("forward", replaced, "in the place of the forward function"),
        ("short", short, "recording a step takes longer than it saves"),
    ]


@pytest.mark.parametrize(("make", "reason"), [one[1:] for one in refusals()])
def test_what_is_not_recorded_says_why(
    make: Callable[[], tuple[GPT, KVCache]], reason: str
) -> None:
    model, cache = make()
    assert captured_step(model, cache) is None
    assert reason in str(captured.told(cache))


def test_a_model_that_cannot_be_recorded_is_decoded_all_the_same_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def fail(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        tried.append(run)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(captured, "record", fail)
    spec = SHAPES["gpt2"]
    model, ids = made(spec), text(spec, sequences=1, tokens=6)
    for _ in range(2):
        cache = filled(model, ids[:, :5], 40, 0.0)
        found = decode(model, int(ids[0, 5]), cache)
        with torch.inference_mode():
            assert torch.allclose(found, model(ids)[0, -1], atol=1e-4)
        assert captured.told(cache) == (
            "torch: a step could not be recorded (operation not permitted when stream is "
            "capturing)."
        )
    assert len(tried) == 1


def test_another_model_with_the_same_cache_is_not_served() -> None:
    spec = SHAPES["gpt2"]
    model = made(spec)
    cache = model.new_cache(40)
    assert captured_step(model, cache) is not None
    assert captured_step(made(spec), cache) is None


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fp32 texts share a step too, so that numbers can be held against each other closely."""
    monkeypatch.setattr(captured, "SHARED", (torch.float32,))


def near(model: GPT, cache: KVCache, text: list[int], found: Tensor) -> bool:
    """Return whether logits and cache are those of the text read at once."""
    fresh = model.new_cache(cache.capacity)
    with torch.inference_mode():
        whole = model(torch.tensor([text]), fresh)[0]
    return (
        cache.length == len(text)
        and torch.allclose(found, whole[-1], atol=1e-4 * float(whole.std()))
        and torch.allclose(cache.k[..., : len(text), :], fresh.k[..., : len(text), :], atol=1e-4)
        and torch.allclose(cache.v[..., : len(text), :], fresh.v[..., : len(text), :], atol=1e-4)
    )


@every_shape
@pytest.mark.usefixtures("shared")
def test_texts_of_several_lengths_join_leave_and_change(spec: ModelSpec) -> None:
    model, source = made(spec), text(spec, sequences=5, tokens=60).tolist()
    known = [source[i][: 5 + 7 * i] for i in range(5)]
    caches = [filled(model, torch.tensor([ids]), 40 + i) for i, ids in enumerate(known)]

    def step(chosen: list[int], at: int) -> None:
        rows = captured_rows(model, [caches[i] for i in chosen])
        assert rows is not None
        ids = [(at * 31 + i) % spec.vocabulary for i in chosen]
        found = rows(torch.tensor(ids), [caches[i] for i in chosen])
        for i, id, logits in zip(chosen, ids, found, strict=True):
            known[i].append(id)
            assert near(model, caches[i], known[i], logits), (chosen, i)

    for at, chosen in enumerate([[0, 1, 2], [0, 1, 2], [2, 0, 3], [4, 3], [0, 1, 2, 3], [1, 4, 0]]):
        step(chosen, at)
    # Another text of the same length in the same cache, in the place of what is known.
    again = len(known[1])
    caches[1].truncate(2)
    known[1] = [*known[1][:2], *source[4][: again - 2]]
    with torch.inference_mode():
        model(torch.tensor([known[1][2:]]), caches[1])
    assert caches[1].length == again
    step([1, 4, 0], 9)


@pytest.mark.usefixtures("shared")
def test_a_batch_writes_what_each_writes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcore.engine.adopt", lambda model: "not on this device.")
    spec = SHAPES["llama"].model_copy(update={"vocabulary": 512})
    engine = Engine(made(spec), byte_tokenizer(512))
    asked = [
        Request(prompt="On" * (i + 1), temperature=0.9, seed=i, max_new_tokens=20, ignore_eos=True)
        for i in range(3)
    ]
    alone = [[token.id for token in engine.start(one)] for one in asked]
    batch = Batch(engine, budget_bytes=2**30)
    texts = [engine.start(one) for one in asked]
    for one in texts:
        batch.add(one)
    while len(batch):
        list(batch.step())
    assert [one.token_ids for one in texts] == alone
    assert set(captured._rows[engine.model]) == {2, 4}


def test_texts_in_fp32_take_turns_and_those_in_16_bits_share() -> None:
    for precision, together in (("fp32", False), ("bf16", True)):
        model = made(SHAPES["gpt2"], precision)
        caches = [model.new_cache(40) for _ in range(2)]
        assert (captured_rows(model, caches) is not None) == together


@pytest.mark.usefixtures("shared")
def test_a_pool_that_would_take_far_more_than_its_texts_is_not_made() -> None:
    spec = SHAPES["llama"].model_copy(update={"context": 8192})
    model = made(spec)
    short = [model.new_cache(64) for _ in range(3)]
    assert captured_rows(model, short) is not None
    assert captured_rows(model, [*short, model.new_cache(8000)]) is None
