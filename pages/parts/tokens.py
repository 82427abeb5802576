"""A generated text, token by token: colour for the unusual, alternatives on hover, branching.

Model output is never Markdown or HTML: ``assets/tokens.js`` writes every piece as plain text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import streamlit as st

from gptcore.records import Token
from pages.parts.scripts import dated, stub

_CSS = """
.tokens { font-family: var(--st-font); color: var(--st-text-color); font-size: 1rem;
  line-height: 1.65; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.before { opacity: 0.6; }
.token { border-radius: 3px; cursor: default; outline: none; }
.token.unusual { background: color-mix(in srgb, var(--st-orange-color)
  calc(var(--surprise) * 1%), transparent); }
.token.apart { background: color-mix(in srgb, var(--st-violet-color)
  calc(var(--far) * 1%), transparent); }
.token.forced { text-decoration: underline dotted
  color-mix(in srgb, var(--st-text-color) 45%, transparent); text-underline-offset: 0.25em; }
.token:hover, .token:focus-visible { box-shadow: 0 0 0 2px var(--st-primary-color); }
.token.mark { outline: 2px solid var(--st-red-color); outline-offset: 1px; }
.text.busy::after { content: "▍"; color: var(--st-primary-color); }
.box { position: fixed; inset: auto; margin: 0; width: 20rem; padding: 0.5rem; font-size: 0.8125rem;
  line-height: 1.4; color: var(--st-text-color); background: var(--st-background-color);
  border: 1px solid var(--st-border-color); border-radius: var(--st-base-radius);
  box-shadow: 0 6px 24px rgb(0 0 0 / 0.18); font-family: var(--st-font); }
.head { display: flex; justify-content: space-between; gap: 0.5rem; padding: 0 0.25rem 0.35rem;
  font-weight: 600; overflow-wrap: anywhere; }
.row { display: grid; grid-template-columns: 6rem 1fr 3.4rem 3.4rem; gap: 0.4rem; width: 100%;
  align-items: center; padding: 0.15rem 0.25rem; border: 0; border-radius: 4px; background: none;
  color: inherit; font: inherit; text-align: left; cursor: pointer; }
.row:hover, .row:focus-visible { background: var(--st-secondary-background-color);
  outline: 1px solid var(--st-primary-color); }
.row.chosen .piece { font-weight: 650; }
.row.titles { cursor: default; background: none; outline: none; font-size: 0.75rem;
  padding-top: 0; }
.piece { overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  font-family: var(--st-code-font); }
.bar { height: 0.4rem; border-radius: 2px;
  background: linear-gradient(var(--st-primary-color) 0 0) no-repeat 0 / var(--share) 100%; }
.value { text-align: right; font-variant-numeric: tabular-nums; }
.dim { opacity: 0.65; font-weight: 400; }
.foot { padding: 0.3rem 0.25rem 0; }
"""

_mount = st.components.v2.component(
    "gptlab_tokens",
    html='<div class="tokens" data-gptlab></div>',
    css=_CSS,
    js=stub("tokens.js"),
)


def token_text(
    run_id: str,
    tokens: Sequence[Token],
    *,
    busy: bool,
    key: str,
    before: str = "",
    mark: int | None = None,
    apart: Sequence[float] = (),
    on_branch: Callable[[], None] = lambda: None,
) -> None:
    """Draw the tokens of a run; ``branched`` tells ``on_branch`` which alternative was clicked.

    Alternatives are sent once the run has ended: they are ten times the text.

    Args:
        run_id: a change of it begins the drawing anew.
        tokens: all so far, forced ones first.
        busy: whether more will come.
        key: of this drawing on its page.
        before: text that stands dimmed before the first token.
        mark: index of a token with a frame around it.
        apart: nats before each token by which another variant is apart; they then give the colour.
        on_branch: called after a click on an alternative.
    """
    data = {
        "run": run_id,
        "busy": busy,
        "before": before,
        "mark": mark,
        "tokens": [_packed(one, with_alternatives=not busy) for one in tokens],
        "apart": [round(one, 4) for one in apart],
    }
    _mount(data=dated(data), key=key, on_branch_change=on_branch)


def branched(key: str) -> tuple[str, int, int] | None:
    """Return (run id, index of the token, id of the alternative) of the click, or None."""
    value: Any = (st.session_state.get(key) or {}).get("branch")
    try:
        return str(value["run"]), int(value["index"]), int(value["id"])
    except (TypeError, KeyError, ValueError):
        return None


def _packed(token: Token, *, with_alternatives: bool) -> dict[str, Any]:
    packed: dict[str, Any] = {
        "i": token.id,
        "t": token.text,
        "r": round(math.exp(token.logprob), 4),
        "s": round(token.probability, 4),
        "f": token.forced,
    }
    if with_alternatives:
        packed["a"] = [
            {
                "i": one.id,
                "t": one.text,
                "r": round(one.probabilities[0], 4),
                "s": round(one.probabilities[-1], 4),
            }
            for one in token.alternatives
        ]
    return packed
