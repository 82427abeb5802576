"""What the teacher is asked, and which of its texts may stay."""

import pytest

from gptcore.corpus.duplicates import Seen
from gptcore.corpus.examples import EXAMPLES
from gptcore.corpus.filters import cleaned, refused, repeated, whole_sentences
from gptcore.corpus.prompts import KINDS, prompt
from gptcore.corpus.teacher import Continuation

GOOD = (
    "Mina was a small fox who lived beside the river. Every morning she went to the old bridge "
    'and looked for her friend Otto. "Where have you been?" she asked when he came at last. Otto '
    "had found a map in the mill, and he wanted to show it to her before the rain began."
)
LIKELY = Continuation(ids=[1] * 80, logprob=-1.4 * 81, ended=True)


def test_a_prompt_is_a_function_of_seed_and_number() -> None:
    assert prompt(1, 7) == prompt(1, 7)
    assert prompt(1, 7) != prompt(2, 7)


def test_prompts_hardly_ever_come_twice_and_are_of_every_kind() -> None:
    found = [prompt(1, number) for number in range(3000)]
    # Of 120 subjects a few explanations are asked for in the same words.
    assert len({(one.text, one.opening) for one in found}) > 2950
    assert {one.kind for one in found} == KINDS.keys() == EXAMPLES.keys()
    assert len({one.seed for one in found}) == 3000
    assert not any("{" in one.text + one.opening for one in found)


def test_a_good_text_stays() -> None:
    assert refused(GOOD, "tale", LIKELY) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no end"),
        (GOOD[:120] + ".", "length"),
        (GOOD[:-1], "no proper end"),
        (GOOD.replace('"Where', "Where"), "no proper end"),
        (GOOD + " <|im_end|>.", "foreign marks"),
        (GOOD + " It was 5 € in all.", "foreign marks"),
        (GOOD + "\n1. A list.", "foreign marks"),
        (GOOD + " As an AI, I like it.", "foreign marks"),
        ("Title: The Fox.\n" + GOOD, "title or preamble"),
        ("The Fox and the Map\n" + GOOD, "title or preamble"),
        ("Here is a tale. " + GOOD, "title or preamble"),
        (GOOD + " This tale is about friendship.", "speaks of itself"),
        (GOOD[0].lower() + GOOD[1:], "no proper beginning"),
        (GOOD + " She went to the old bridge and looked for her friend. " * 4, "repetition"),
        ("Zorblax quintar vemoth. " * 6 + "Hunder maltic prenwo silgat. " * 6, "repetition"),
        (
            " ".join(f"{w}x qu{w} ve{w} mo{w}." for w in "abcdefghijkl").capitalize(),
            "strange words",
        ),
    ],
)
def test_a_bad_text_is_refused_with_its_reason(text: str, reason: str) -> None:
    assert refused(text.strip(), "tale", LIKELY) == reason


@pytest.mark.parametrize("mean", [-0.1, -3.0])
def test_a_text_that_the_teacher_recites_or_doubts_is_refused(mean: float) -> None:
    written = Continuation(ids=[1] * 80, logprob=mean * 81, ended=True)
    assert refused(GOOD, "tale", written) == "likelihood"


def test_every_example_would_stay() -> None:
    for kind, pairs in EXAMPLES.items():
        for _, answer in pairs:
            assert refused(cleaned(answer), kind, LIKELY) is None, answer


def test_cleaning_makes_plain_quotes_and_single_spaces() -> None:
    text = " “It’s  late,” he said…\t\n\n\n\nThen\N{EM DASH}silence. "
    assert cleaned(text) == '"It\'s late," he said...\n\nThen - silence.'


def test_a_text_that_broke_off_ends_with_its_last_whole_sentence() -> None:
    assert whole_sentences('He ran. "Stop!" she cried. And th') == 'He ran. "Stop!" she cried.'
    assert whole_sentences("no end at all") == ""


def test_repetition_is_the_share_of_runs_that_come_again() -> None:
    assert repeated(["a", "b", "c", "d", "e", "f", "g"]) == 0.0
    assert repeated(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)


def test_a_text_is_taken_once_and_so_is_one_much_like_it() -> None:
    seen = Seen()
    assert seen.add(GOOD) is None
    assert seen.add(GOOD.upper()) == "duplicate"
    assert seen.add(GOOD.replace("Otto", "Hugo")) == "near duplicate"
    other = EXAMPLES["tale"][0][1]
    assert seen.add(other) is None
    assert len(seen) == 2


def test_texts_that_share_little_are_told_apart() -> None:
    seen = Seen()
    texts = [answer for pairs in EXAMPLES.values() for _, answer in pairs]
    assert [seen.add(one) for one in texts] == [None] * len(texts)
    half = " ".join(texts[0].split()[: len(texts[0].split()) // 3]) + " " + texts[1]
    assert seen.add(half) == "near duplicate"  # all of the second text is in it
