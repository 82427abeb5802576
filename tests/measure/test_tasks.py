"""Multiple-choice items: the set that ships, users' own, and how a model's answers are scored."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptcore import weights
from gptcore.device import Placement
from gptcore.errors import Cancelled, ContextOverflow, InvalidInput, NumericalError
from gptcore.measure import jsonl, tasks
from gptcore.measure.tasks import (
    Answered,
    Item,
    answer,
    compare_answers,
    evaluate_tasks,
    items_hash,
    kinds_of,
    load_tasks,
    of_kinds,
    prompts,
    shipped_tasks,
)
from gptcore.model import GPT
from gptcore.spec import gpt
from gptcore.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from tests.tiny import TEXT, tiny_checkpoint

KINDS = ("agreement", "cloze", "copying", "counting", "facts")
CLOSE = 1e-4
"""Of sums of up to 40 log-probabilities in fp32, added in another order."""
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def llama(folder: Path) -> GPT:
    return weights.build(weights.describe(folder), Placement())


@pytest.fixture(scope="module")
def gpt2(tokenizer: Tokenizer) -> GPT:
    spec = gpt(2, 32, 4, context=512, vocabulary=tokenizer.vocabulary)
    model = weights.build_random(spec, Placement(), seed=3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # as random weights come, all choices would be about as likely
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> GPT:
    found: GPT = request.getfixturevalue(request.param)
    return found


def items(count: int, seed: int = 0, kind: str = "own") -> tuple[Item, ...]:
    """Items of various lengths, with one to a dozen tokens a choice."""
    draw = random.Random(seed)
    words = [*TEXT[1].split(), "once", "upon", "river", "books", "xyzzy"]
    found = []
    for number in range(count):
        count_of_choices = draw.randint(2, 5)
        choices: list[str] = []
        while len(choices) < count_of_choices:
            choice = " ".join(draw.choices(words, k=draw.randint(1, 4)))
            if choice not in choices:
                choices.append(choice)
        context = f"{number} " + " ".join(draw.choices(words, k=draw.randint(1, 12)))
        found.append(
            Item(
                context=context,
                choices=tuple(choices),
                answer=draw.randrange(count_of_choices),
                kind=kind,
                separator=draw.choice([" ", " ", "\n", ""]),
            )
        )
    return tuple(found)


def by_one_full_pass(model: GPT, tokenizer: Tokenizer, item: Item, prompt: str) -> list[float]:
    """ln p of every choice, from the logits of one whole text at a time."""
    alone = tokenizer.encode_prompt(prompt + item.context)
    texts = [tokenizer.encode_prompt(prompt + item.text(choice)) for choice in item.choices]
    begin = 0
    while all(begin < len(one) and one[begin] == alone[begin] for one in texts):
        begin += 1
        if begin == len(alone):
            break
    found = []
    with torch.inference_mode():
        for ids in texts:
            logprobs = model(torch.tensor([ids])).float().log_softmax(-1)[0]
            found.append(sum(float(logprobs[at - 1, ids[at]]) for at in range(begin, len(ids))))
    return found


# What ships


def test_what_ships_has_five_kinds_of_sixty_different_items_or_more():
    shipped = shipped_tasks()
    assert kinds_of(shipped) == KINDS
    counts = Counter(item.kind for item in shipped)
    assert all(counts[kind] >= 60 for kind in KINDS)
    assert len(shipped) >= 300
    assert len({item.id for item in shipped}) == len(shipped)
    for file in sorted(tasks.SHIPPED.glob("*.jsonl")):
        assert {item.kind for item in load_tasks(file)} == {file.stem}


def test_the_right_answers_of_what_ships_stand_in_every_place_equally_often():
    places: dict[tuple[str, int], Counter[int]] = {}
    for item in shipped_tasks():
        places.setdefault((item.kind, len(item.choices)), Counter())[item.answer] += 1
    for (_, choices), counts in places.items():
        assert set(counts) == set(range(choices))
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [min, max])
def test_the_length_of_a_choice_does_not_give_the_right_one_away(
    kind: str, rule: Callable[[list[int]], int]
):
    # Random weights hold the shortest choice likeliest, so a set in which that is often the right
    # one would credit a model that knows nothing.
    asked = of_kinds(shipped_tasks(), [kind])
    expected = 0.0
    for item in asked:
        sizes = [len(choice.encode()) for choice in item.choices]
        if sizes[item.answer] == rule(sizes):
            expected += 1 / sizes.count(rule(sizes))
    chance = sum(1 / len(item.choices) for item in asked)
    assert expected / len(asked) == pytest.approx(chance / len(asked), abs=0.11)


# Scoring


@pytest.mark.parametrize("examples", [0, 2])
def test_scores_in_batches_with_a_cache_are_those_of_one_full_pass_a_text(
    model: GPT, tokenizer: Tokenizer, examples: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tasks, "CONTEXT_CHUNK", 21)  # so that contexts and choices are read in
    monkeypatch.setattr(tasks, "CHOICE_CHUNK", 3)  # several steps
    asked = items(40)
    answers = answer(model, tokenizer, asked, examples=examples, seed=5)
    lengths = set()
    for item, one, prompt in zip(asked, answers, prompts(asked, examples, 5), strict=True):
        expected = by_one_full_pass(model, tokenizer, item, prompt)
        assert one.logprobs == pytest.approx(expected, abs=CLOSE)
        assert max(expected) - min(expected) > 100 * CLOSE  # they differ by more than is allowed
        lengths |= {len(tokenizer.encode(choice)) for choice in item.choices}
    assert len(lengths) > 5


def test_an_item_scores_the_same_alone_as_among_others(llama: GPT, tokenizer: Tokenizer):
    asked = items(30)
    together = answer(llama, tokenizer, asked)
    for item, one in zip(asked, together, strict=True):
        (alone,) = answer(llama, tokenizer, [item])
        assert alone.logprobs == pytest.approx(one.logprobs, abs=CLOSE)
    assert answer(llama, tokenizer, asked) == together


class SharedScale(torch.nn.Module):
    """A linear layer whose input is rounded to 15 steps of the largest value in all rows."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max() / 7
        rounded: torch.Tensor = self.inner((x / scale).round() * scale)
        return rounded


