"""Prompt number n of a seed: a template filled from ``tables``, and the words that open its answer.

A prompt is a function of seed and number alone, so that a corpus can be continued anywhere and no
list has to be kept.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gptcore.corpus import tables

OPENED = 0.7
"""Share of the tales whose first words are given; the teacher begins the rest as it likes."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the teacher is asked."""

    number: int
    kind: str
    text: str
    opening: str
    """The first words of the answer, empty where the teacher chooses them."""
    seed: int
    """Of the draws of this text."""


def prompt(seed: int, number: int) -> Prompt:
    """Return prompt ``number`` of ``seed``."""
    dice = random.Random(f"{seed}:{number}")
    kind = dice.choices(tuple(KINDS), weights=[weight for weight, _ in KINDS.values()])[0]
    text, opening = KINDS[kind][1](dice)
    return Prompt(number, kind, text, opening, dice.getrandbits(48))


def prompts_id() -> str:
    """Return 16 hexadecimal digits over tables and templates."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in ("tables.py", "examples.py", "prompts.py"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def _tale(dice: random.Random) -> tuple[str, str]:
    who, place, event = map(dice.choice, (tables.CHARACTERS, tables.PLACES, tables.EVENTS))
    mood, ending, thing = map(dice.choice, (tables.MOODS, tables.ENDINGS, tables.OBJECTS))
    name, other = dice.sample(tables.NAMES, 2)
    text = dice.choice(
        (
            f"Write a short tale about {who} named {name} who {event}.",
            f"Write a short tale about {who} named {name} who {event}. It ends {ending}.",
            f"Write a {mood} tale about {who} named {name} {place}.",
            f"Write a {mood} tale about {name} and {other} {place}.",
            f"Write a {mood} tale about {who} named {name} and {thing}.",
            f"Write a short tale {place}: {name}, {who}, {event}.",
            f"Write a short tale about {name}, {who}, and {other}. It ends {ending}.",
        )
    )
    opening = ""
    if dice.random() < OPENED:
        opening = dice.choice(tables.OPENINGS).format(who=who, name=name, other=other, place=place)
    return text, opening


def _explanation(dice: random.Random) -> tuple[str, str]:
    subject, listener = dice.choice(tables.SUBJECTS), dice.choice(tables.LISTENERS)
    text = dice.choice(
        (
            f"Explain {subject} to {listener}.",
            f"Explain {subject}. {dice.choice(tables.MANNERS)}",
            f"Explain {subject} to {listener}. {dice.choice(tables.MANNERS)}",
        )
    )
    return text, dice.choice(tables.EXPLAINED)


def _scene(dice: random.Random) -> tuple[str, str]:
    who, place, event = map(dice.choice, (tables.CHARACTERS, tables.PLACES, tables.EVENTS))
    name, other = dice.sample(tables.NAMES, 2)
    thing = dice.choice(tables.OBJECTS)
    text = dice.choice(
        (
            f"Write a short scene {place} in which {name}, {who}, talks with {other}.",
            f"Write a short scene in which {name}, {who}, talks with {other}. {name} {event}.",
            f"Write a short scene in which {name} and {other} talk about {thing}.",
        )
    )
    said = dice.choice(("Look", "Good morning", "Listen", "I have a question", "Come here"))
    return text, dice.choice((f'"{said}, {other}," said {name}', f"{name} looked at {other}", ""))


KINDS: dict[str, tuple[int, Callable[[random.Random], tuple[str, str]]]] = {
    "tale": (76, _tale),
    "explanation": (12, _explanation),
    "scene": (12, _scene),
}
"""Name: (share in percent, what makes one)."""
