"""How far the sides of a comparison are apart at each token of what they wrote."""

from __future__ import annotations

import html
from collections.abc import Sequence
from statistics import fmean

import streamlit as st
from pydantic import ValidationError

from gptcore.errors import GptcoreError
from gptcore.lab import Apart, Lab, Snapshot, difference
from gptcore.records import Request, RunState, Token
from pages.parts import errors, settings
from pages.parts import format as shown
from pages.parts.compare_state import LETTERS
from pages.parts.plan_charts import colors
from pages.parts.services import lab as shared_lab

STYLES = {
    "same": "",
    "added": "text-decoration:underline 2px;text-underline-offset:3px;border-radius:3px;"
    "background:color-mix(in srgb,{color} 18%,transparent);",
    "removed": "opacity:0.55;",
}
LEAVES = "outline:2px solid {red};outline-offset:1px;border-radius:3px;"
"""Of the token with which a text leaves A's, as in the texts themselves."""
RUNS = "compare_apart"
"""In the session: the texts that were read, and the run of each side but A."""


def read(texts: tuple[str, ...]) -> None:
    """Let A and each other side read what was written."""
    lab = shared_lab()
    runs: dict[int, str] = {}
    try:
        base, *others = (one for run_id in texts if (one := lab.snapshot(run_id)))
        for side, other in enumerate(others, start=1):
            if other.run.variant_hash == base.run.variant_hash:
                continue
            answers = [tuple(token.id for token in other.tokens)]
            if side == 1:
                answers.append(tuple(token.id for token in base.tokens))
            work = Apart(
                variant=lab.measured_variant(base.run.id)[1],
                against=lab.measured_variant(other.run.id)[1],
                request=Request.model_validate(base.run.settings),
                answers=tuple(answers),
            )
            runs[side] = lab.start(work)
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error))
    if not runs:
        settings.say("All sides are the same variant: there is nothing between them.")
    st.session_state[RUNS] = (texts, runs)


def runs_of(texts: Sequence[str]) -> dict[int, str]:
    """Return by side the runs that read these texts."""
    kept = st.session_state.get(RUNS)
    found: dict[int, str] = kept[1] if kept and kept[0] == tuple(texts) else {}
    return found


def nats(lab: Lab, texts: Sequence[str], side: int) -> list[float]:
    """Return KL before each token of a side's text, as far as it is known."""
    run_id = runs_of(texts).get(max(1, side))
    found = lab.snapshot(run_id) if run_id else None
    result = found.run.result if found else None
    if not result:
        return []
    read: list[float] = result["texts"][1 if side == 0 else 0]["kl_nats"]
    return read


def reading(lab: Lab, texts: Sequence[str]) -> bool:
    """Return whether a side is still read."""
    found = [lab.snapshot(one) for one in runs_of(texts).values()]
    return any(one is not None and not one.run.state.final for one in found)


def over(base: Sequence[Token], other: Sequence[Token]) -> None:
    """Draw a text laid over A's: what A alone says struck out, what it alone says underlined.

    Every piece goes through ``html.escape``: nothing in it is markup.
    """
    color, red = colors()[0], colors()[4]
    pieces = []
    for one in difference(base, other):
        style = (STYLES[one.change] + (LEAVES if one.first else "")).format(color=color, red=red)
        tag = {"same": "span", "added": "ins", "removed": "del"}[one.change]
        seen = html.escape(one.text).replace("\n", "↵\n")
        pieces.append(f'<{tag} style="{style}">{seen}</{tag}>' if style else seen)
    st.html(
        '<div style="line-height:1.65;white-space:pre-wrap;overflow-wrap:anywhere">'
        f"{''.join(pieces)}</div>"
    )


def controls(lab: Lab, texts: Sequence[str], written: Sequence[Snapshot]) -> None:
    """Draw the button that colours the texts, what the colour means, and what hinders it."""
    done = [one for one in written if one.run.state is RunState.DONE and one.tokens]
    if len(done) < 2 or len(done) < len(written):
        return
    if not runs_of(texts):
        if st.button(
            "Colour by divergence",
            icon=":material/palette:",
            help="Both variants read the same tokens; the colour of a token is KL(A‖B) of what "
            "they expected before it.",
        ):
            read(tuple(texts))
            st.rerun()  # the whole page, so that this fragment looks again until it is done
        return
    for side, run_id in runs_of(texts).items():
        ended = lab.snapshot(run_id)
        if ended is not None and ended.run.error:
            errors.show(f"{LETTERS[side]}: {ended.run.error}")
    if reading(lab, texts):
        st.caption(":material/hourglass_top: Reading the texts with both variants")
        return
    means = [
        f"{LETTERS[side]}'s text {shown.number(fmean(found))}"
        for side in range(len(written))
        if (found := nats(lab, texts, side))
    ]
    if means:
        st.caption(
            "Colour: KL(A‖other) in nats before each token, full from 1 nat (A's text: against "
            f"B). Mean: {', '.join(means)}."
        )
