"""Batches, shards, and going on where a writer was stopped."""

import json
import lzma
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptcore import weights
from gptcore.corpus import quantized
from gptcore.corpus.join import join
from gptcore.corpus.shards import (
    PENDING,
    SHARES,
    Batch,
    Ledger,
    Text,
    part_of,
    read_shard,
    shard_files,
    texts,
)
from gptcore.corpus.sheet import page, sheet
from gptcore.corpus.teacher import Continuation, common_prefix, draw, write_batch
from gptcore.corpus.write import Plan, all_batches, batches, sifted, write
from gptcore.device import Placement
from gptcore.engine import Engine
from gptcore.errors import Cancelled, InvalidInput, StoreError
from gptcore.model import GPT
from gptcore.records import Request, Sampling
from gptcore.tokenizer import Tokenizer, load_tokenizer
from tests.corpus.test_prompts_and_filters import GOOD
from tests.tiny import tiny_checkpoint

HOT = Sampling(temperature=1.0, top_k=64)
PLAN = Plan(batch=6, round=400, max_new_tokens=16, end_after=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Tokenizer]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("tiny"), context=2048, scale=0.3)
    model = weights.build(weights.describe(folder), Placement(precision="fp32"))
    return model, load_tokenizer(folder)


def written(model: GPT, prompts: list[list[int]], **changes: object) -> list[Continuation]:
    given = {"sampling": HOT, "end_ids": ENDS, "max_new_tokens": 24} | changes
    seeds = [sum(prompt) for prompt in prompts]
    return write_batch(model, prompts, seeds, **given)


ENDS = frozenset(range(2, 320, 20))
"""Many, so that a random model ends now and then."""
PROMPTS = [[5, 6, 7, 8 + n, 9, 30 + n] for n in range(7)]


def test_a_text_does_not_depend_on_its_neighbours(teacher: tuple[GPT, Tokenizer]) -> None:
    together = written(teacher[0], PROMPTS)
    alone = [written(teacher[0], [prompt])[0] for prompt in PROMPTS]
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert [one.logprob for one in together] == pytest.approx([one.logprob for one in alone])
    assert len({len(one.ids) for one in together}) > 1  # some ended, and left the batch


def test_the_likeliest_text_is_that_of_the_engine(teacher: tuple[GPT, Tokenizer]) -> None:
    model, tokenizer = teacher
    prompt = tokenizer.encode("Once upon a time")
    likeliest = Sampling(temperature=1.0, top_k=1)
    (mine,) = written(model, [prompt], sampling=likeliest, end_ids=frozenset())
    request = Request(
        prompt="Once upon a time", temperature=0.0, max_new_tokens=24, ignore_eos=True
    )
    tokens = list(Engine(model, tokenizer).start(request))
    assert mine.ids == [token.id for token in tokens]
    assert mine.logprob == pytest.approx(sum(token.logprob for token in tokens), rel=1e-4)


def test_the_end_is_favoured_more_and_more(teacher: tuple[GPT, Tokenizer]) -> None:
    """One end among 320 tokens, so that a text left alone is some hundreds of tokens long."""

    def tokens(end_after: int | None) -> int:
        found = written(
            teacher[0],
            [[*PROMPTS[0][:-1], last] for last in range(40, 56)],
            max_new_tokens=240,
            end_ids=frozenset({22}),
            end_after=end_after,
        )
        return sum(len(one.ids) for one in found)

    soon, late, never = tokens(0), tokens(100), tokens(None)
    assert soon < late < never
    assert soon < 0.8 * never


def test_the_repetition_penalty_lowers_what_was_written(teacher: tuple[GPT, Tokenizer]) -> None:
    def different(penalty: float) -> float:
        sampling = Sampling(temperature=0.3, top_k=64, repetition_penalty=penalty)
        found = written(teacher[0], PROMPTS, sampling=sampling, end_ids=frozenset())
        return sum(len(set(one.ids)) / len(one.ids) for one in found)

    assert different(2.0) > different(1.0)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).repeat(4000, 1)
    randoms = [(n + 0.5) / 4000 for n in range(4000)]
    nothing = torch.zeros_like(logits, dtype=torch.bool), torch.tensor([3]), 0.0
    ids, logprobs = draw(logits, Sampling(temperature=1.0), randoms, *nothing)
    counts = torch.bincount(ids, minlength=4) / 4000
    assert counts == pytest.approx(logits[0].softmax(0), abs=1e-3)
    assert logprobs == pytest.approx(logits[0].log_softmax(0)[ids])
    ids, _ = draw(logits, Sampling(temperature=1.0, min_p=0.3), randoms, *nothing)
    assert set(ids.tolist()) == {0, 1}
    ids, _ = draw(logits, Sampling(temperature=1.0, top_k=1), randoms, *nothing)
    assert set(ids.tolist()) == {0}


