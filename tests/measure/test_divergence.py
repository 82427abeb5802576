"""The paired report against direct computation, and that A against A is exactly nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from gptcore import weights
from gptcore.errors import InvalidInput, NumericalError
from gptcore.measure import perplexity
from gptcore.measure.divergence import (
    Paired,
    agreement,
    alternated,
    compare,
    divergence,
    greedy,
    paired,
    prompts_of,
    require_same_tokens,
)
from gptcore.measure.perplexity import (
    Logits,
    Passage,
    Windowing,
    model_logits,
    score,
    summary,
)
from gptcore.model import GPT
from gptcore.passes.base import PassContext
from gptcore.recipe import Recipe, place
from gptcore.spec import gpt
from gptcore.tokenizer import byte_tokenizer

SPEC = gpt(2, 64, 4, context=64, vocabulary=97)
TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("one_thread")


def model(precision: str = "fp32", seed: int = 0, vocabulary: int = 97, scale: float = 8.0) -> GPT:
    """A random model whose head is scaled up, so that it is as sure of tokens as a trained one."""
    placement, recipe = place(precision, "cpu", 1, Recipe())
    spec = SPEC.model_copy(update={"vocabulary": vocabulary, "tied_head": False})
    made = weights.build_random(spec, placement, seed)
    with torch.no_grad():
        made.head.weight.mul_(scale)
    for one in recipe.passes:
        made = one.apply(made, PassContext(placement=placement))
    return made


def passage(tokens: int = 300, window: int = 32, stride: int = 0) -> Passage:
    ids = np.random.default_rng(0).integers(0, 97, tokens)
    return Passage("t", "k", ids, np.ones_like(ids), None, Windowing(window=window, stride=stride))


def firsts(windows: Iterator[tuple[Paired, ...]]) -> list[Paired]:
    """What is known of the only other variant."""
    return [pair for (pair,) in windows]


def directly(a: GPT, b: GPT, text: Passage) -> dict[str, float]:
    """Whole distributions in float64 from whole forward passes, all in memory."""
    kl, moved, ratio, same = [], [], [], []
    for window in text.windows:
        ids = torch.from_numpy(text.ids[window.begin : window.end - 1])
        with torch.inference_mode():
            p, q = (one(ids[None])[0].double().log_softmax(1).exp() for one in (a, b))
        for at in range(window.first, window.end):
            row = at - window.begin - 1
            x, y = p[row], q[row]
            kl.append(float((x * (x / y).log()).sum()))
            moved.append(float(y[text.ids[at]] - x[text.ids[at]]))
            ratio.append(float((x[text.ids[at]] / y[text.ids[at]]).log()))
            same.append(int(x.argmax()) == int(y.argmax()))
    return {
        "tokens": len(kl),
        "log_ppl_ratio_mean": float(np.mean(ratio)),
        "kl_mean": float(np.mean(kl)),
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_p999": float(np.quantile(kl, 0.999)),
        "delta_p_mean": float(np.mean(moved)),
        "delta_p_rms": math.sqrt(float(np.mean(np.square(moved)))),
        "same_top_ratio": float(np.mean(same)),
    }


@pytest.mark.parametrize(
    ("precision", "seed"), [("fp32", 1), ("bf16", 0), ("int8", 0), ("int4", 0)]
)
def test_the_report_is_that_of_a_direct_computation(precision: str, seed: int) -> None:
    a, b = model(), model(precision, seed)
    text = passage(1100, window=48)
    found = divergence(firsts(paired(text, model_logits(a), model_logits(b)))).as_json()
    expected = directly(a, b, text)
    for name, value in expected.items():
        # Relative to a typical size, since a mean of differences may be near zero.
        size = {"delta_p_mean": expected["delta_p_rms"], "log_ppl_ratio_mean": expected["kl_mean"]}
        assert found[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE * size.get(name, 0))
    assert expected["kl_mean"] > 1e-5  # they do differ
    assert found["log_ppl_ratio_se"] > 0
    assert found["kl_se"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_a_against_a_loaded_twice_is_exactly_zero(precision: str) -> None:
    one, other = model(precision), model(precision)
    found = divergence(firsts(paired(passage(), model_logits(one), model_logits(other))))
    report = found.as_json()
    assert report.pop("tokens") == 300 - 10
    assert report.pop("same_top_ratio") == 1.0
    assert report.pop("kl_p999") is None
    assert set(report.values()) == {0.0}
    prompts = prompts_of(passage(), 3, 8)
    texts = [[greedy(each, prompt, 12) for prompt in prompts] for each in (one, other)]
    assert agreement(*texts).first_divergent == (None, None, None)
    assert agreement(*texts).agreement_ratio == 1.0


def test_each_side_of_a_pair_is_what_it_is_alone() -> None:
    text = passage(200, window=32, stride=10)
    a, b = model_logits(model()), model_logits(model(seed=1))
    pairs = firsts(paired(text, a, b))
    assert summary(text, [one.a for one in pairs]) == summary(text, list(score(text, a)))
    assert summary(text, [one.b for one in pairs]) == summary(text, list(score(text, b)))
    ratio = math.log(
        summary(text, [one.b for one in pairs]).perplexity
        / summary(text, [one.a for one in pairs]).perplexity
    )
    assert divergence(pairs).log_ppl_ratio_mean == pytest.approx(ratio, rel=1e-9)


def test_pairing_makes_the_error_smaller_than_that_of_either_side() -> None:
    text = passage(1000)
    pairs = firsts(paired(text, model_logits(model()), model_logits(model("int8"))))
    alone = summary(text, [one.a for one in pairs]).nll_se
    together = divergence(pairs).log_ppl_ratio_se
    assert alone is not None
    assert together is not None
    assert together < alone / 10


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    """A KL of 1e-6 is far below float32's step of a log-probability of -20, which is 2e-6."""
    random = torch.Generator().manual_seed(0)
    a = torch.randn(64, 5000, generator=random) * 4 + 20
    b = a + torch.randn(64, 5000, generator=random) * 2e-3
    p, q = a.double().log_softmax(1), b.double().log_softmax(1)
    expected = (p.exp() * (p - q)).sum(1).numpy()
    assert 1e-6 < expected.mean() < 2e-6
    found = compare(a, b, torch.zeros(64, dtype=torch.long))[2]
    assert np.abs(found - expected).max() < 1e-12
    p, q = a.log_softmax(1), b.log_softmax(1)
    plain = (p.exp() * (p - q)).sum(1, dtype=torch.float64).numpy()
    assert np.abs(plain - expected).max() > 2e-7  # what the usual way loses


