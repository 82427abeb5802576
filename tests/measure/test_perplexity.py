"""Perplexity against a plain loop over ``transformers``, its windows, identity and refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError

from gptcore import weights
from gptcore.device import Placement
from gptcore.errors import ContextOverflow, InvalidInput, NumericalError
from gptcore.measure import perplexity as module
from gptcore.measure.corpora import EvaluationText
from gptcore.measure.perplexity import (
    Identity,
    Passage,
    Window,
    Windowing,
    error_of_mean,
    model_logits,
    passage,
    require_comparable,
    require_context,
    score,
    summary,
    windows,
)
from gptcore.passes.base import PassContext
from gptcore.recipe import Recipe, place
from gptcore.spec import ModelSpec, gpt
from gptcore.tokenizer import byte_tokenizer, load_tokenizer
from tests.families import CASES, Case

TOLERANCE = 1e-4
"""Relative, as promised; float32 rounding alone is about 1e-6."""
SPEC = gpt(2, 32, 4, context=64, vocabulary=97)
pytestmark = pytest.mark.usefixtures("one_thread")


def some_passage(
    tokens: int, windowing: Windowing, vocabulary: int = 97, bos_id: int | None = None
) -> Passage:
    ids = np.random.default_rng(0).integers(0, vocabulary, tokens)
    sizes = np.random.default_rng(1).integers(1, 6, tokens)
    return Passage("sha256:a", "sha256:t", ids, sizes, bos_id, windowing)


def by_transformers(
    model: transformers.PreTrainedModel, passage: Passage, window: int, stride: int
) -> float:
    """The loop of the library's own guide: labels of -100 leave the overlap out."""
    ids = torch.from_numpy(passage.ids)[None]
    nats, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        part = ids[:, begin:end]
        labels = part.clone()
        labels[:, : before - begin] = -100
        with torch.inference_mode():
            logits = model(part).logits.float()
        costs = torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="none"
        )
        nats += float(costs.double().sum())
        count += int((labels[0, 1:] != -100).sum())
        before = end
        if end == ids.shape[1]:
            break
    return math.exp(nats / count)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("window", "stride"), [(32, 32), (48, 13)])
def test_perplexity_is_that_of_a_plain_transformers_loop(
    case: Case, window: int, stride: int, tmp_path: Path
) -> None:
    ours = weights.build(weights.describe(case.save(tmp_path / "model")), Placement())
    windowing = Windowing(window=window, stride=stride)
    text = some_passage(150, windowing, vocabulary=211)
    found = summary(text, list(score(text, model_logits(ours))))
    expected = by_transformers(case.model, text, window, stride)
    assert found.perplexity == pytest.approx(expected, rel=TOLERANCE)
    assert expected > 211 * 1.2  # worse than a guess: random weights are sure of wrong tokens


@pytest.mark.smollm2
def test_smollm2_on_a_short_text_is_that_of_a_plain_transformers_loop(
    smollm2_gguf: Path,
) -> None:
    checkpoint = weights.describe(smollm2_gguf)
    text = passage(
        EvaluationText("sentences", "The cat sat on the mat. " * 3 + "Two and two make five.", ""),
        load_tokenizer(checkpoint.directory),
        Windowing(window=16, stride=8),
    )
    found = summary(text, list(score(text, model_logits(weights.build(checkpoint, Placement())))))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.directory, dtype=torch.float32
    ).eval()
    assert found.perplexity == pytest.approx(by_transformers(theirs, text, 16, 8), rel=TOLERANCE)
    assert 2 < found.perplexity < 200


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_a_variant_is_near_its_fp32_and_not_the_same(precision: str) -> None:
    spec = gpt(2, 64, 4, context=64, vocabulary=97)
    text = some_passage(200, Windowing(window=32, stride=16))
    plain = summary(text, list(score(text, model_logits(random_model(spec, "fp32")))))
    found = summary(text, list(score(text, model_logits(random_model(spec, precision)))))
    assert found.perplexity != plain.perplexity
    assert found.perplexity == pytest.approx(plain.perplexity, rel=0.1)
    require_comparable(found.identity, plain.identity)


def random_model(spec: ModelSpec, precision: str) -> torch.nn.Module:
    placement, recipe = place(precision, "cpu", 1, Recipe())
    model = weights.build_random(spec, placement)
    for one in recipe.passes:
        model = one.apply(model, PassContext(placement=placement))
    return model


