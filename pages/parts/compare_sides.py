"""The sides of a comparison: model, precision, recipe, how each draws and where it runs."""

from __future__ import annotations

from functools import partial

import streamlit as st

from gptcore.errors import GptcoreError
from gptcore.lab import Lab
from gptcore.records import Sampling
from pages.parts import format as shown
from pages.parts import pass_form, settings
from pages.parts.compare_state import (
    LETTERS,
    Side,
    Wanted,
    change,
    change_side,
    current,
    finished_recipes,
)
from pages.parts.settings import NAMED_PRECISIONS, bound

TITLE_HEIGHT = 40
"""Pixels, so that the sides stand level with a button in their titles and without."""


# What a click does


def take(index: int, name: str) -> None:
    """Take a side's value from its widget; an empty field is the sidebar's."""
    value = st.session_state[f"side_{index}_{name}"]
    if value is None and name not in ("threads", "recipe"):
        return
    change_side(index, **{name: value if name == "threads" else value or ""})


def take_sampler(index: int, key: str, name: str) -> None:
    """Take a sampler of a side from its widget."""
    take(index, name)


def add() -> None:
    """Add a side like the last one."""
    wanted = current()
    change(sides=(*wanted.sides, wanted.sides[-1]))


def remove(index: int) -> None:
    """Take a side away."""
    sides = list(current().sides)
    del sides[index]
    change(sides=sides)


# What the page draws


def draw(lab: Lab, wanted: Wanted) -> None:
    """Draw the variants side by side, each with what decides it."""
    grid = st.grid(len(wanted.sides), min_column_width=230, gap="small")
    recipes = finished_recipes(lab)
    for index, side in enumerate(wanted.sides):
        with grid.container(border=True, height="stretch", gap="small"):
            _title(index, removable=len(wanted.sides) > 2 and index > 0)
            _model(lab, index, side, recipes)
            with st.container(horizontal=True):
                _samplers(index, side)
                _placement(lab, index, side)
            if problem := problem_of(lab, side):
                st.caption(f":red[:material/block:] {shown.escaped(problem)}")


def problem_of(lab: Lab, side: Side) -> str | None:
    """Return why a side cannot run, in a sentence, or None."""
    try:
        return side.variant(lab).blocked_by
    except GptcoreError as error:
        return str(error)


def _title(index: int, *, removable: bool) -> None:
    with st.container(
        horizontal=True, vertical_alignment="center", height=TITLE_HEIGHT, border=False
    ):
        role = "baseline" if index == 0 else "against A"
        st.markdown(f"**{LETTERS[index]}** :gray[{role}]", width="stretch")
        if removable:
            st.button(
                "Remove",
                key=f"remove_{index}",
                icon=":material/close:",
                type="tertiary",
                on_click=remove,
                args=(index,),
            )


def _model(lab: Lab, index: int, side: Side, recipes: dict[str, str]) -> None:
    entries = {one.name: one for one in lab.models() if not one.problem}
    names = list(entries) if side.model in entries else [side.model, *entries]
    entry = entries.get(side.model)
    st.selectbox(
        "Model",
        names,
        key=bound(f"side_{index}_model", side.model),
        format_func=lambda name: entries[name].title if name in entries else name,
        on_change=take,
        args=(index, "model"),
    )
    with st.container(horizontal=True):
        made = entry.variant.precision if entry is not None and entry.variant else None
        st.selectbox(
            "Precision",
            [made] if made else NAMED_PRECISIONS,
            key=bound(f"side_{index}_precision", made or side.precision),
            on_change=take,
            args=(index, "precision"),
            disabled=made is not None,
            help="A finished variant is used as it was made." if made else None,
            width=110,
        )
        texts = list(recipes)
        st.selectbox(
            "Recipe",
            texts if side.recipe in ("", *texts) else [side.recipe, *texts],
            index=None,
            key=bound(f"side_{index}_recipe", side.recipe or None, typed=True),
            format_func=lambda text: f"{text} · {recipes[text]}" if text in recipes else text,
            placeholder="none",
            accept_new_options=True,
            on_change=take,
            args=(index, "recipe"),
            help="Passes on top of the precision: that of a finished variant, or written, such as "
            "`int4(group_size=64)` or `prune(sparsity=0.5), int8`.",
        )


def _samplers(index: int, side: Side) -> None:
    with st.popover(
        shown.one_line(side.drawn, 30) or "Greedy",
        icon=":material/casino:",
        help="How its texts are drawn.",
    ):
        for name, field in Sampling.model_fields.items():
            key = f"side_{index}_{name}"
            pass_form.widget(name, field, getattr(side, name), key, partial(take_sampler, index))


def _placement(lab: Lab, index: int, side: Side) -> None:
    chosen = settings.current()
    device = side.device or chosen.device
    threads = f" · {side.threads} thread{'s' * (side.threads != 1)}" if side.threads else ""
    with st.popover(f"{device}{threads}", icon=":material/memory:", help="Where it runs."):
        usable = [one.id for one in lab.devices() if not one.absent]
        st.selectbox(
            "Device",
            list(dict.fromkeys(("", *usable, side.device))),
            key=bound(f"side_{index}_device", side.device),
            format_func=lambda one: one or f"the sidebar's, {chosen.device}",
            on_change=take,
            args=(index, "device"),
            help="Texts may be written on different devices; what is measured in turn needs one.",
        )
        st.number_input(
            "CPU threads",
            min_value=0,
            max_value=1024,
            value=None,
            key=bound(f"side_{index}_threads", side.threads, typed=True),
            placeholder=f"the sidebar's, {chosen.threads or 'all cores'}",
            on_change=take,
            args=(index, "threads"),
            help="0 takes every physical core.",
        )