def test_items_are_computed_alone_where_rows_would_change_each_other(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    model = weights.build(weights.describe(folder), Placement())
    for block in model.blocks:
        block.mlp.down = SharedScale(block.mlp.down)
    asked = items(30)
    found = answer(model, tokenizer, asked)
    for item, one in zip(asked, found, strict=True):
        (alone,) = answer(model, tokenizer, [item])
        assert alone.logprobs == pytest.approx(one.logprobs, abs=CLOSE)
    monkeypatch.setattr(tasks, "APART_FP32", math.inf)
    together = answer(model, tokenizer, asked)
    gaps = [abs(x.logprobs[0] - y.logprobs[0]) for x, y in zip(found, together, strict=True)]
    assert max(gaps) > 100 * CLOSE  # else computing them together would have done no harm


def test_context_and_choice_are_read_as_one_text(llama: GPT, tokenizer: Tokenizer):
    # The context's last space belongs to the choice's first token, so it makes no difference.
    apart, joined = (
        Item(context=context, choices=("the river", "books"), answer=0)
        for context in ("Once upon a time there was", "Once upon a time there was ")
    )
    assert tokenizer.encode("was ")[-1] != tokenizer.encode("was")[-1]
    found, same = answer(llama, tokenizer, [apart, joined])
    assert found.logprobs == pytest.approx(same.logprobs, abs=CLOSE)


@pytest.mark.parametrize(
    ("context", "choice", "separator", "text"),
    [
        ("It is", "red", " ", "It is red"),
        ("It is ", "red", " ", "It is red"),
        ("It is", " red", " ", "It is red"),
        ("It is\n", "red", " ", "It is\nred"),
        ("天气", "很好", "", "天气很好"),
        ("Q: why?\nA:", "so", "\n", "Q: why?\nA:\nso"),
    ],
)
def test_texts_join_with_the_separator_where_there_is_no_space(
    context: str, choice: str, separator: str, text: str
):
    item = Item(context=context, choices=(choice, "x"), answer=0, separator=separator)
    assert item.text(choice) == text


def test_a_context_that_leaves_no_token_of_its_own_begins_as_texts_of_the_model_do(
    llama: GPT, tokenizer: Tokenizer
):
    item = Item(context="th", choices=("e", "is"), answer=0, separator="")
    assert tokenizer.encode("the") != [*tokenizer.encode("th"), *tokenizer.encode("e")]
    (found,) = answer(llama, tokenizer, [item])
    (first,) = tokenizer.eos_ids
    for choice, logprob in zip(item.choices, found.logprobs, strict=True):
        ids = [first, *tokenizer.encode("th" + choice)]
        with torch.inference_mode():
            logprobs = llama(torch.tensor([ids])).log_softmax(-1)[0]
        expected = sum(float(logprobs[at - 1, ids[at]]) for at in range(1, len(ids)))
        assert logprob == pytest.approx(expected, abs=CLOSE)


def test_a_model_that_knows_no_first_token_says_so():
    spec = gpt(1, 8, 2, context=64, vocabulary=300)
    model = weights.build_random(spec, Placement())
    merging = byte_tokenizer(300)
    merging.encode_prompt = lambda text, messages=(): [len(text)]  # type: ignore[method-assign]
    with pytest.raises(InvalidInput, match="leaves no token before its choices"):
        answer(model, merging, [Item(context="a", choices=("b", "cd"), answer=0)])


def test_nan_is_an_error_and_no_answer(folder: Path, tokenizer: Tokenizer):
    broken = weights.build(weights.describe(folder), Placement())
    broken.norm = torch.nn.RMSNorm(32)
    torch.nn.init.constant_(broken.norm.weight, math.nan)
    with pytest.raises(NumericalError, match=r"NaN or infinity for “[012] "):
        answer(broken, tokenizer, items(3))


def test_an_item_longer_than_the_context_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    short = tiny_checkpoint(tmp_path, context=32)
    model = weights.build(weights.describe(short), Placement())
    tokenizer = load_tokenizer(short)
    asked = [Item(context="a b", choices=("x", "y"), answer=0) for _ in range(1)]
    fitting = Item(context="zq" * 15, choices=("a", "b"), answer=0, separator="")
    assert len(tokenizer.encode(fitting.text("a"))) == 31
    answer(model, tokenizer, [*asked, fitting])
    full = Item(context="zq" * 16, choices=("a", "b"), answer=0, separator="")
    answer(model, tokenizer, [full])  # the last token is predicted, not read
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("computed"))
    long = Item(context="zq" * 16 + "z", choices=("a", "b"), answer=0, separator="")
    with pytest.raises(ContextOverflow, match=r"33 tokens and this model reads at most 32: short"):
        answer(model, tokenizer, [*asked, long])
    with pytest.raises(ContextOverflow, match=r"with its examples has .*: ask for fewer examples"):
        answer(model, tokenizer, [fitting, full], examples=1)


