"""Text to token ids and back, and the chat template between. Imports no torch.

Special tokens that a user types are text: only a chat template, which belongs to the model, may
write control tokens. Templates run in jinja2's immutable sandbox, with bounds on time and size.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.filters import do_format
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from gptcore.errors import InvalidInput, InvalidWeights
from gptcore.records import Message

MAX_JSON_BYTES = 64 * 2**20
MAX_NAME_BYTES = 255
MAX_TEMPLATE_CHARS = 100_000
MAX_RENDERED_CHARS = 4_000_000
MAX_RENDER_S = 5.0
MAX_PADDING = 10_000
PADDING = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs"})
MAX_POWER = 100
"""Of both numbers of a power in a template; a product may reach ``MAX_RENDERED_CHARS``."""
NO_CHAT = "This model knows no chat: use completion."
DECISIVE = ("added_tokens", "normalizer", "pre_tokenizer", "model")
"""The parts of a tokenizer's form that decide which ids a text becomes."""
PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Code points that mean nothing: one stands for a special token that a user typed."""


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
        added = fast.get_added_tokens_decoder().items()
        self._ids = {token.content: id for id, token in added if token.special}
        self._specials = sorted(self._ids, key=len, reverse=True)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; a special token in it is text, not control."""
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    @functools.cached_property
    def identity(self) -> str:
        """``sha256:…`` of all that decides which ids a text becomes."""
        form = self._form()
        decisive = {name: form[name] for name in DECISIVE}
        text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def encode_sized(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of ``text``, and for how many of its UTF-8 bytes each of them stands.

        Error: exact for tokenizers of bytes. For others a character that spans tokens counts with
        the first of them, and what the tokenizer leaves out with the token behind it.
        """
        encoding = self._fast.encode(text, add_special_tokens=False)
        ids = list(encoding.ids)
        if self._bytes_of is not None:
            sizes = [self._bytes_of[id] for id in ids]
            if sum(sizes) == len(text.encode()):
                return ids, sizes
        reached = list(accumulate((len(one.encode()) for one in text), initial=0))
        ends = list(accumulate((reached[end] for _, end in encoding.offsets), max))
        return ids, [end - before for before, end in zip([0, *ends], ends, strict=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens written out."""
        return str(self._fast.decode(list(ids), skip_special_tokens=False))

    def token_text(self, id: int) -> str:
        """Return one token as text; bytes that are no character alone are replaced."""
        return self.decode([id])

    def stream(self) -> TextStream:
        """Return a decoder for one text."""
        return TextStream(self.decode)

    def trimmed(self, ids: Collection[int]) -> tuple[Tokenizer, list[int]]:
        """Return a tokenizer that knows some tokens only, and the old id of each of its ids.

        Beside ``ids`` it knows single bytes and characters, special tokens, and every token on the
        way from these to one that is kept. So a text that became ``ids`` becomes the same tokens
        again: of two merges the one with the lower rank comes first, those that made the text are
        all there, and there are no new ones.

        Raises:
            InvalidInput: it is no BPE, so that tokens cannot be taken out.
        """
        form = self._form()
        model = form["model"]
        if model.get("type") != "BPE":
            raise InvalidInput(
                f"A vocabulary of type {model.get('type')} cannot be trimmed; one of BPE can."
            )
        old: dict[str, int] = model["vocab"]
        merges = [tuple(one.split(" ") if isinstance(one, str) else one) for one in model["merges"]]
        added = {one["content"]: one["id"] for one in form["added_tokens"]}
        wanted = set(ids)
        needed = {text for text, id in old.items() if id in wanted or _is_base(text)}
        needed |= old.keys() & {*added, model.get("unk_token")}
        parts: dict[str, list[tuple[str, str]]] = {}
        for left, right in merges:
            parts.setdefault(left + right, []).append((left, right))
        waiting = list(needed)
        while waiting:
            for pair in parts.get(waiting.pop(), ()):
                waiting += [one for one in pair if one not in needed]
                needed.update(pair)
        kept = sorted({old[text] for text in needed} | set(added.values()))
        new = {id: place for place, id in enumerate(kept)}
        model["vocab"] = {text: new[id] for text, id in old.items() if id in new}
        model["merges"] = [list(one) for one in merges if {*one, "".join(one)} <= needed]
        for one in form["added_tokens"]:
            one["id"] = new[one["id"]]
        _renumber(form["post_processor"], new)
        return (
            Tokenizer(
                FastTokenizer.from_str(json.dumps(form)),
                bos_id=None if self.bos_id is None else new[self.bos_id],
                eos_ids=frozenset(new[id] for id in self.eos_ids if id in new),
                chat_template=self.chat_template,
                names=self._names,
            ),
            kept,
        )

    def as_json(self) -> str | None:
        """Return it in the form of ``tokenizer.json``; None where it has none."""
        return str(self._fast.to_str())

    def _form(self) -> dict[str, Any]:
        form: dict[str, Any] = json.loads(self._fast.to_str())
        return form

    @functools.cached_property
    def _bytes_of(self) -> dict[int, int] | None:
        """How many bytes each id stands for, or None where ids do not stand for bytes."""
        decoder = self._form()["decoder"] or {}
        if "ByteLevel" not in {one.get("type") for one in (decoder, *decoder.get("decoders", ()))}:
            return None
        added = self._fast.get_added_tokens_decoder()
        return {
            id: len(text.encode()) if id in added else len(text)  # one character for each byte
            for text, id in self._fast.get_vocab().items()
        }

    def encode_prompt(self, prompt: str, messages: Sequence[Message] = ()) -> list[int]:
        """Return the ids of a prompt, or of a chat through the model's own template.

        A prompt begins as the model's texts do: some tokenizers put a first token before it.

        Raises:
            InvalidInput: a chat for a model that has no template, or the template refuses it.
        """
        if not messages:
            return list(self._fast.encode(prompt).ids)  # with the model's own first token, if any
        if self.chat_template is None:
            raise InvalidInput(NO_CHAT)
        typed = "".join(message.content for message in messages)
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in typed)
        masks = {special: next(free) for special in self._specials if special in typed}
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
                ids.append(self._ids[piece])
            elif piece:
                ids += self.encode(replaced(piece, {mask: one for one, mask in masks.items()}))
        return ids


