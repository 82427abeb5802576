"""What a user caused, as one sentence: the value, the limit and the way out. Nothing is swallowed.

Only ``GptcoreError`` and pydantic's ``ValidationError`` are a user's; everything else is a bug and
goes on to Streamlit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import streamlit as st
from pydantic import ValidationError

from gptcore.errors import GptcoreError
from gptcore.sentences import brief as brief
from gptcore.sentences import sentence as sentence
from pages.parts import format as shown

P = ParamSpec("P")


def guarded(draw: Callable[P, None]) -> Callable[P, None]:
    """Return ``draw`` so that what a user can cause in the middle of it is said in its place.

    Every fragment needs it: its own runs do not pass the script of the page. Where a click in it
    changed more than the fragment (``redraw``), the whole page is drawn again.
    """

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> None:
        if st.session_state.pop("redraw", False):
            st.rerun()
        try:
            draw(*args, **kwargs)
        except GptcoreError as error:
            show(error)

    return drawn


def redraw() -> None:
    """Let a click inside a fragment draw the whole page; a callback calls it."""
    st.session_state["redraw"] = True


def show(error: GptcoreError | ValidationError | str, icon: str = ":material/error:") -> None:
    """Draw the sentence of an error in the page; its text is not read as Markdown."""
    text = error if isinstance(error, str) else sentence(error)
    st.error(shown.escaped(text), icon=icon)