class Slots:
    """Two variants of which one is in memory at a time; counts what was loaded."""

    def __init__(self, **models: GPT) -> None:
        self.models = models
        self.loaded = ""
        self.loads: list[str] = []
        self.most = 0

    def open(self, name: str) -> Callable[[], Logits]:
        def opened() -> Logits:
            if self.loaded != name:
                self.loads.append(name)
            self.loaded = name

            def logits(ids: Tensor, first: int) -> Iterator[Tensor]:
                for chunk in model_logits(self.models[name])(ids, first):
                    assert self.loaded == name, "asked after it was let go"
                    yield chunk

            return logits

        return opened


@pytest.mark.parametrize(
    ("held_windows", "loads"), [(1, "ABABABABABA"), (3, "ABABA"), (4, "ABAB"), (100, "AB")]
)
def test_alternating_is_pairing_bit_for_bit_with_one_load_a_round(
    held_windows: int, loads: str
) -> None:
    text = passage(310, window=32)
    slots = Slots(A=model(), B=model(seed=1))
    found = firsts(
        alternated(
            text,
            slots.open("A"),
            slots.open("B"),
            vocabulary=97,
            held_bytes=held_windows * 31 * 97 * 4,
        )
    )
    expected = firsts(
        paired(text, model_logits(slots.models["A"]), model_logits(slots.models["B"]))
    )
    assert len(found) == len(expected) == 10
    for one, other in zip(found, expected, strict=True):
        assert same(one, other)
    assert "".join(slots.loads) == loads


def test_three_at_once_are_what_each_two_are_and_the_first_computes_once() -> None:
    text = passage(310, window=32)
    read: list[str] = []

    def told(name: str, logits: Logits) -> Logits:
        def wrapped(ids: Tensor, first: int) -> Iterator[Tensor]:
            read.append(name)
            return logits(ids, first)

        return wrapped

    a, b, c = (model_logits(model(seed=seed)) for seed in range(3))
    found = list(paired(text, told("A", a), told("B", b), told("C", c)))
    assert "".join(read) == "ABC" * 10
    for number, other in enumerate((b, c)):
        for one, pair in zip(found, firsts(paired(text, a, other)), strict=True):
            assert same(one[number], pair)