def _is_base(text: str) -> bool:
    """Whether a token is a character, which stands for a byte in most vocabularies, or a byte."""
    return len(text) == 1 or re.fullmatch(r"<0x[0-9A-F]{2}>", text) is not None


def _renumber(processor: dict[str, Any] | None, new: Mapping[int, int]) -> None:
    """Give the special tokens that a post-processor adds their new ids."""
    if processor is None:
        return
    for one in processor.get("processors", ()):
        _renumber(one, new)
    specials = processor.get("special_tokens")
    for special in (specials or {}).values():
        special["ids"] = [new[id] for id in special["ids"]]


def replaced(text: str, table: dict[str, str]) -> str:
    """Return ``text`` with every key of ``table`` replaced."""
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def split(text: str, specials: Sequence[str]) -> list[tuple[str, bool]]:
    """Return ``text`` in pieces, each with whether it is one of ``specials``."""
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

    _deadline.set(time.monotonic() + MAX_RENDER_S)
    pieces: list[str] = []
    length = 0
    try:
        for piece in _compiled(template).generate(
            add_generation_prompt=True, raise_exception=_refuse, **values
        ):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_RENDERED_CHARS:
                raise OverflowError(f"it writes more than {MAX_RENDERED_CHARS:,} characters")
    except Exception as error:  # a template is foreign code: it may raise anything
        said = str(error).rstrip(".") or type(error).__name__
        raise InvalidInput(f"The model's chat template refuses this chat: {said[:300]}.") from None
    return "".join(pieces)


