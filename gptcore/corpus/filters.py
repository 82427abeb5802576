"""What a text must be to enter the corpus, and the small repairs before it is looked at."""

from __future__ import annotations

import re
from collections import Counter

from gptcore.corpus.teacher import Continuation

PLAIN = str.maketrans(
    {
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{EN DASH}": "-",
        "\N{EM DASH}": " - ",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{NO-BREAK SPACE}": " ",
    }
)
LEAST_WORDS, MOST_WORDS = 35, 260
LEAST_SENTENCES = 3
LEAST_LOGPROB, MOST_LOGPROB = -2.2, -0.35
"""Mean a token: below, the teacher itself finds the text strange; above, it recites."""
MOST_REPEATED = 0.12
"""Share of the runs of four words that occurred before in the text."""
LEAST_COMMON = 0.3
"""Share of words that are among ``COMMON``."""
COMMON_TEXT = (
    "a about after all also always an and are as asked at away back be because been before began "
    "but by came can could day did do down each even every first for from go had has have he her "
    "him his home how i if in into is it its just know like little long looked made make many me "
    "more most my never new no not now of off on one only or other our out over people said saw "
    "see she small so some something take than that the their them then there these they thing "
    "things this time to together told too two until up us very was we went were what when where "
    "which while who why will with world would you your"
)
COMMON = frozenset(COMMON_TEXT.split())
FOREIGN = re.compile(
    r"<\||\||\[|\]|\*\*|##|```|https?:|_{2,}|\{|\}|&\w+;|\\|<[a-z/]|"
    r"^\s*(?:[-*•]|\d+[.)])\s|\b(?:as an ai|language model|smollm|hugging face|word count)\b",
    re.IGNORECASE | re.MULTILINE,
)
PREAMBLE = re.compile(
    r"(?:here(?:'s| is)|sure|certainly|title|the tale|this tale)\b", re.IGNORECASE
)
COMMENT = re.compile(
    r"\b(?:this (?:tale|story|scene|paragraph|dialogue|conversation)|the (?:tale|scene|"
    r"dialogue) (?:is|ends|shows|highlights)|simple words|the (?:story|tale) of)\b",
    re.IGNORECASE,
)
"""The teacher talks about the text instead of writing it."""
SENTENCE_END = re.compile(r"[.!?][\"')]*(?=\s|\Z)")
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def cleaned(text: str) -> str:
    """Return ``text`` with plain quotes and dashes, and no more space than it needs."""
    lines = [re.sub(r"[ \t]+", " ", line).strip() for line in text.translate(PLAIN).splitlines()]
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip()


def whole_sentences(text: str) -> str:
    """Return a text that broke off up to the end of its last whole sentence, empty without one."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def words(text: str) -> list[str]:
    """Return the words of ``text`` in lower case."""
    return WORD.findall(text.lower())


def refused(text: str, kind: str, written: Continuation) -> str | None:
    """Return why a cleaned text is refused, in two or three words, or None."""
    if not text:
        return "no end"
    if not written.ids or not LEAST_LOGPROB <= written.mean_logprob <= MOST_LOGPROB:
        return "likelihood"
    found = words(text)
    if not LEAST_WORDS <= len(found) <= MOST_WORDS:
        return "length"
    if len(SENTENCE_END.findall(text)) < LEAST_SENTENCES or not _closed(text):
        return "no proper end"
    if FOREIGN.search(text) or sum(not " " <= one <= "~" and one != "\n" for one in text):
        return "foreign marks"
    lines = text.splitlines()
    if PREAMBLE.match(text) or not all(map(_complete, lines)):
        return "title or preamble"
    if kind != "explanation" and COMMENT.search(text):
        return "speaks of itself"
    if not (text[0].isupper() or text[0] == '"'):
        return "no proper beginning"
    if repeated(found) > MOST_REPEATED or _repeats_a_sentence(text):
        return "repetition"
    if sum(one in COMMON for one in found) < LEAST_COMMON * len(found):
        return "strange words"
    return None


def repeated(found: list[str], run: int = 4) -> float:
    """Return the share of runs of so many words that occurred before."""
    runs = Counter(zip(*(found[i:] for i in range(run)), strict=False))
    total = sum(runs.values())
    return 1 - len(runs) / total if total else 0.0


def _closed(text: str) -> bool:
    if text.count('"') % 2:
        return False
    return bool(re.search(r"[.!?][\"')]*$", text))


def _complete(line: str) -> bool:
    return not line or line[-1] in ".!?:,;\"')-"


def _repeats_a_sentence(text: str) -> bool:
    sentences = [" ".join(words(one)) for one in SENTENCE_END.split(text)]
    long = [one for one in sentences if one.count(" ") >= 3]
    return len(set(long)) < len(long)
