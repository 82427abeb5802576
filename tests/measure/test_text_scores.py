"""BLEU, chrF, ROUGE and METEOR of pairs: equal to the reference packages, with honest intervals."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from nltk.stem.porter import PorterStemmer
from nltk.tokenize import WordPunctTokenizer
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer

from gptcore.errors import Cancelled, InvalidInput
from gptcore.measure import text_scores
from gptcore.measure.text_scores import Pair, compare_pairs, meteor, read_pairs, score_pairs
from tests.conftest import ROOT

NAMES = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "meteor")
TEXT = (
    "the a fox foxes jumped jumping jumps over lazy dog dogs quickly quick river rivers slept "
    "sleeping sleep and , . house houses happiness happily was were running Runs isn't 42 café"
)
VOCABULARY = TEXT.split()


class NoWordNet:
    """What METEOR of nltk asks for synonyms, where there are none."""

    def synsets(self, word: str) -> list[object]:
        return []


def texts(count: int, seed: int, references: int = 1) -> tuple[list[str], list[list[str]]]:
    """Made-up pairs that share some words: references are altered copies of the hypothesis."""
    draw = random.Random(seed)
    hypotheses, found = [], []
    for _ in range(count):
        words = draw.choices(VOCABULARY, k=draw.randint(3, 25))
        hypotheses.append(" ".join(words))
        several = []
        for _ in range(references):
            kept = [one if draw.random() < 0.7 else draw.choice(VOCABULARY) for one in words]
            if draw.random() < 0.5:
                at = draw.randrange(len(kept))
                kept = kept[at:] + kept[:at]
            several.append(" ".join(kept[: draw.randint(2, len(kept))]))
        found.append(several)
    return hypotheses, found


@pytest.mark.parametrize("references", [1, 3])
def test_every_score_is_that_of_its_reference_package(references: int):
    hypotheses, several = texts(60, seed=references, references=references)
    several[0] = several[0][:1]  # with three, the number of references varies
    found = score_pairs(hypotheses, several, resamples=10)

    columns = [[one[at] if at < len(one) else None for one in several] for at in range(references)]
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    assert found["bleu"].value == pytest.approx(
        bleu.corpus_score(hypotheses, columns).score, abs=1e-6
    )
    assert found["chrf"].value == pytest.approx(
        chrf.corpus_score(hypotheses, columns).score, abs=1e-6
    )
    assert found["bleu"].signature.endswith(str(bleu.get_signature()))
    assert found["chrf"].signature.endswith(str(chrf.get_signature()))

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    pairs = list(zip(hypotheses, several, strict=True))
    for name in ("rouge1", "rouge2", "rougeL"):
        theirs = [scorer.score_multi(refs, text)[name].fmeasure for text, refs in pairs]
        assert found[name].value == pytest.approx(np.mean(theirs), abs=1e-6)
        assert 0.1 < found[name].value < 0.95  # else the texts would not tell

    words = WordPunctTokenizer().tokenize
    theirs = [
        meteor_score([words(one) for one in refs], words(text), wordnet=NoWordNet())
        for text, refs in pairs
    ]
    assert found["meteor"].value == pytest.approx(np.mean(theirs), abs=1e-6)
    assert 0.1 < found["meteor"].value < 0.95


def test_meteor_is_that_of_nltk_text_by_text():
    stem = PorterStemmer().stem
    words = WordPunctTokenizer().tokenize
    hypotheses, several = texts(300, seed=7, references=2)
    for text, references in zip(hypotheses, several, strict=True):
        theirs = meteor_score([words(one) for one in references], words(text), wordnet=NoWordNet())
        assert meteor(text, references, stem) == pytest.approx(theirs, abs=1e-12)


def test_meteor_matches_stems_and_counts_chunks():
    stem = PorterStemmer().stem
    # Four words in one chunk: 1 - 0.5 × (1/4)³.
    assert meteor("a b c d", ["a b c d"], stem) == pytest.approx(1 - 0.5 / 64)
    # Two chunks of two: 1 - 0.5 × (2/4)³.
    assert meteor("c d a b", ["a b c d"], stem) == pytest.approx(1 - 0.5 / 8)
    # "jumping" and "jumped" have one stem; without stems only two of three would match.
    assert meteor("foxes were jumping", ["foxes were jumped"], stem) == pytest.approx(1 - 0.5 / 27)
    assert meteor("quite different", ["nothing shared here"], stem) == 0.0


def test_equal_texts_score_full_marks_and_foreign_ones_nothing():
    hypotheses, _ = texts(30, seed=3)
    same = score_pairs(hypotheses, hypotheses, resamples=20)
    assert same["bleu"].value == pytest.approx(100)
    assert same["chrf"].value == pytest.approx(100)
    assert same["rouge1"].value == same["rougeL"].value == pytest.approx(1)
    assert same["meteor"].value > 0.95  # one chunk of few words costs a little
    assert all(one.value <= one.scale * (1 + 1e-12) for one in same.scores)
    other = score_pairs(["xyz"] * 30, ["abc def"] * 30, resamples=20)
    assert [one.value for one in other.scores] == [0] * 6


def test_an_empty_text_scores_nothing_and_is_said():
    found = score_pairs(["", "the fox slept"], ["the fox slept", "the fox slept"], resamples=50)
    assert any("1 of 2 texts are empty" in note for note in found.notes)
    assert found["rouge1"].value == pytest.approx(0.5)
    alone = score_pairs(["  "], ["the fox slept"])
    assert [one.value for one in alone.scores] == [0] * 6


def test_a_single_pair_has_no_interval():
    found = score_pairs(["the fox slept"], ["the dog slept"])
    assert all(one.low is one.high is None for one in found.scores)
    assert "One pair has no interval" in found.notes[0]


def test_intervals_are_those_of_drawing_whole_pairs_anew():
    hypotheses, references = texts(40, seed=5)
    found = score_pairs(hypotheses, references, seed=1, resamples=1000)
    draw = np.random.default_rng(0)
    theirs = []
    for _ in range(400):
        places = draw.integers(40, size=40)
        theirs.append(
            sacrebleu.BLEU(force=True)
            .corpus_score([hypotheses[at] for at in places], [[references[at][0] for at in places]])
            .score
        )
    low, high = np.quantile(theirs, [0.025, 0.975])
    width = high - low
    # Two bootstraps of 1,000 and 400 draws: their 2.5 % quantiles differ by some 5 % of the width.
    assert found["bleu"].low == pytest.approx(low, abs=0.15 * width)
    assert found["bleu"].high == pytest.approx(high, abs=0.15 * width)
    for one in found.scores:
        assert one.low < one.value < one.high


def test_rouge_intervals_cover_the_mean_of_all_texts_as_often_as_they_say():
    hypotheses, references = texts(1000, seed=11)
    whole = score_pairs(hypotheses, references, resamples=1)["rouge1"].value
    covered = 0
    for begin in range(0, 1000, 20):
        part = slice(begin, begin + 20)
        one = score_pairs(hypotheses[part], references[part], seed=begin, resamples=300)["rouge1"]
        covered += one.low <= whole <= one.high
    # With intervals that cover 92 %, as this bootstrap of 20 pairs does, 44 of 50 or more come in
    # 90 % of all such tests (the draws here are fixed); with 75 %, in 2 %.
    assert covered >= 44


def test_the_seed_decides_the_intervals_and_nothing_else():
    hypotheses, references = texts(30, seed=2)
    one, same, other = (score_pairs(hypotheses, references, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert [x.value for x in one.scores] == [x.value for x in other.scores]


def test_a_thousand_resamples_of_a_thousand_pairs_read_no_text_again(
    monkeypatch: pytest.MonkeyPatch,
):
    hypotheses, references = texts(1000, seed=4)
    read = []
    known = text_scores._meteor
    monkeypatch.setattr(text_scores, "_meteor", lambda *args: read.append(1) or known(*args))
    found = score_pairs(hypotheses, references, resamples=1000)
    assert len(read) == 1000
    assert all(0 < one.high - one.low < 0.1 * one.scale for one in found.scores)


def test_a_worse_side_is_found_and_equal_sides_are_not():
    good, references = texts(60, seed=6)
    draw = random.Random(0)
    bad = [" ".join(w if draw.random() < 0.5 else "xyz" for w in one.split()) for one in good]
    worse = compare_pairs(good, bad, references, resamples=300)
    assert [one.verdict for one in worse] == ["worse"] * 6
    assert [one.name for one in worse] == list(NAMES)
    assert all(one.difference == one.b - one.a < 0 for one in worse)
    better = compare_pairs(bad, good, references, resamples=300)
    assert [one.verdict for one in better] == ["better"] * 6
    for one in compare_pairs(good, good, references, resamples=300):
        assert (one.difference, one.low, one.high) == (0, 0, 0)
        assert one.verdict == "no detectable difference"


def test_a_handful_of_pairs_gets_no_verdict():
    good, references = texts(20, seed=9)
    bad = ["xyz"] * 20
    assert {one.verdict for one in compare_pairs(good, bad, references)} == {"worse"}
    few = compare_pairs(good[:19], bad[:19], references[:19])
    assert {one.verdict for one in few} == {"no verdict from fewer than 20 pairs"}
    notes = score_pairs(good[:19], references[:19], resamples=5).notes
    assert notes == ("19 pairs are few: the true intervals are wider than these. Give 20 or more.",)


def test_pairing_makes_the_interval_of_a_difference_narrow():
    good, references = texts(60, seed=8)
    nearly = [one + " fox" for one in good]
    alone = score_pairs(good, references, resamples=300)
    together = {one.name: one for one in compare_pairs(good, nearly, references, resamples=300)}
    for name in ("chrf", "rouge1", "meteor"):
        paired = together[name].high - together[name].low
        assert paired < 0.5 * (alone[name].high - alone[name].low)


def test_texts_that_rouge_does_not_read_are_noted():
    found = score_pairs(["лиса спала"] * 2, ["лиса спала"] * 2, resamples=5)
    assert found["rouge1"].value == 0
    assert found["chrf"].value == pytest.approx(100)
    assert any("ROUGE reads the letters a to z" in note for note in found.notes)
    assert not score_pairs(["the fox"] * 20, ["the fox"] * 20, resamples=5).notes


@pytest.mark.parametrize(
    ("hypotheses", "references", "said"),
    [
        ([], [], "There are 0 pairs; 1 to 10,000 are scored."),
        (["a", "b"], ["a"], "There are 2 texts and 1 references: give one reference"),
        (["a"] * 10_001, ["a"] * 10_001, "There are 10,001 pairs"),
        ([None], ["a"], "The text of pair 1 is NoneType; it must be text."),
        (["a", "b"], ["a", 5], "A reference of pair 2 is int; it must be text."),
        (["a"], [[]], "Pair 1 has no reference"),
        (["a"], [["a", " "]], "A reference of pair 1 is empty"),
        (["a" * 20_001], ["a"], "has 20,001 characters; the most is 20,000"),
    ],
)
def test_bad_pairs_are_refused_in_a_sentence(hypotheses: list, references: list, said: str):
    with pytest.raises(InvalidInput, match=r"^[A-Z].*[.]$") as raised:
        score_pairs(hypotheses, references)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_cancellation_is_seen_between_pairs_and_progress_reaches_the_end():
    hypotheses, references = texts(20, seed=1)
    shares: list[float] = []
    score_pairs(hypotheses, references, resamples=5, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 10:
            raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        score_pairs(hypotheses, references, check=check)
    assert len(asked) == 10


def test_pairs_are_read_from_jsonl(tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        '\ufeff{"prompt": "Say hi", "reference": "Hi!"}\r\n\r\n'
        '{"prompt": "Bye", "references": ["Bye!", "So long"], "output": ""}\n',
        encoding="utf-8",
    )
    first, second = read_pairs(file)
    assert first == Pair(prompt="Say hi", reference="Hi!")
    assert first.all_references == ("Hi!",)
    assert first.output is None
    assert second.all_references == ("Bye!", "So long")
    assert second.output == ""
    assert read_pairs(file.read_bytes()) == (first, second)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "a"}, 'give either "reference"'),
        ({"prompt": "a", "reference": "b", "references": ["c"]}, 'give either "reference"'),
        ({"prompt": "a", "reference": " "}, "reference is empty"),
        ({"prompt": "a", "references": ["b", ""]}, "reference is empty"),
        ({"prompt": "a", "references": ["b"] * 21}, "the most is 20"),
        ({"prompt": "a", "reference": "b" * 20_001}, "the most is 20,000"),
        ({"prompt": "a", "reference": 5}, "Reference is 5"),
        ({"prompt": "a", "reference": "b", "answer": "c"}, "There is no Answer; there are: prompt"),
        ({"reference": "b"}, "prompt is missing"),
    ],
)
def test_a_wrong_pair_is_refused_with_its_line(line: dict, said: str):
    good = json.dumps({"prompt": "a", "reference": "b"})
    with pytest.raises(InvalidInput) as raised:
        read_pairs(f"{good}\n{json.dumps(line)}\n".encode(), name="mine.jsonl")
    sentence = str(raised.value)
    assert sentence.startswith("mine.jsonl, line 2: ")
    assert said.lower() in sentence.lower()
    assert "\n" not in sentence


def test_importing_brings_neither_torch_nor_the_packages_of_the_scores():
    heavy = ("torch", "scipy", "sacrebleu", "nltk", "rouge_score", "lxml")
    code = (
        "import gptcore.measure.text_scores, gptcore.measure.tasks, sys; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