def test_progress_reaches_the_end_and_a_cancellation_is_seen(llama: GPT, tokenizer: Tokenizer):
    shares: list[float] = []
    answer(llama, tokenizer, items(40), progress=shares.append)
    assert shares == sorted(shares)
    assert len(shares) > 3
    assert shares[-1] == 1
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 60:  # 40 items are tokenized first
            raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        answer(llama, tokenizer, items(40), check=check)
    assert len(asked) == 60


# Examples


def test_examples_are_others_of_the_same_kind_answered_rightly():
    asked = (*items(8, kind="one"), *items(8, seed=1, kind="two"))
    for item, prompt in zip(asked, prompts(asked, 3, seed=0), strict=True):
        shown = prompt.split("\n\n")
        assert shown.pop() == ""
        answered = {
            one.text(one.choices[one.answer]) for one in asked if one.kind == item.kind != item
        }
        assert len(shown) == len(set(shown)) == 3
        assert set(shown) <= answered - {item.text(item.choices[item.answer])}
    assert list(prompts(asked, 0, seed=0)) == [""] * 16


def test_examples_depend_on_seed_and_item_and_not_on_the_order_of_the_items():
    asked = items(12)
    drawn = dict(zip(asked, prompts(asked, 4, seed=1), strict=True))
    turned = asked[::-1]
    assert dict(zip(turned, prompts(turned, 4, seed=1), strict=True)) == drawn
    assert dict(zip(asked, prompts(asked, 4, seed=2), strict=True)) != drawn
    assert len(set(drawn.values())) > 1


def test_every_other_item_can_be_an_example():
    asked = items(6)
    for item, prompt in zip(asked, prompts(asked, 5, seed=0), strict=True):
        others = {one.text(one.choices[one.answer]) for one in asked if one is not item}
        assert set(prompt.removesuffix("\n\n").split("\n\n")) == others


