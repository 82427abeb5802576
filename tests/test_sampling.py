import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gptcore.errors import NumericalError
from gptcore.records import STAGES, Sampling
from gptcore.sampling import draw, likeliest, stages, uniform

VOCABULARY = 500


def random_logits(seed: int, scale: float = 3.0, size: int = VOCABULARY) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


def by_transformers(logits: np.ndarray, sampling: Sampling, seen: list[int]) -> np.ndarray:
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    scores = chain(torch.tensor([seen]), torch.from_numpy(logits)[None].double())
    return torch.softmax(scores, dim=-1)[0].numpy()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    penalty=st.sampled_from([0.7, 1.0, 1.3]),
    temperature=st.floats(0.1, 2.0),
    top_k=st.sampled_from([0, 1, 5, 40, 499, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_the_chain_gives_the_probabilities_of_transformers(
    seed: int, penalty: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(
        repetition_penalty=penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    logits, seen = random_logits(seed), [3, 3, 7, 499]
    ours = stages(logits, sampling, seen)[-1].probabilities()
    # float32 against float64: a token on the very edge of a cut-off may fall on either side, so
    # the comparison is of the mass, not of the sets.
    assert np.abs(ours - by_transformers(logits, sampling, seen)).sum() < 2e-3


@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 2.0])
def test_probabilities_equal_softmax_of_logits_over_temperature(temperature: float) -> None:
    logits = random_logits(1, scale=10)
    exact = torch.softmax(torch.from_numpy(logits).double() / temperature, dim=0).numpy()
    stage = stages(logits, Sampling(temperature=temperature))[STAGES.index("temperature")]
    assert np.abs(stage.probabilities() - exact).max() < 1e-4


def test_a_tiny_temperature_gives_no_nan() -> None:
    last = stages(random_logits(2, scale=50), Sampling(temperature=1e-300))[-1]
    assert np.isfinite(last.probabilities()).all()
    assert last.probabilities().max() == 1.0


def test_temperature_zero_is_exact_greedy_whatever_the_random_number() -> None:
    logits = random_logits(3)
    last = stages(logits, Sampling(temperature=0, top_k=7, top_p=0.3, min_p=0.2))[-1]
    assert {draw(last, u) for u in (0.0, 0.5, 0.999999)} == {int(logits.argmax())}


def test_neutral_samplers_change_no_probability() -> None:
    chain = stages(random_logits(4), Sampling(temperature=1.0), seen_ids=[1, 2])
    assert all(stage is chain[0] for stage in chain)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_is_refused_by_name(bad: float) -> None:
    logits = random_logits(5)
    logits[42] = bad
    with pytest.raises(NumericalError, match="token 42"):
        stages(logits, Sampling())


def test_draws_follow_the_probabilities() -> None:
    last = stages(random_logits(6, size=20), Sampling(temperature=1.0, top_k=8))[-1]
    drawn = [draw(last, uniform(seed, 0)) for seed in range(20_000)]
    counts = np.bincount(drawn, minlength=20)
    expected = last.probabilities() * len(drawn)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    # Fixed seeds: this passes or fails the same way every time; p is 0.001 by the test's design.
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 0.001


def test_a_random_number_depends_on_seed_and_position_alone() -> None:
    assert uniform(7, 3) == uniform(7, 3)
    assert len({uniform(seed, position) for seed in range(30) for position in range(30)}) == 900


def test_a_draw_never_returns_a_token_that_was_cut_off() -> None:
    last = stages(random_logits(8), Sampling(top_k=3))[-1]
    allowed = set(np.flatnonzero(last.weights).tolist())
    assert {draw(last, u) for u in (0.0, np.nextafter(1.0, 0.0))} <= allowed


@given(seed=st.integers(0, 1000), count=st.integers(0, 600), scale=st.sampled_from([0.01, 3, 50]))
@settings(deadline=None)
def test_the_likeliest_are_those_of_a_full_sort(seed: int, count: int, scale: float) -> None:
    logits = random_logits(seed, scale)
    logits[10:14] = logits[10]  # ties go by the lower id
    sorted_ids = sorted(range(VOCABULARY), key=lambda id: (-logits[id], id))
    assert likeliest(logits, count).tolist() == sorted_ids[:count]
