"""Settings as the query of an address, and back; a value that is not allowed is said, not used."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from pydantic import BaseModel, TypeAdapter, ValidationError

from gptcore.device import Placement
from gptcore.records import Message, Request, checked_text
from pages.parts import errors

MAX_LINK_CHARS = 16_000
"""What every browser, proxy and server takes; a longer text is shown by its run instead."""
MAX_ADDRESS_TEXT = 2_000
"""Characters of a prompt that still go into the address bar while somebody works."""
MAX_CHAT_BYTES = 4 * 2**20
CHOICES = {
    "precision": ("fp32", "bf16", "fp16", "int8", "int4"),
    "mode": ("chat", "completion"),
}
PLACED = ("device", "threads")
ASKED = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "max_new_tokens",
    "ignore_eos",
    "overflow",
)
NAMES = frozenset({"model", *CHOICES, *PLACED, *ASKED, "stop", "prompt", "messages", "forced_ids"})
"""What a link may tell; every name is a field of Settings."""

Query = dict[str, list[str]]
_messages = TypeAdapter(tuple[Message, ...])


def full(settings: Mapping[str, Any]) -> Query:
    """Return every setting as a query; a version with other defaults reads it the same way.

    Args:
        settings: the fields of Settings as JSON-able values.
    """
    found = {name: [_text(settings[name])] for name in ("model", *CHOICES, *PLACED, *ASKED)}
    if settings["stop"]:
        found["stop"] = list(settings["stop"])
    if settings["prompt"]:
        found["prompt"] = [settings["prompt"]]
    if settings["messages"]:
        found["messages"] = [pack(settings["messages"])]
    if settings["forced_ids"]:
        found["forced_ids"] = [",".join(map(str, settings["forced_ids"]))]
    return found


def short(settings: Mapping[str, Any], default: Mapping[str, Any]) -> Query:
    """Return the settings that are not the default, and the seed: what the address bar shows.

    A text that is too long for an address, or holds what is no text, is left out.
    """
    found = {
        name: value
        for name, value in full(settings).items()
        if name == "seed" or settings[name] != default[name]
    }
    for name in ("prompt", "messages", "stop", "forced_ids"):
        if name in found and not all(map(_fits, found[name])):
            del found[name]
    return found


def link(base: str, settings: Mapping[str, Any]) -> str | None:
    """Return the address that restores every setting and writes the text once, or None.

    Args:
        base: the address of the playground, without a query.
        settings: the fields of Settings as JSON-able values.
    """
    made = f"{base}?{urlencode({**full(settings), 'play': ['1']}, doseq=True)}"
    return made if len(made) <= MAX_LINK_CHARS else None


def read(
    given: Mapping[str, Sequence[str]], base: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return settings and a sentence for each value that was not allowed.

    Args:
        given: the query: all values of each name; names that are no setting are ignored.
        base: the fields of Settings to use where the query tells nothing usable.
    """
    values, problems = dict(base), []
    for name in sorted(NAMES & set(given)):
        try:
            values[name] = _parsed(name, given[name])
        except ValidationError as error:
            problems.append(_instead(errors.sentence(error), name, base[name]))
        except ValueError as error:
            problems.append(_instead(str(error), name, base[name]))
    return values, problems


def pack(value: Any) -> str:
    """Return JSON-able values, such as a chat, as a short text that is safe in an address."""
    plain = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    squeezed = zlib.compress(plain.encode("utf-8", "surrogatepass"), 9)
    return base64.urlsafe_b64encode(squeezed).decode().rstrip("=")


def unpacked(text: str) -> bytes:
    """Return the JSON that ``pack`` was given.

    Raises:
        ValueError: it is damaged, or longer than any chat.
    """
    try:
        squeezed = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        unfold = zlib.decompressobj()
        plain = unfold.decompress(squeezed, MAX_CHAT_BYTES)
    except (binascii.Error, zlib.error, UnicodeEncodeError):
        raise ValueError("This part of the link is damaged.") from None
    if unfold.unconsumed_tail:
        raise ValueError(f"This part of the link is longer than {MAX_CHAT_BYTES:,} bytes.")
    if not unfold.eof:
        raise ValueError("This part of the link is damaged.")
    return plain


def unpack(text: str) -> list[dict[str, Any]]:
    """Return the turns of a chat from ``pack``.

    Raises:
        ValueError: it is damaged, or longer than any chat.
    """
    try:
        turns = _messages.validate_json(unpacked(text))
    except ValidationError:
        raise ValueError("The chat of this link is damaged.") from None
    return [turn.model_dump(mode="json") for turn in turns]


def _parsed(name: str, texts: Sequence[str]) -> Any:
    text = texts[-1]
    if name == "stop":
        return list(_checked(Request, "stop", list(texts)))
    if name == "messages":
        return unpack(text)
    if name == "forced_ids":
        return list(_checked(Request, name, text.split(",")))
    if name == "prompt":
        return text
    if name == "model":
        if not text or len(text) > 100:
            raise ValueError(f"Model is {errors.brief(text)}; a name has 1 to 100 characters.")
        return checked_text(text, "model")
    if name in CHOICES:
        if text not in CHOICES[name]:
            among = ", ".join(CHOICES[name])
            raise ValueError(f"{name.capitalize()} is {errors.brief(text)}; there are: {among}.")
        return text
    return _checked(Placement if name in PLACED else Request, name, text)


def _checked(owner: type[BaseModel], name: str, value: Any) -> Any:
    whole: dict[str, Any] = {name: value}
    if owner is Request:
        whole["prompt"] = "-"
    return getattr(owner.model_validate(whole), name)


def _instead(problem: str, name: str, used: Any) -> str:
    if name in ("stop", "messages", "prompt", "forced_ids"):
        return f"{problem.rstrip('.')}; it is left out."
    return f"{problem.rstrip('.')}; {_text(used)} is used instead."


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _fits(text: str) -> bool:
    if len(text) > MAX_ADDRESS_TEXT:
        return False
    try:
        checked_text(text, "text")
    except ValueError:
        return False
    return True