def test_too_many_examples_are_refused():
    with pytest.raises(InvalidInput, match="kind own has 2 other items: ask for at most 2"):
        list(prompts(items(3), 3, seed=0))
    with pytest.raises(InvalidInput, match="33 examples were asked for; 0 to 32"):
        list(prompts(items(40), 33, seed=0))


# What is made of the answers


def answered(*logprobs: float, right: int = 0, sizes: tuple[int, ...] = ()) -> Answered:
    return Answered("x", "own", right, logprobs, sizes or (1,) * len(logprobs))


def test_an_item_is_right_only_above_all_others():
    assert answered(-1, -2, -3).right()
    assert not answered(-2, -1, -3).right()
    assert not answered(-1, -1, -3).right()  # a tie
    assert answered(-2, -1, -3, right=1).right()
    long = answered(-4, -3, sizes=(8, 3))
    assert not long.right()
    assert long.right(normalised=True)  # -0.5 a byte against -1


def test_a_model_that_does_not_care_is_never_right(folder: Path, tokenizer: Tokenizer):
    flat = weights.build(weights.describe(folder), Placement())
    flat.head = torch.nn.Linear(32, 320, bias=False)
    torch.nn.init.zeros_(flat.head.weight)
    asked = [
        Item(context=f"{number} fox", choices=("0", "1", "2", "3"), answer=number % 4, separator="")
        for number in range(8)
    ]
    found, answers = evaluate_tasks(flat, tokenizer, asked)
    assert found.overall.accuracy.right == 0
    assert found.overall.chance_ratio == 0.25
    assert {one.logprobs for one in answers} == {answers[0].logprobs}
    assert found.overall.right_logprob_mean == pytest.approx(-math.log(320), abs=1e-5)


def test_the_report_counts_over_all_and_by_kind_with_wilson_intervals(
    llama: GPT, tokenizer: Tokenizer
):
    asked = (*items(10, kind="one"), *items(20, seed=1, kind="two"))
    found, answers = evaluate_tasks(llama, tokenizer, asked, seed=3)
    assert [one.kind for one in found.kinds] == ["one", "two"]
    assert [one.accuracy.n for one in found.kinds] == [10, 20]
    assert found.overall.accuracy.right == sum(one.accuracy.right for one in found.kinds)
    assert found.overall.accuracy.right == sum(one.right() for one in answers)
    assert found.overall.accuracy_normalised.right == sum(
        one.right(normalised=True) for one in answers
    )
    assert found.overall.chance_ratio == pytest.approx(
        sum(1 / len(item.choices) for item in asked) / 30
    )
    assert (found.examples, found.seed) == (0, 3)
    assert found.items_hash == items_hash(asked)
    assert found.tokenizer == tokenizer.identity
    for one in (found.overall, *found.kinds):
        n, share = one.accuracy.n, one.accuracy.ratio
        z = 1.959963984540054
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        assert one.accuracy.low == pytest.approx(middle - half, abs=1e-12)
        assert one.accuracy.high == pytest.approx(middle + half, abs=1e-12)


def test_flips_are_counted_each_way_with_mcnemars_exact_p():
    right, wrong = answered(-1, -2), answered(-2, -1)
    a = [right] * 30 + [wrong] * 9 + [right] * 1 + [wrong] * 5
    b = [right] * 30 + [right] * 9 + [wrong] * 1 + [wrong] * 5
    found = compare_answers(a, b)
    assert (found.both_right, found.only_a, found.only_b, found.both_wrong) == (30, 1, 9, 5)
    assert found.n == 45
    assert found.difference == pytest.approx(8 / 45)
    assert found.p == pytest.approx(2 * (1 + 10) / 2**10)
    assert found.verdict == "better"
    assert compare_answers(b, a).verdict == "worse"
    assert found.logprob_difference_mean == pytest.approx(8 / 45)
    few = compare_answers(a[:40], b[:40][:35] + a[35:40])  # 5 against 0: p = 0.0625
    assert (few.only_a, few.only_b) == (0, 5)
    assert few.verdict == "no detectable difference"


def test_a_model_against_itself_flips_nothing(llama: GPT, tokenizer: Tokenizer):
    answers = answer(llama, tokenizer, items(20))
    for normalised in (False, True):
        found = compare_answers(answers, answers, normalised=normalised)
        assert (found.only_a, found.only_b, found.p) == (0, 0, 1)
        assert (found.logprob_difference_mean, found.logprob_difference_se) == (0, 0)
        assert found.verdict == "no detectable difference"
    assert compare_answers(answers[:1], answers[:1]).logprob_difference_se is None


