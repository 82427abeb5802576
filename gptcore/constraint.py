"""Holding a text to a rule while it is drawn: which tokens may come next. No torch.

The rule (choices, a regular expression or a JSON schema) becomes a grammar, and llguidance walks
it along the text: before each draw it gives the set of tokens behind which the text can still
become one that follows the rule; after the draw it takes the token. The end of text is among them
where the text may end.

A schema is checked before that, by its own standard (draft 2020-12), and every keyword in it must
be one that is known: a misspelt one would be passed over in silence, and the texts would not be
what the schema was written for.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from gptcore.errors import InvalidInput
from gptcore.records import Constraint

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from llguidance._lib import JsonCompileOptions

    from gptcore.tokenizer import Tokenizer

MAX_DEPTH = 100
MATCH_S = 2.0
"""Seconds that judging one text by an expression may take; some take for ever."""
JSON_LOOKS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""As most JSON that models have read; with free white space a hot model goes on with spaces."""
SCHEMAS = ("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not")
"""Keywords of JSON Schema that hold a schema; below, those that hold named ones, and lists."""
TABLES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
OTHERS = """
$schema $id $ref $anchor $comment $dynamicRef $dynamicAnchor $vocabulary title description default
examples deprecated readOnly writeOnly type enum const multipleOf maximum minimum exclusiveMaximum
exclusiveMinimum maxLength minLength pattern format contentEncoding contentMediaType contentSchema
maxItems minItems uniqueItems maxContains minContains maxProperties minProperties required
dependentRequired dependencies if then else unevaluatedItems unevaluatedProperties
"""
"""All others of the standard; llguidance refuses those of them that it cannot hold to."""
_tokenizers: WeakKeyDictionary[Tokenizer, LLTokenizer] = WeakKeyDictionary()
"""What llguidance made of each tokenizer: about a second of work, the same for every rule."""


class Guide:
    """Walks a rule along one text.

    Attributes:
        prepare_s: seconds to prepare the tokenizer; 0 where that was done before.
        compile_s: seconds to make a grammar of the rule.
        mask_s: seconds each step took to find the tokens that may come, in order.
    """

    def __init__(
        self,
        constraint: Constraint,
        tokenizer: Tokenizer,
        vocabulary: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Make a grammar of the rule.

        Args:
            constraint: the rule.
            tokenizer: of the model.
            vocabulary: V, the number of its logits.
            clock: in seconds.

        Raises:
            InvalidInput: the rule cannot be followed; the sentence names what hinders.
        """
        from llguidance import LLMatcher

        began = clock()
        prepared = _prepared(tokenizer, vocabulary)
        self.prepare_s = clock() - began
        began = clock()
        self._matcher = LLMatcher(prepared, grammar_of(constraint), log_level=0)
        self.compile_s = clock() - began
        self.mask_s: list[float] = []
        self._constraint = constraint
        self._vocabulary = vocabulary
        self._clock = clock
        self._ends = list(prepared.eos_tokens)
        self._allowed: NDArray[np.bool_] | None = None
        self._require_no_error()
        self.allowed()

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens may come next: (V,); the end of text where the text may end."""
        if self._allowed is None:
            began = self._clock()
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            # One more than the vocabulary, where an end stands for models that have none.
            self._mask = np.unpackbits(bits, bitorder="little")[: self._vocabulary + 1] > 0
            self._allowed = self._mask[: self._vocabulary]
            self.mask_s.append(self._clock() - began)
            self._require_no_error()
        return self._allowed

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may come."""
        others = self.allowed().copy()
        others[[end for end in self._ends if end < self._vocabulary]] = False
        return bool(self._mask[self._ends].any() and not others.any())

    @property
    def may_end(self) -> bool:
        """Whether the text so far follows the rule as it is."""
        return bool(self._matcher.is_accepting())

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens of the vocabulary that end a text; empty where a model has none."""
        return frozenset(end for end in self._ends if end < self._vocabulary)

    def take(self, id: int) -> None:
        """Go on behind a token.

        Raises:
            InvalidInput: the rule does not allow it there, as a branch's trunk may not.
        """
        if not self.allowed()[id]:
            raise InvalidInput(
                f"The text breaks its {self._constraint.name} with token {id}: change the text "
                "that was given, or the rule."
            )
        self._allowed = None
        self._matcher.consume_token(id)
        self._require_no_error()

    def _require_no_error(self) -> None:
        problem = self._matcher.get_error() if self._matcher.is_error() else ""
        nothing = self._allowed is not None and not self._mask.any()
        if nothing or problem.startswith("NoExtension") or "Too many items" in problem:
            raise InvalidInput(
                f"No text can follow this {self._constraint.name} within the limits: it "
                "contradicts itself, needs itself without an end, or forces too long a text."
            )
        if problem:
            raise InvalidInput(_refused(self._constraint, problem))


def grammar_of(constraint: Constraint) -> str:
    """Return a rule as a grammar of llguidance; also a check of the rule that needs no model.

    Raises:
        InvalidInput: it is no valid JSON, schema or expression, or uses what is not supported.
    """
    from llguidance import LLMatcher

    if constraint.choices:
        # Most models put a space before a word.
        texts = " | ".join(json.dumps(one) for one in constraint.choices)
        grammar = LLMatcher.grammar_from_lark(f"start: /[ ]?/ ({texts})")
    elif constraint.regex:
        grammar = LLMatcher.grammar_from_regex(constraint.regex)
    else:
        schema = schema_of(constraint)
        looks = JSON_LOOKS if isinstance(schema, Mapping) else None
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=looks)
    if problem := LLMatcher.validate_grammar(grammar):
        raise InvalidInput(_refused(constraint, problem))
    return str(grammar)