def _refuse(sentence: str) -> None:
    """What a template calls to say that a chat is not one of its kind."""
    raise jinja2.TemplateError(sentence)


_deadline: ContextVar[float] = ContextVar("deadline")


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise OverflowError(f"it takes longer than {MAX_RENDER_S:g} s")


def _timed(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_time()
        yield item


class _TimedLoops(CodeGenerator):
    """Compiles each loop so that every round looks at the clock."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        """Let every loop of the template go over ``_timed`` items."""
        for loop in node.find_all(nodes.For):
            place = {"lineno": loop.lineno, "environment": self.environment}
            loop.iter = nodes.Filter(loop.iter, "timed", [], [], None, None, **place)
        super().visit_Template(node, frame)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox, with an end: loops and calls hold to a time, what they make to a size."""

    code_generator_class = _TimedLoops
    intercepted_binops = frozenset({"*", "**", "%"})

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return what a function or macro returns."""
        _check_time()
        if getattr(function, "__name__", "") in PADDING:
            _check_widths(*args, *kwargs.values())
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the sandboxed form of a text's ``format`` method, None for anything else."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return a product, or a power of small numbers."""
        if operator == "%":
            too_large = False
            if isinstance(left, str):
                _check_widths(left)
        elif operator == "**":
            too_large = max(abs(left), abs(right)) > MAX_POWER
        else:
            sizes = [len(one) if hasattr(one, "__len__") else abs(one) for one in (left, right)]
            too_large = math.prod(sizes) > MAX_RENDERED_CHARS
        if too_large:
            raise SecurityError(f"what {operator!r} makes of its two sides is too large")
        return super().call_binop(context, operator, left, right)


def _check_widths(*values: Any) -> None:
    """Refuse to pad a text to a width, or by a format's width, that no chat needs."""
    for one in values:
        if (isinstance(one, int) and one > MAX_PADDING) or (
            isinstance(one, str) and re.search(rf"\d{{{len(str(MAX_PADDING))}}}", one)
        ):
            raise SecurityError(f"it pads a text to more than {MAX_PADDING:,} characters")


def _narrow(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter of jinja2's that pads no wider than ``MAX_PADDING``."""

    def applied(value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_widths(*args, *kwargs.values())
        return apply(value, *args, **kwargs)

    return applied


def _formatted(value: str, *args: Any, **kwargs: Any) -> str:
    _check_widths(value)
    return do_format(value, *args, **kwargs)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["timed"] = _timed
    for name in ("center", "indent"):
        sandbox.filters[name] = _narrow(sandbox.filters[name])
    sandbox.filters["format"] = _formatted
    sandbox.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    sandbox.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return sandbox.from_string(template)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a Hugging Face directory.

    Raises:
        InvalidWeights: ``tokenizer.json`` is missing, damaged, too large, or knows more ids than
            the model.
    """
    text = read_text(directory, "tokenizer.json")
    if text is None:
        raise InvalidWeights(f"{directory.name} has no tokenizer.json: add the model's own.")
    try:
        fast = FastTokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise InvalidWeights(f"{directory.name}/tokenizer.json cannot be read: {error}.") from None
    fast.no_padding()
    fast.no_truncation()
    settings = read_json(directory, "tokenizer_config.json")
    config = read_json(directory, "config.json")
    most, largest = config.get("vocab_size"), max(fast.get_vocab().values(), default=0)
    if isinstance(most, int) and largest >= most:
        raise InvalidWeights(
            f"{directory.name}/tokenizer.json has ids up to {largest:,}, and the model knows "
            f"{most:,}: it belongs to another model."
        )
    config |= read_json(directory, "generation_config.json")
    names = {
        name: text
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := token_name(settings.get(name))) is not None
    }
    ends = config.get("eos_token_id")
    eos_ids = {one for one in (ends if isinstance(ends, list) else [ends]) if isinstance(one, int)}
    if (named := fast.token_to_id(names.get("eos_token", ""))) is not None:
        eos_ids.add(int(named))
    bos = fast.token_to_id(names.get("bos_token", ""))
    return Tokenizer(
        fast,
        bos_id=bos,
        eos_ids=frozenset(eos_ids),
        chat_template=chat_template_of(directory, settings),
        names=names,
    )


def chat_template_of(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the chat template of a Hugging Face directory, None where it has none.

    Args:
        directory: where ``chat_template.jinja`` may lie.
        settings: what ``tokenizer_config.json`` says; it may hold several templates by name.
    """
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else read_text(directory, "chat_template.jinja")


def token_name(value: Any) -> str | None:
    """Return a special token's text from either form in which configs keep it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def inside(directory: Path, name: str) -> Path:
    """Return a path in ``directory``.

    Raises:
        InvalidWeights: ``..``, an absolute path or a link leads out of it, or it is no name.
    """
    try:
        path = directory / name
        usable = len(name.encode()) <= MAX_NAME_BYTES and path.resolve().is_relative_to(
            directory.resolve()
        )
    except (ValueError, OSError, RuntimeError):  # NUL, half a surrogate pair, a circle of links
        usable = False
    if not usable:
        raise InvalidWeights(
            f"{directory.name}/{name[:80]!r} leads out of the model's folder: refused."
        )
    return path


def read_text(directory: Path, name: str) -> str | None:
    """Return the text of a model's file, None where it is missing.

    Raises:
        InvalidWeights: a link leads out, or the file is too large or no UTF-8.
    """
    file = inside(directory, name)
    if not file.is_file():
        return None
    if file.stat().st_size > MAX_JSON_BYTES:
        raise InvalidWeights(f"{directory.name}/{name} is larger than {MAX_JSON_BYTES >> 20} MiB.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidWeights(
            f"{directory.name}/{name} is no UTF-8 text: byte {error.start:,} is damaged."
        ) from None


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a model's file, empty where the file is missing.

    Raises:
        InvalidWeights: the file is damaged, or ``read_text`` refuses it.
    """
    text = read_text(directory, name)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidWeights(f"{directory.name}/{name} is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidWeights(f"{directory.name}/{name} holds no JSON object.")
    return value


class ByteTokenizer(Tokenizer):
    """For random weights, whose ids mean nothing: 0 to 255 are bytes, others ASCII characters."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.bos_id = None
        self.eos_ids = frozenset()
        self.chat_template = None

    def as_json(self) -> str | None:
        """Return None: bytes need no file."""
        return None

    def encode_prompt(self, prompt: str, messages: Sequence[Message] = ()) -> list[int]:
        """Return the ids of a prompt; there is no chat."""
        if messages:
            raise InvalidInput(NO_CHAT)
        return self.encode(prompt)

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of ``text``, as ids below the vocabulary."""
        return [byte % self.vocabulary for byte in text.encode()]

    @functools.cached_property
    def identity(self) -> str:
        """A name, as the vocabulary decides all."""
        return f"bytes:{self.vocabulary}"

    def encode_sized(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of ``text``, one byte each."""
        ids = self.encode(text)
        return ids, [1] * len(ids)

    def trimmed(self, ids: Collection[int]) -> tuple[Tokenizer, list[int]]:
        """Refuse: there is no vocabulary.

        Raises:
            InvalidInput: always.
        """
        raise InvalidInput("Random weights have no vocabulary of their own that could be trimmed.")

    def decode(self, ids: Sequence[int]) -> str:
        """Return bytes below 256 as UTF-8 text, other ids as printable characters."""
        return bytes(id if id < 256 else 33 + id % 94 for id in ids).decode(errors="replace")


def byte_tokenizer(vocabulary: int) -> Tokenizer:
    """Return a tokenizer for a random shape: ids 0 to 255 are bytes; it has no end of text."""
    return ByteTokenizer(vocabulary)
