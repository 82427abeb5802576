"""A page's choices: one frozen value in the session, and its place in the address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import streamlit as st
from pydantic import BaseModel, ValidationError

from gptcore.errors import GptcoreError
from pages.parts import errors, permalink, settings

T = TypeVar("T", bound=BaseModel)


class Kept(Generic[T]):
    """The value of a page: read from a link, changed by widgets, written back to the address.

    Args:
        kind: of the value.
        key: under which the session keeps it.
        address: the name in the address under which it stands packed; None where it has no place
            there.
        what: what a sentence calls it, such as "recipe".
        start: makes what a newcomer finds; not given, it is every field's default, which is the
            same for everybody and is left out of the address.
    """

    def __init__(
        self,
        kind: type[T],
        *,
        key: str,
        address: str | None,
        what: str,
        start: Callable[[], T] | None = None,
    ) -> None:
        self._kind = kind
        self._key = key
        self._address = address
        self._what = what
        self._start = start

    def current(self) -> T:
        """Return the session's value, from the address when the page is entered by a link."""
        if self._key not in st.session_state:
            st.session_state[self._key] = self._linked() or (self._start or self._kind)()
        kept: T = st.session_state[self._key]
        return kept

    def change(self, **values: Any) -> bool:
        """Change some fields; what is refused is said and not taken, and makes it False."""
        try:
            changed = self._kind.model_validate({**dict(self.current()), **values})
        except (ValidationError, GptcoreError) as error:
            settings.say(errors.sentence(error, self._kind))
            return False
        st.session_state[self._key] = changed
        return True

    def write_address(self) -> None:
        """Make the address hold the whole value, as far as an address can."""
        if self._address is None:
            return
        value = self.current()
        told = self._start is not None or value != self._kind()
        tell(self._address, permalink.pack(value.model_dump(mode="json")) if told else None)

    def is_linked(self) -> bool:
        """Return whether the address has a value."""
        return self._address is not None and self._address in st.query_params

    def _linked(self) -> T | None:
        packed = st.query_params.get(self._address) if self._address else None
        if not packed:
            return None
        try:
            return self._kind.model_validate_json(permalink.unpacked(packed))
        except (ValidationError, GptcoreError) as error:
            problem = errors.sentence(error, self._kind)
            settings.say(f"The link's {self._what} was not used: {problem}")
        except ValueError:
            settings.say(f"The link's {self._what} is damaged and was not used.")
        return None


def tell(name: str, value: str | None) -> None:
    """Make the address tell a value; None, and what is too long for an address, it does not."""
    if not value or len(value) > permalink.MAX_LINK_CHARS:
        st.query_params.pop(name, None)
    elif st.query_params.get(name) != value:
        st.query_params[name] = value