def test_answers_to_different_items_are_not_compared():
    one = answered(-1, -2)
    with pytest.raises(InvalidInput, match="not the same: ask both the same items"):
        compare_answers([one], [replace(one, item_id="y")])
    with pytest.raises(InvalidInput, match="A answered 2 items and B 1"):
        compare_answers([one, one], [one])


# Items of users


def test_a_users_file_is_read_in_the_format_of_what_ships(tmp_path: Path):
    file = tmp_path / "mine.jsonl"
    lines = [
        '{"context": "A fox is an", "choices": ["animal", "apple"], "answer": 0, "kind": "mine"}',
        "",
        '{"context": "Ein Fuchs ist ein", "choices": ["Tier", "Öl"], "answer": 1}',
    ]
    file.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    first, second = load_tasks(file)
    assert first == Item(
        context="A fox is an", choices=("animal", "apple"), answer=0, kind="mine", separator=" "
    )
    assert second.kind == "own"
    assert load_tasks(file.read_bytes()) == (first, second)
    assert of_kinds((first, second), ["mine"]) == (first,)
    assert of_kinds((first, second), []) == (first, second)
    with pytest.raises(InvalidInput, match="no kind 'other'; there are: mine, own"):
        of_kinds((first, second), ["other"])


def test_what_is_asked_decides_the_hash_and_not_the_order():
    one, two, three = items(3)
    assert items_hash([one, two]) == items_hash([two, one])
    changed = one.model_copy(update={"answer": (one.answer + 1) % len(one.choices)})
    hashes = {items_hash(x) for x in ([one], [two], [changed], [one, two], [one, two, three])}
    assert len(hashes) == 5
    assert all(one.startswith("sha256:") for one in hashes)


GOOD = {"context": "a", "choices": ["b", "c"], "answer": 0, "kind": "mine"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 2}, "The answer is 2, and there are 2 choices: give its place, 0 to 1."),
        ({"answer": -1}, "The answer is -1"),
        ({"answer": "0"}, "Answer is 0; it must be a whole number."),
        ({"answer": True}, "Answer is True; it must be a whole number."),
        ({"answer": 0.5}, "Answer is 0.5; it must be a whole number."),
        ({"answer": None}, "Answer is None; it must be a whole number."),
        ({"choices": ["b"]}, "There is 1 choice; give at least 2."),
        ({"choices": []}, "There is no choice; give at least 2."),
        ({"choices": ["b", " "]}, "Choice 1 is empty"),
        ({"choices": ["b", "c", "b"]}, "Choices 0 and 2 are the same."),
        ({"choices": ["b", "c" * 1001]}, "Choice 1 has 1,001 characters; the most is 1,000."),
        ({"choices": [str(n) for n in range(21)]}, "the most is 20."),
        ({"choices": "bc"}, "Choices is bc; it must be a list."),
        ({"choices": ["b", 3]}, "Choices is 3"),
        ({"context": " "}, "The context is empty"),
        ({"context": "a" * 32_001}, "Context has 32,001 characters; the most is 32,000"),
        ({"context": "a\x00"}, "NUL character"),
        ({"context": ["a"]}, "Context is ['a']"),
        ({"kind": ""}, "The kind must be a name of 1 to 40 characters."),
        ({"kind": "x" * 41}, "The kind must be a name of 1 to 40 characters."),
        ({"kind": "a\nb"}, "The kind must be a name of 1 to 40 characters."),
        ({"label": 1}, "There is no Label; there are: context, choices, answer, kind, separator."),
        ({"context": ...}, "Context is missing."),
        ({"answer": ...}, "Answer is missing."),
    ],
)
def test_a_wrong_item_is_refused_with_line_and_field(change: dict, said: str):
    wrong = {name: value for name, value in (GOOD | change).items() if value is not ...}
    text = f"{json.dumps(GOOD)}\n\n{json.dumps(wrong)}\n"
    with pytest.raises(InvalidInput) as raised:
        load_tasks(text.encode(), name="mine.jsonl")
    sentence = str(raised.value)
    assert sentence.startswith("mine.jsonl, line 3: ")
    assert said in sentence
    assert "\n" not in sentence
    assert len(sentence) < 300


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", 'mine.jsonl is empty: write one object a line, {"context": …, "choices": …'),
        (b"\n \n", "is empty"),
        (b"{", "line 1: no JSON ("),
        (b"context,answer\n", "line 1: no JSON ("),
        (b"[\n  {}\n]", "line 1: no JSON ("),
        (b"[1, 2]", 'line 1: [1, 2] is no object: write {"context"'),
        (b"null", "line 1: None is no object"),
        (b"[" * 60_000, "line 1: no JSON ("),
        (b"1" * 60_000, "line 1: no JSON ("),
        (b'{"context": "\xff"}', "line 1: byte 14 is no UTF-8: save the file as UTF-8."),
        ('{"context": "a"}'.encode("utf-16"), "mine.jsonl is UTF-16, not UTF-8 text"),
        (b"\x1f\x8b\x08", "mine.jsonl is gzip"),
        (b"PK\x03\x04", "mine.jsonl is zip"),
        (b"GGUF\x00\x00", "line 1 holds a NUL byte: it is no text file."),
        (b'{"context": "' + b"a" * 70_000, "line 1 is longer than 64 KiB"),
        (b'{"context": "\\ud800", "choices": ["a", "b"], "answer": 0}', "line 1: no JSON ("),
        (b"\n" * 10_001, "has more than 10,000 lines: split it."),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes, said: str):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(content)
    with pytest.raises(InvalidInput) as raised:
        load_tasks(file)
    sentence = str(raised.value)
    assert said in sentence
    assert sentence.startswith("mine.jsonl")
    assert "\n" not in sentence
    assert len(sentence) < 300
    with pytest.raises(InvalidInput) as again:
        load_tasks(content, name="mine.jsonl")
    assert str(again.value) == sentence