def schema_of(constraint: Constraint) -> Any:
    """Return the constraint's schema as JSON.

    Raises:
        InvalidInput: it is no JSON or no schema, or holds a keyword that is not known.
    """
    from jsonschema import Draft202012Validator, SchemaError

    try:
        schema = json.loads(constraint.json_schema)
    except json.JSONDecodeError as error:
        raise InvalidInput(
            f"The JSON schema is no JSON: {error.msg} in line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise InvalidInput("The JSON schema is nested too deeply: make it flatter.") from None
    for place, keyword in _unknown_keywords(schema, "schema", 0):
        raise InvalidInput(
            f"The JSON schema has the keyword {keyword!r} in {place}, which is none of JSON "
            "Schema's: correct or remove it."
        )
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        place = "/".join(map(str, error.absolute_path)) or "its top"
        raise InvalidInput(
            f"The JSON schema is invalid at {place}: {error.message[:200]}."
        ) from None
    return schema


def follows(constraint: Constraint, text: str) -> bool | None:
    """Return whether a finished text follows the rule, judged without llguidance.

    None where it cannot be told: an expression in syntax that only Rust has, or one that takes
    more than two seconds to match.
    """
    import regex
    from jsonschema import Draft202012Validator

    if constraint.choices:
        return text.removeprefix(" ") in constraint.choices
    if constraint.regex:
        try:
            # Its newer syntax has nested sets and what is common to them, as Rust's has.
            found = regex.fullmatch(constraint.regex, text, flags=regex.V1, timeout=MATCH_S)
            return found is not None
        except (regex.error, TimeoutError):
            return None
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return bool(Draft202012Validator(schema_of(constraint)).is_valid(value))


def _unknown_keywords(schema: Any, place: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield (place, keyword) of each keyword that JSON Schema has not."""
    if depth > MAX_DEPTH:
        raise InvalidInput(
            f"The JSON schema is nested more than {MAX_DEPTH} deep: make it flatter."
        )
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        within = f"{place}/{keyword}"
        if keyword in TABLES:
            for name, one in value.items() if isinstance(value, Mapping) else ():
                yield from _unknown_keywords(one, f"{within}/{name}", depth + 1)
        elif keyword in LISTS:
            for at, one in enumerate(value if isinstance(value, list) else ()):
                yield from _unknown_keywords(one, f"{within}/{at}", depth + 1)
        elif keyword in SCHEMAS:
            yield from _unknown_keywords(value, within, depth + 1)
        elif keyword not in OTHERS.split():
            yield place, keyword


def _refused(constraint: Constraint, problem: str) -> str:
    """Return llguidance's words as one sentence of ours."""
    keys = re.search(r"Unimplemented keys: \[(.*?)\]", problem)
    if keys:
        return (
            f"The JSON schema uses {keys[1]}, which cannot be held to while a text is drawn: "
            "remove it, and check the finished text instead."
        )
    told = re.sub(r"\s+", " ", problem.partition("<string>")[0]).strip()
    regex = re.search(r"error: (.+?)(?: \d+ \||$)", told)
    return (
        f"The {constraint.name} cannot be used: {(regex[1] if regex else told)[:240].rstrip('. ')}."
    )


def _prepared(tokenizer: Tokenizer, vocabulary: int) -> LLTokenizer:
    """Return llguidance's form of a tokenizer, made once."""
    from llguidance import LLTokenizer, TokenizerWrapper

    found = _tokenizers.get(tokenizer)
    if found is not None:
        return found
    text = tokenizer.as_json()
    ends = sorted(end for end in tokenizer.eos_ids if end < vocabulary) or [vocabulary]
    if text is not None:
        made = LLTokenizer(text, n_vocab=vocabulary + 1, eos_token=ends)
    else:
        made = LLTokenizer(TokenizerWrapper(_Bytes(tokenizer, vocabulary)))
    _tokenizers[tokenizer] = made
    return made


class _Bytes:
    """A tokenizer of bytes as llguidance wants to see one."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self.eos_token_id = vocabulary
        self.bos_token_id = None
        self.special_token_ids = [vocabulary]
        texts = (bytes([id]) if id < 256 else tokenizer.decode([id]).encode()
                 for id in range(vocabulary))  # fmt: skip
        self.tokens = [*texts, b"<end>"]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())