def test_the_common_prefix_leaves_one_token_to_read() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix([[1, 2], [3, 2]]) == 0


def test_a_teacher_in_8_bits_stays_near_and_its_texts_do_not_touch_each_other(
    teacher: tuple[GPT, Tokenizer], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path, scale=0.3)
    exact = weights.build(weights.describe(folder), Placement())
    ids = torch.arange(60).view(6, 10)
    whole = exact(ids)
    near = quantized.quantize(exact)
    logits = near(ids)
    assert (logits - whole).abs().mean() < 0.05 * whole.std()
    assert torch.allclose(near(ids[:1]), logits[:1], atol=1e-4)


def test_batches_hold_prompts_of_one_kind_and_length_and_every_one_once(
    teacher: tuple[GPT, Tokenizer],
) -> None:
    found = batches(PLAN, 0, teacher[1])
    numbers = [one.prompt.number for batch in found for one in batch]
    assert len(set(numbers)) == len(numbers) > 80
    assert max(numbers) < PLAN.round
    for batch in found:
        assert len({(one.prompt.kind, len(one.ids), one.example) for one in batch}) == 1
    assert batches(PLAN, 1, teacher[1])[0][0].prompt.number >= PLAN.round


def test_batches_can_be_counted_on_from_anywhere(teacher: tuple[GPT, Tokenizer]) -> None:
    first = len(batches(PLAN, 0, teacher[1]))
    late = next(all_batches(PLAN, teacher[1], first + 2))
    assert late == batches(PLAN, 1, teacher[1])[2]


def text(number: int, words: str = "word") -> Text:
    return Text(
        text=f"{GOOD} {words} {number}.",
        kind="tale",
        prompt="Write.",
        opening="",
        number=number,
        example=0,
        seed=number,
        whole=True,
        tokens=80,
        mean_logprob=-1.5,
    )


def batch(number: int, count: int = 3) -> Batch:
    return Batch(number, tuple(text(100 * number + n) for n in range(count)), {"length": 1})


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {"teacher": "a"})
    ledger.add(batch(0))
    ledger.close()
    ledger.add(batch(1))
    again = Ledger(tmp_path, {"teacher": "a"})
    assert again.next_batch == 2
    assert again.seen_texts == [one.text for n in (0, 1) for one in batch(n).texts]
    again.close()
    shards = [read_shard(file) for file in shard_files(tmp_path)]
    assert [(one.first, one.last) for one in shards] == [(0, 0), (1, 1)]
    assert shards[1].texts == batch(1).texts
    assert shards[0].refused == {"length": 1}
    assert not (tmp_path / PENDING).exists()


def test_a_shard_is_closed_when_it_is_full_and_never_touched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptcore.corpus.shards.SHARD_CHARS", 1000)
    ledger = Ledger(tmp_path, {})
    assert ledger.add(batch(0, 1)) is None
    first = ledger.add(batch(1))
    assert first is not None
    before = first.read_bytes(), first.stat().st_mtime_ns
    assert ledger.add(batch(2, 5)) is not None
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    assert len(shard_files(tmp_path)) == 2


def test_a_killed_writer_loses_its_batch_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {})
    ledger.add(batch(0))
    ledger.add(batch(1))
    pending = tmp_path / PENDING
    pending.write_bytes(pending.read_bytes()[:-50])
    again = Ledger(tmp_path, {})
    assert again.next_batch == 1
    again.add(batch(1))
    assert Ledger(tmp_path, {}).next_batch == 2


def test_a_writer_killed_behind_its_shard_keeps_each_text_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {})
    ledger.add(batch(0))
    pending = (tmp_path / PENDING).read_bytes()
    ledger.close()
    (tmp_path / PENDING).write_bytes(pending)
    again = Ledger(tmp_path, {})
    assert again.next_batch == 1
    assert len(again.seen_texts) == 3
    again.add(batch(1))
    again.close()
    assert len(list(texts(tmp_path))) == 6


def test_what_was_made_otherwise_gets_a_shard_of_its_own(tmp_path: Path) -> None:
    Ledger(tmp_path, {"teacher": "a"}).add(batch(0))
    later = Ledger(tmp_path, {"teacher": "b"})
    assert later.next_batch == 1
    later.add(batch(1))
    later.close()
    shards = [read_shard(file) for file in shard_files(tmp_path)]
    assert [one.recipe["teacher"] for one in shards] == ["a", "b"]
    assert [(one.first, one.last) for one in shards] == [(0, 0), (1, 1)]