@pytest.mark.parametrize("bos_id", [None, 5])
@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (64, 64), (7, 1)])
def test_every_scored_token_costs_what_a_full_forward_pass_says(
    window: int, stride: int, bos_id: int | None
) -> None:
    model = random_model(SPEC, "fp32")
    text = some_passage(
        50, Windowing(window=window, stride=stride, bos=bos_id is not None), bos_id=bos_id
    )
    seen = set()
    for one in score(text, model_logits(model)):
        for at, cost in enumerate(one.nll, start=one.window.first):
            before = [*([] if bos_id is None else [bos_id]), *text.ids[one.window.begin : at]]
            with torch.inference_mode():
                logits = model(torch.tensor([before]))[0, -1]
            assert cost == pytest.approx(-float(logits.log_softmax(0)[text.ids[at]]), rel=1e-5)
            assert at not in seen
            seen.add(at)
    unscored = set(range(50)) - seen
    assert unscored == (
        set() if bos_id is not None else {0} if stride < window else set(range(0, 50, window))
    )


def test_windows_score_every_token_once_and_only_with_something_before_it() -> None:
    for tokens in range(40):
        for window in range(2, 12):
            for stride in range(1, window + 1):
                for bos in (False, True):
                    cut = windows(tokens, Windowing(window=window, stride=stride, bos=bos))
                    scored = [at for one in cut for at in range(one.first, one.end)]
                    assert scored == sorted(set(scored))
                    alone = set(range(0, tokens, window)) if stride == window else {0}
                    assert set(scored) == set(range(tokens)) - (set() if bos else alone)
                    assert all(one.end - one.begin <= window for one in cut)
                    assert all(one.first > one.begin or bos for one in cut)


def test_a_text_shorter_than_a_window_is_scored_but_for_its_first_token() -> None:
    assert windows(10, Windowing(window=512)) == (Window(0, 1, 10),)
    assert windows(10, Windowing(window=512, bos=True)) == (Window(0, 0, 10),)


def test_the_size_of_the_chunks_changes_nothing_but_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = some_passage(60, Windowing(window=48, stride=20))
    model = random_model(SPEC, "fp32")
    whole = summary(text, list(score(text, model_logits(model))))
    chunks = []

    def counted(ids: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        for chunk in model_logits(model)(ids, first):
            chunks.append(chunk.shape)
            yield chunk

    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 97 * 7)
    monkeypatch.setattr(module, "MAX_CHUNK", 9)
    small = summary(text, list(score(text, counted)))
    assert small.nats == pytest.approx(whole.nats, rel=1e-6)
    assert max(rows for rows, _ in chunks) == 7
    assert len(chunks) > 8


def test_bits_per_byte_counts_the_bytes_of_the_scored_tokens_only() -> None:
    text = some_passage(50, Windowing(window=16))
    found = summary(text, list(score(text, lambda ids, first: iter([torch.zeros(len(ids), 97)]))))
    assert found.perplexity == pytest.approx(97)  # a model that knows nothing
    kept = [at for at in range(50) if at % 16]
    assert found.scored_tokens == len(kept)
    assert found.scored_bytes == sum(int(text.sizes[at]) for at in kept)
    assert found.bits_per_byte == pytest.approx(
        len(kept) * math.log2(97) / sum(int(text.sizes[at]) for at in kept)
    )