def test_an_item_that_stands_there_twice_is_refused(tmp_path: Path):
    turned = GOOD | {"choices": ["c", "b"], "answer": 1}
    text = f"{json.dumps(GOOD)}\n{json.dumps(turned)}".encode()
    with pytest.raises(InvalidInput, match="mine, line 2 asks the same as mine, line 1: remove"):
        load_tasks(text, name="mine")
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(GOOD))
    with pytest.raises(InvalidInput, match=r"b\.jsonl, line 1 asks the same as a\.jsonl, line 1"):
        load_tasks(tmp_path)


def test_what_is_no_file_or_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InvalidInput, match=r"absent\.jsonl cannot be read: No such file"):
        load_tasks(tmp_path / "absent.jsonl")
    with pytest.raises(InvalidInput, match="cannot be read: "):
        load_tasks(tmp_path / "nul\x00.jsonl")
    with pytest.raises(InvalidInput, match=r"holds no \.jsonl file"):
        load_tasks(tmp_path)
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(InvalidInput, match=r"large\.jsonl has 65 MiB; at most 64 are read"):
        load_tasks(large)
    large.unlink()
    for name in ("a.jsonl", "b.jsonl"):
        lines = [json.dumps(GOOD | {"context": f"{name} {number}"}) for number in range(6)]
        (tmp_path / name).write_text("\n".join(lines))
    assert len(load_tasks(tmp_path)) == 12
    monkeypatch.setattr(tasks, "MAX_LINES", 11)
    with pytest.raises(InvalidInput, match="There are more than 11 items"):
        load_tasks(tmp_path)
    monkeypatch.setattr(jsonl, "MAX_LINES", 5)
    with pytest.raises(InvalidInput, match=r"a\.jsonl has more than 5 lines"):
        load_tasks(tmp_path)


def test_no_item_is_refused(llama: GPT, tokenizer: Tokenizer):
    with pytest.raises(InvalidInput, match="There is no item"):
        answer(llama, tokenizer, [])


# The real model


@pytest.mark.smollm2
@pytest.mark.slow
def test_smollm2_beats_chance_on_every_kind_and_reads_with_a_cache_as_without(smollm2_gguf: Path):
    checkpoint = weights.describe(smollm2_gguf)
    model = weights.build(checkpoint, Placement())
    tokenizer = load_tokenizer(checkpoint.directory)
    asked = shipped_tasks()[::3]
    found, answers = evaluate_tasks(model, tokenizer, asked)
    for kind in found.kinds:
        assert kind.accuracy.low > kind.chance_ratio, kind
    assert found.overall.accuracy.ratio > 0.7
    for item, one in list(zip(asked, answers, strict=True))[::18]:
        expected = by_one_full_pass(model, tokenizer, item, "")
        assert one.logprobs == pytest.approx(expected, abs=CLOSE)