def test_three_that_do_not_fit_together_take_turns_and_give_the_same() -> None:
    text = passage(310, window=32)
    slots = Slots(A=model(), B=model(seed=1), C=model(seed=2))
    found = list(
        alternated(
            text, *map(slots.open, "ABC"), vocabulary=97, held_bytes=4 * 31 * 97 * 4
        )
    )  # fmt: skip
    assert "".join(slots.loads) == "ABC" * 3
    expected = list(paired(text, *(model_logits(slots.models[name]) for name in "ABC")))
    assert len(found) == len(expected) == 10
    for pairs, others in zip(found, expected, strict=True):
        assert all(same(one, other) for one, other in zip(pairs, others, strict=True))


def same(one: Paired, other: Paired) -> bool:
    return one.window == other.window and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("nll_a", "nll_b", "kl", "same_top")
    )


def test_logits_are_computed_chunk_by_chunk_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "CHUNK_BYTES", 97 * 4 * 8)
    order: list[str] = []

    def told(name: str, logits: Logits) -> Logits:
        def wrapped(ids: Tensor, first: int) -> Iterator[Tensor]:
            for chunk in logits(ids, first):
                assert len(chunk) <= 8
                order.append(name)
                yield chunk

        return wrapped

    a, b = told("a", model_logits(model())), told("b", model_logits(model(seed=1)))
    list(paired(passage(64, window=32), a, b))
    assert "".join(order) == "ab" * 8  # so never more than one chunk of each is there


def test_different_vocabularies_are_refused_in_a_sentence() -> None:
    a, b = model_logits(model()), model_logits(model(vocabulary=98))
    with pytest.raises(InvalidInput, match="vocabularies of 97 and 98 tokens"):
        list(paired(passage(), a, b))


def test_different_tokenizers_are_refused_in_a_sentence() -> None:
    require_same_tokens(byte_tokenizer(97), byte_tokenizer(97))
    with pytest.raises(InvalidInput, match=r"different tokenizers.*compare bits per byte"):
        require_same_tokens(byte_tokenizer(97), byte_tokenizer(98))


@pytest.mark.parametrize("wrong", ["a", "b"])
def test_a_broken_logit_of_either_side_is_an_error(wrong: str) -> None:
    def broken(ids: Tensor, first: int) -> Iterator[Tensor]:
        rows = torch.zeros(len(ids) - first, 97)
        rows[2, 5] = math.nan
        yield rows

    fine = model_logits(model())
    with pytest.raises(NumericalError, match="at token 3 of the text"):
        list(paired(passage(), *((broken, fine) if wrong == "a" else (fine, broken))))


def test_greedy_texts_are_those_of_full_forward_passes() -> None:
    made, prompt = model(), (5, 9, 2)
    ids = list(prompt)
    for _ in range(10):
        with torch.inference_mode():
            ids.append(int(made(torch.tensor([ids]))[0, -1].argmax()))
    assert greedy(made, prompt, 10) == tuple(ids[3:])
    assert len(set(ids[3:])) > 1


def test_agreement_counts_up_to_the_first_token_that_differs() -> None:
    found = agreement(
        [(1, 2, 3, 4), (1, 2, 3, 4), (9, 2, 3, 4)], [(1, 2, 9, 4), (1, 2, 3, 4), (1, 2, 3, 4)]
    )
    assert found.first_divergent == (3, None, 1)
    assert found.agreement_ratio == pytest.approx((2 / 4 + 1 + 0) / 3)
    assert (found.prompts, found.new_tokens) == (3, 4)


@pytest.mark.parametrize(
    ("tokens", "count", "length", "expected"),
    [(300, 4, 16, 4), (300, 1, 16, 1), (20, 4, 16, 1), (2, 4, 16, 1), (64, 4, 16, 4)],
)
def test_prompts_are_runs_of_the_text_evenly_spread(
    tokens: int, count: int, length: int, expected: int
) -> None:
    text = passage(tokens)
    prompts = prompts_of(text, count, length)
    assert len(prompts) == len(set(prompts)) == expected
    assert {len(one) for one in prompts} == {min(length, tokens)}
    assert prompts[0] == tuple(text.ids[:length])
    if expected > 1:
        assert prompts[-1] == tuple(text.ids[-length:])


def test_the_tail_needs_a_thousand_tokens() -> None:
    a, b = model_logits(model()), model_logits(model(seed=1))
    few = divergence(firsts(paired(passage(1000), a, b)))
    many = divergence(firsts(paired(passage(1100), a, b)))
    assert (few.tokens < 1000, few.kl_p999) == (True, None)
    assert many.tokens > 1000
    assert many.kl_p999 is not None
    assert many.kl_p99 <= many.kl_p999