def test_a_byte_tokenizer_has_as_many_bits_a_byte_as_a_token() -> None:
    content = "né " * 20
    text = passage(EvaluationText("t", content, "h"), byte_tokenizer(300), Windowing(window=64))
    found = summary(text, list(score(text, lambda ids, first: iter([torch.zeros(len(ids), 300)]))))
    assert found.bits_per_byte == pytest.approx(math.log2(300))
    assert found.scored_bytes == len(content.encode()) - 2  # the first token of both windows


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_logit_is_named_with_its_token(value: float) -> None:
    text = some_passage(40, Windowing(window=16))

    def logits(ids: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        rows = torch.zeros(len(ids), 97)
        if int(ids[0]) == text.ids[16]:
            rows[4, 3] = value
        yield rows

    assert len({int(text.ids[at]) for at in (0, 16, 32)}) == 3
    with pytest.raises(NumericalError, match="NaN or infinity at token 21 of the text"):
        list(score(text, logits))


def test_a_perplexity_beyond_every_number_is_an_error_in_a_sentence() -> None:
    text = some_passage(10, Windowing())
    found = summary(text, list(score(text, model_logits(random_model(SPEC, "fp32")))))
    with pytest.raises(NumericalError, match="1,000 nats a token"):
        _ = replace(found, nats=1000.0 * found.scored_tokens).perplexity


IDENTITY = Identity("sha256:text", "one", "sha256:tok", 1000, 512, 256, None, 999)
OTHER = {
    "text": "sha256:other",
    "joining": "two",
    "tokenizer": "sha256:more",
    "tokens": 900,
    "window": 256,
    "stride": 512,
    "bos": 1,
    "scored_positions": 998,
}


def test_perplexities_of_one_identity_are_comparable() -> None:
    require_comparable(IDENTITY, replace(IDENTITY))


@pytest.mark.parametrize("field", OTHER)
def test_perplexities_of_different_identity_are_never_compared(field: str) -> None:
    named = rf"cannot be compared, they differ in {field.replace('_', ' ')} \("
    with pytest.raises(InvalidInput, match=named):
        require_comparable(IDENTITY, replace(IDENTITY, **{field: OTHER[field]}))
    assert set(OTHER) == set(Identity.__slots__)


def test_another_tokenizer_is_told_of_bits_per_byte() -> None:
    with pytest.raises(InvalidInput, match="compare bits per byte"):
        require_comparable(IDENTITY, replace(IDENTITY, tokenizer="x", tokens=5))


def test_the_identity_names_what_was_measured() -> None:
    content = "Once upon a time there was a fox. " * 4
    model = random_model(gpt(2, 32, 4, context=64, vocabulary=256), "fp32")
    text = passage(
        EvaluationText("t", content, "sha256:h"),
        byte_tokenizer(256),
        Windowing(window=32, stride=8, max_tokens=100),
    )
    found = summary(text, list(score(text, model_logits(model))))
    assert found.identity == Identity("sha256:h", module.JOINING, "bytes:256", 100, 32, 8, None, 99)
    assert found.as_json()["identity"]["stride"] == 8


@pytest.mark.parametrize(("content", "tokens"), [("a", "1 token"), ("", "0 tokens")])
def test_a_text_without_a_token_to_score_is_refused(content: str, tokens: str) -> None:
    with pytest.raises(InvalidInput, match=f"has {tokens} to read.*give at least two"):
        passage(EvaluationText("t", content, "h"), byte_tokenizer(256), Windowing())


def test_a_first_of_text_token_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidInput, match="has no first-of-text token: measure without it"):
        passage(EvaluationText("t", "ab", "h"), byte_tokenizer(256), Windowing(bos=True))


def test_a_window_longer_than_the_context_is_refused() -> None:
    require_context(some_passage(10, Windowing(window=64)), 64, "small")
    with pytest.raises(ContextOverflow, match=r"window of 65 tokens is longer .* small, 64"):
        require_context(some_passage(10, Windowing(window=65)), 64, "small")


def test_a_window_of_the_whole_context_with_a_first_token_fits() -> None:
    text = some_passage(70, Windowing(window=64, bos=True), bos_id=1)
    assert len(list(score(text, model_logits(random_model(SPEC, "fp32"))))) == 2


def test_a_stride_that_leaves_tokens_out_is_refused() -> None:
    with pytest.raises(ValidationError, match="stride of 33 is longer than the window of 32"):
        Windowing(window=32, stride=33)


def test_the_standard_error_covers_the_mean_of_correlated_tokens() -> None:
    """Tokens share a level with their window; an error that took them as independent covers 40 %.

    400 texts: the true coverage of ± 1.96 se with 40 blocks is 94.3 %, so below 90 % or above
    98 % is no accident (each less than 1 in 1,000).
    """
    random = np.random.default_rng(0)
    covered, naive = 0, 0
    for _ in range(400):
        costs = [random.normal(3 + random.normal(0, 0.3), 1, 200) for _ in range(40)]
        mean = np.concatenate(costs).mean()
        error = error_of_mean(costs)
        assert error is not None
        covered += abs(mean - 3) < 1.96 * error
        naive += abs(mean - 3) < 1.96 * np.concatenate(costs).std() / math.sqrt(8000)
    assert 360 < covered < 392
    assert naive < 300


def test_short_windows_are_joined_into_blocks_and_one_block_has_no_error() -> None:
    random = np.random.default_rng(0)
    costs = [random.normal(3, 1, 16) for _ in range(64)]
    joined = [np.concatenate(costs[at : at + 8]) for at in range(0, 64, 8)]
    assert error_of_mean(costs) == pytest.approx(error_of_mean(joined), rel=1e-12)
    assert error_of_mean(costs[:8]) is None
    assert error_of_mean([]) is None


def test_the_standard_error_is_that_of_equal_blocks() -> None:
    costs = [np.full(200, level) for level in (1.0, 2.0, 4.0)]
    expected = np.std([1.0, 2.0, 4.0], ddof=1) / math.sqrt(3)
    assert error_of_mean(costs) == pytest.approx(expected, rel=1e-12)
