"""Text to token ids and back, and the chat template between. Imports no torch.

Special tokens that a user types are text: only a chat template, which belongs to the model, may
write control tokens. Templates run in jinja2's immutable sandbox.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from gptcore.errors import InvalidInput, InvalidWeights
from gptcore.records import Message

MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_TEMPLATE_CHARS = 100_000
MAX_RENDERED_CHARS = 4_000_000
SENTINEL = 0xF0000
"""First code point of a private-use plane; stands for a special token that a user typed."""


class TextStream:
    """Turns ids into text one at a time; a character that spans tokens comes with its last one."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0
        self._begin = 0

    def push(self, id: int) -> str:
        """Return the characters that this token completes."""
        self._ids.append(id)
        before = self._decode(self._ids[self._begin : self._shown])
        text = self._decode(self._ids[self._begin :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(before):
            return ""
        # A window of one shown token keeps the context that some tokenizers need for spaces.
        self._begin, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """Return what is left of an unfinished character, as the replacement character."""
        before = self._decode(self._ids[self._begin : self._shown])
        text = self._decode(self._ids[self._begin :])
        self._begin = self._shown = len(self._ids)
        return text[len(before) :]


class Tokenizer:
    """Text to ids and back.

    Attributes:
        vocabulary: number of ids.
        eos_ids: ids after which a text is over.
        chat_template: a jinja2 template, or None for a model that knows no chat.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: frozenset[int] = frozenset(),
        chat_template: str | None = None,
        names: dict[str, str] | None = None,
    ) -> None:
        fast.encode_special_tokens = True
        self._fast = fast
        self.vocabulary = int(fast.get_vocab_size())
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.chat_template = chat_template
        self._names = names or {}
        added = fast.get_added_tokens_decoder().values()
        self._specials = sorted((t.content for t in added if t.special), key=len, reverse=True)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; a special token in it is text, not control."""
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens written out."""
        return str(self._fast.decode(list(ids), skip_special_tokens=False))

    def token_text(self, id: int) -> str:
        """Return one token as text; bytes that are no character alone are replaced."""
        return self.decode([id])

    def stream(self) -> TextStream:
        """Return a decoder for one text."""
        return TextStream(self.decode)

    def encode_prompt(self, prompt: str, messages: Sequence[Message] = ()) -> list[int]:
        """Return the ids of a prompt, or of a chat through the model's own template.

        Raises:
            InvalidInput: a chat for a model that has no template, or the template refuses it.
        """
        if not messages:
            return self.encode(prompt)
        if self.chat_template is None:
            raise InvalidInput("This model knows no chat: use completion.")
        typed = "".join(message.content for message in messages)
        masks = {
            special: chr(SENTINEL + at)
            for at, special in enumerate(self._specials)
            if special in typed
        }
        text = render(
            self.chat_template,
            messages=[
                {"role": one.role, "content": replaced(one.content, masks)} for one in messages
            ],
            **self._names,
        )
        ids: list[int] = []
        for piece, control in split(text, self._specials):
            if control:
                ids.append(int(self._fast.token_to_id(piece)))
            elif piece:
                ids += self.encode(replaced(piece, {mask: one for one, mask in masks.items()}))
        return ids


def replaced(text: str, table: dict[str, str]) -> str:
    """Return ``text`` with every key of ``table`` replaced."""
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def split(text: str, specials: Sequence[str]) -> list[tuple[str, bool]]:
    """Return ``text`` in pieces, each with whether it is one of ``specials``."""
    import re

    if not specials:
        return [(text, False)]
    pattern = re.compile("(" + "|".join(map(re.escape, specials)) + ")")
    return [(piece, at % 2 == 1) for at, piece in enumerate(pattern.split(text))]


def render(template: str, **values: Any) -> str:
    """Return a chat template's text, rendered in the immutable sandbox.

    Raises:
        InvalidInput: the template fails, refuses the chat, or writes too much.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise InvalidInput(
            f"The chat template has {len(template):,} characters; at most "
            f"{MAX_TEMPLATE_CHARS:,} are rendered."
        )

    def refuse(sentence: str) -> None:
        raise jinja2.TemplateError(sentence)

    try:
        text = _compiled(template).render(
            add_generation_prompt=True, raise_exception=refuse, **values
        )
    except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"The model's chat template refuses this chat: {error}.") from None
    if len(text) > MAX_RENDERED_CHARS:
        raise InvalidInput(f"The chat has {len(text):,} characters after its template; shorten it.")
    return str(text)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return sandbox.from_string(template)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a Hugging Face directory.

    Raises:
        InvalidWeights: ``tokenizer.json`` is missing, damaged or too large.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise InvalidWeights(f"{directory.name} has no tokenizer.json: add the model's own.")
    if file.stat().st_size > MAX_TOKENIZER_BYTES:
        raise InvalidWeights(f"{file.name} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB.")
    try:
        fast = FastTokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise InvalidWeights(f"{directory.name}/tokenizer.json cannot be read: {error}.") from None
    fast.no_padding()
    fast.no_truncation()
    settings = read_json(directory / "tokenizer_config.json")
    config = read_json(directory / "config.json") | read_json(directory / "generation_config.json")
    names = {
        name: text
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := token_name(settings.get(name))) is not None
    }
    template = settings.get("chat_template")
    if not template and (directory / "chat_template.jinja").is_file():
        template = (directory / "chat_template.jinja").read_text()
    ends = config.get("eos_token_id")
    eos_ids = {one for one in (ends if isinstance(ends, list) else [ends]) if isinstance(one, int)}
    if (named := fast.token_to_id(names.get("eos_token", ""))) is not None:
        eos_ids.add(int(named))
    bos = fast.token_to_id(names.get("bos_token", ""))
    return Tokenizer(
        fast,
        bos_id=bos,
        eos_ids=frozenset(eos_ids),
        chat_template=template if isinstance(template, str) else None,
        names=names,
    )


def token_name(value: Any) -> str | None:
    """Return a special token's text from either form in which configs keep it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object, empty where the file is missing.

    Raises:
        InvalidWeights: the file is damaged.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidWeights(f"{file.parent.name}/{file.name} is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidWeights(f"{file.parent.name}/{file.name} holds no JSON object.")
    return value


class ByteTokenizer(Tokenizer):
    """For random weights, whose ids mean nothing: each id is a printable ASCII character."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.bos_id = None
        self.eos_ids = frozenset()
        self.chat_template = None

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of ``text``, as ids below the vocabulary."""
        return [byte % self.vocabulary for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """Return bytes below 256 as UTF-8 text, other ids as printable characters."""
        return bytes(id if id < 256 else 33 + id % 94 for id in ids).decode(errors="replace")


def byte_tokenizer(vocabulary: int) -> Tokenizer:
    """Return a tokenizer for a random shape: ids 0 to 255 are bytes; it has no end of text."""
    return ByteTokenizer(vocabulary)