def test_texts_of_other_folders_join_with_their_own_recipe_and_none_twice(tmp_path: Path) -> None:
    def told(number: int, *names: str) -> Batch:
        return Batch(
            number, tuple(replace(text(0), text=name * 9) for name in names), {"length": 1}
        )

    here, one, two = (tmp_path / name for name in ("here", "one", "two"))
    Ledger(here, {"seed": 1}).add(told(0, "ant ", "bee "))
    Ledger(one, {"seed": 2}).add(told(0, "ant ", "cow ", "bee "))
    second = Ledger(two, {"seed": 3})
    second.add(told(0, "dog "))
    second.close()
    second.add(told(1, "eel ", "fox "))
    done = join(here, [one, two])
    assert (done.texts, done.refused) == (4, {"duplicate": 2})
    shards = [read_shard(file) for file in shard_files(here)]
    assert [shard.recipe["seed"] for shard in shards] == [1, 2, 3, 3]
    assert shards[1].refused == {"length": 1, "duplicate": 2}
    assert sorted(found.text[:3] for found in texts(here)) == [
        "ant",
        "bee",
        "cow",
        "dog",
        "eel",
        "fox",
    ]
    again = join(here, [two])
    assert (again.texts, again.shards) == (0, ())


def test_what_cannot_join_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for other, reason in (("", "itself"), ("nowhere", "no folder"), ("empty", "no texts")):
        with pytest.raises(InvalidInput, match=reason):
            join(tmp_path, [tmp_path / other])


def cut(content: bytes) -> bytes:
    return content[:-40]


def one_text_less(content: bytes) -> bytes:
    lines = lzma.decompress(content).splitlines(keepends=True)
    return lzma.compress(b"".join(lines[:-1]))


def of_tomorrow(content: bytes) -> bytes:
    head, *rest = lzma.decompress(content).splitlines(keepends=True)
    later = json.dumps(json.loads(head) | {"format": 99}).encode() + b"\n"
    return lzma.compress(b"".join([later, *rest]))


@pytest.mark.parametrize("damage", [cut, one_text_less, of_tomorrow, lambda content: b"no xz"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    ledger = Ledger(tmp_path, {})
    ledger.add(batch(0))
    file = ledger.close()
    assert file is not None
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InvalidInput, match=r"0001\.jsonl\.xz cannot be read"):
        read_shard(file)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        Ledger(tmp_path / "file" / "corpus", {})


def test_no_corpus_is_said_with_the_way_to_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="corpus write"):
        list(texts(tmp_path))
    with pytest.raises(InvalidInput, match="corpus write"):
        sheet(tmp_path)


def test_parts_are_shares_of_all_texts_and_follow_from_the_text_alone() -> None:
    found = Counter(part_of(f"text {n}") for n in range(20_000))
    for part, share in SHARES.items():
        assert found[part] / 20_000 == pytest.approx(share / 100, abs=0.01)
    assert part_of("text 1") == part_of("text 1")


def test_a_stopped_writer_goes_on_to_the_same_texts(
    teacher: tuple[GPT, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model writes nothing that the filters keep.
    monkeypatch.setattr("gptcore.corpus.write.refused", lambda text, kind, written: None)
    monkeypatch.setattr("gptcore.corpus.write.whole_sentences", lambda text: text)
    model, tokenizer = teacher

    def go(folder: Path, upto: int, breaths: int | None = None) -> None:
        left = [breaths]

        def breathe() -> None:
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    raise Cancelled("Stopped.")

        ledger = Ledger(folder, {})
        write(
            model, tokenizer, PLAN, ledger, enough=lambda done: done.batch >= upto, breathe=breathe
        )

    go(tmp_path / "straight", 4)
    with pytest.raises(Cancelled):
        go(tmp_path / "stopped", 4, breaths=25)
    stopped_at = Ledger(tmp_path / "stopped", {}).next_batch
    assert 0 < stopped_at < 4
    go(tmp_path / "stopped", 4)
    straight, again = (Ledger(tmp_path / name, {}).seen_texts for name in ("straight", "stopped"))
    assert again == straight
    assert len(straight) > 8


def test_what_is_refused_is_counted(teacher: tuple[GPT, Tokenizer]) -> None:
    from gptcore.corpus.duplicates import Seen

    asked = batches(PLAN, 0, teacher[1])[0]
    silent = [Continuation(ids=[], logprob=-1.0, ended=True) for _ in asked]
    found, reasons = sifted(asked, silent, teacher[1], Seen())
    assert found == ()
    assert reasons.total() == len(asked)


def test_the_sheet_counts_what_is_there(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {"teacher": "someone", "plan": {"seed": 1}})
    ledger.add(batch(0, 40))
    ledger.add(batch(1, 20))
    ledger.close()
    found = sheet(tmp_path)
    assert found.total.texts == 60
    assert found.total.words == sum(len(one.text.split()) for one in texts(tmp_path))
    assert sum(one.texts for one in found.parts.values()) == 60
    assert found.parts["train"].texts == len(list(texts(tmp_path, "train")))
    assert found.refused == {"length": 2}
    assert found.logprob_quantiles == (-1.5, -1.5, -1.5)
    shown = page(found)
    assert "60 texts" in shown
    assert "Of 62 written texts 60 were kept" in shown
    assert "teacher: someone" in shown
