import math

import numpy as np
import pytest
from scipy import stats

from gptcore.errors import NumericalError
from gptcore.explain.step import entropy_bits, many_draws, one_step, over_temperatures
from gptcore.records import STAGES, Request, Sampling
from gptcore.sampling import Stage, draw, stages, uniform
from tests.explain.models import TEXT, engine_of

LOGITS = np.random.default_rng(3).normal(scale=2, size=500).astype("f4")
EVERYTHING = Sampling(repetition_penalty=1.3, temperature=0.7, top_k=60, top_p=0.9, min_p=0.02)
SEEN = (1, 5, 5, 17)


def stage_of(*weights: float) -> Stage:
    array = np.array(weights, dtype="f4")
    return Stage(array / array.max(), float((array / array.max()).sum()))


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0), Sampling(temperature=0.3), EVERYTHING], ids=str
)
def test_the_numbers_of_a_row_chain(sampling: Sampling) -> None:
    step = one_step(LOGITS, sampling, SEEN, seed=1, count=100)
    assert step.max_scaled is not None
    assert any(row.removed_by for row in step.rows) == (sampling is EVERYTHING)
    for row in step.rows:
        assert row.logit == LOGITS[row.id]
        assert row.scaled is not None
        assert row.scaled == pytest.approx(row.penalised / sampling.temperature, rel=1e-6)
        kept = math.exp(row.scaled - step.max_scaled) if row.removed_by is None else 0.0
        assert row.weight == pytest.approx(kept, rel=1e-5)
        assert row.probabilities[-1] == pytest.approx(row.weight / step.totals[-1], rel=1e-9)
        assert row.high - row.low == pytest.approx(row.probabilities[-1], abs=1e-12)


def test_the_penalty_is_seen_on_tokens_that_occurred_and_on_no_other() -> None:
    step = one_step(LOGITS, EVERYTHING, SEEN, seed=1, count=500)
    changed = {row.id for row in step.rows if row.penalised != row.logit}
    assert changed == set(SEEN)


def test_the_row_whose_interval_holds_the_random_number_is_drawn() -> None:
    for seed in range(50):
        step = one_step(LOGITS, EVERYTHING, (), seed=seed, position=3, count=5)
        assert step.random == uniform(seed, 3)
        inside = [row.id for row in step.rows if row.low <= step.random < row.high]
        assert inside == [step.drawn_id]  # a drawn token beyond the first five has a row too


def test_it_draws_what_the_engine_draws() -> None:
    engine = engine_of()
    request = Request(prompt=TEXT, temperature=1.2, top_p=0.95, seed=9, max_new_tokens=4)
    tokens = list(engine.start(request))
    seen = list(TEXT.encode())
    for token in tokens:
        logits = engine.next_logits(seen)
        step = one_step(logits, request.sampling, seen, seed=9, position=token.index)
        assert step.drawn_id == token.id
        seen.append(token.id)


def test_ranks_count_from_the_largest_logit() -> None:
    step = one_step(LOGITS, Sampling(), (), seed=0, count=20)
    assert [row.rank for row in step.rows[:20]] == list(range(1, 21))
    assert step.rows[0].id == LOGITS.argmax()


def test_temperature_zero_keeps_the_largest_alone() -> None:
    step = one_step(LOGITS, Sampling(temperature=0), (), seed=5)
    assert step.drawn_id == LOGITS.argmax()
    assert step.max_scaled is None
    assert step.entropies_bits[-1] == 0
    assert {row.removed_by for row in step.rows[1:]} == {"temperature"}


def test_entropy_of_known_distributions() -> None:
    assert entropy_bits(stage_of(*[1.0] * 8)) == pytest.approx(3)
    assert entropy_bits(stage_of(1, 0, 0)) == 0
    assert entropy_bits(stage_of(0.5, 0.25, 0.25)) == pytest.approx(1.5)


def test_each_mask_leaves_no_more_than_the_one_before() -> None:
    step = one_step(LOGITS, EVERYTHING, (), seed=0)
    assert len(step.candidates) == len(STAGES)
    assert list(step.candidates) == sorted(step.candidates, reverse=True)
    assert step.candidates[STAGES.index("top_k")] == 60


def test_entropy_rises_with_the_temperature_to_all_alike() -> None:
    temperatures = (0.0, 0.5, 1.0, 2.0)
    entropies, probabilities = over_temperatures(LOGITS, temperatures, [int(LOGITS.argmax()), 3])
    assert entropies[0] == 0
    assert (np.diff(entropies) > 0).all()
    assert entropies[-1] < math.log2(len(LOGITS))
    assert (np.diff(probabilities[:, 0]) < 0).all()
    plain = stages(LOGITS, Sampling(temperature=2.0))[-1]
    assert probabilities[3] == pytest.approx(
        plain.probabilities(np.array([int(LOGITS.argmax()), 3]))
    )


def test_many_draws_are_those_of_consecutive_seeds() -> None:
    last = stages(LOGITS, EVERYTHING)[-1]
    found = many_draws(last, seed=40, position=2, times=30)
    wanted = [draw(last, uniform(40 + i, 2)) for i in range(30)]
    assert found.counts == {id: wanted.count(id) for id in wanted}


def test_chi_square_is_scipys_with_rare_outcomes_counted_together() -> None:
    last = stage_of(0.5, 0.3, 0.1, 0.097, 0.002, 0.001)
    found = many_draws(last, seed=0, times=1000)
    often = [found.counts.get(id, 0) for id in range(6)]
    # Together the last two are expected 3 times, so they join the rarest of the others.
    observed = [*often[:3], sum(often[3:])]
    wanted = stats.chisquare(observed, [500, 300, 100, 100])
    assert found.freedom == 3
    assert found.chi_square == pytest.approx(wanted.statistic, rel=1e-5)
    assert found.p_value == pytest.approx(wanted.pvalue, rel=1e-5)


def test_many_rare_outcomes_are_one_of_their_own() -> None:
    last = stage_of(0.5, 0.4, *[0.001] * 100)
    found = many_draws(last, seed=0, times=1000)
    assert found.freedom == 2


def test_p_values_of_true_draws_are_spread_over_their_range() -> None:
    """Were the histogram not of these probabilities, nearly all would lie near 0."""
    last = stages(LOGITS, Sampling(temperature=0.5))[-1]
    found = [many_draws(last, seed=1000 * i, times=300).p_value for i in range(30)]
    values = [one for one in found if one is not None]
    assert len(values) == 30
    assert stats.kstest(values, "uniform").pvalue > 0.01


def test_one_outcome_has_no_test() -> None:
    found = many_draws(stage_of(1, 0, 0), seed=0, times=50)
    assert found.counts == {0: 50}
    assert found.chi_square is found.p_value is None


def test_a_broken_logit_is_named() -> None:
    with pytest.raises(NumericalError, match="token 3"):
        one_step(np.array([0, 1, 2, np.nan], dtype="f4"), Sampling(), (), seed=0)
