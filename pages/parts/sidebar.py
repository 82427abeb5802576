"""The sidebar of every page: which model, how it is put on which device, and what that takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from gptcore.catalogue import ModelEntry
from gptcore.device import Device
from gptcore.errors import GptcoreError
from gptcore.lab import Lab
from gptcore.passes.registry import passes
from gptcore.recipe import Recipe, Variant, place
from gptcore.spec import ModelSpec
from pages.parts import format as shown
from pages.parts import settings
from pages.parts.settings import NAMED_PRECISIONS, Settings, bound, taken_from

BITS = {"fp32": "32 bits", "bf16": "16 bits", "fp16": "16 bits", "int8": "8 bits", "int4": "4 bits"}


def draw(lab: Lab) -> None:
    """Draw the choices of the sidebar and what they come to."""
    chosen = settings.current()
    entries = {one.name: one for one in lab.models()}
    devices = {one.id: one for one in lab.devices()}
    device = devices.get(chosen.device) or Device(chosen.device, chosen.device, "it is not here.")
    with st.sidebar, st.container(gap="small"):
        _model(chosen, entries)
        entry = entries.get(chosen.model)
        if entry is not None and entry.variant is not None:
            st.caption(
                f":material/bolt: Made of {shown.escaped(entry.provenance)}; it runs in "
                f"{entry.variant.precision}."
            )
        else:
            _precision(chosen, device, entry.spec if entry else None)
        _device(chosen, devices)
        _memory(lab, chosen, entry)
        _recipe(lab, chosen)
        with st.expander("Threads", icon=":material/memory:"):
            st.number_input(
                "CPU threads",
                min_value=0,
                max_value=1024,
                key=bound("threads", chosen.threads, typed=True),
                on_change=taken_from,
                args=("threads", "threads"),
                help="0 takes every physical core. The same seed gives the same text only with "
                "the same number of threads.",
            )


def _model(chosen: Settings, entries: dict[str, ModelEntry]) -> None:
    st.selectbox(
        "Model",
        list(entries),
        key=bound("model", chosen.model),
        format_func=lambda name: _model_label(entries[name]),
        on_change=_take_model,
        args=(entries,),
    )
    entry = entries.get(chosen.model)
    if entry is None or entry.problem:
        return
    if entry.kind == "random":
        st.caption(":material/casino: Random weights: speed is real, text is noise.")
    elif entry.source_precision:
        st.caption(f"Weights from {shown.escaped(entry.source_precision)}")


def _take_model(entries: dict[str, ModelEntry]) -> None:
    """Take the chosen model; one that knows no chat continues texts."""
    name = st.session_state["model"]
    settings.change(model=name, **({} if entries[name].chat else {"mode": "completion"}))


def _model_label(entry: ModelEntry) -> str:
    if entry.problem:
        return f"{entry.title} · not usable"
    return f"{entry.title} · random" if entry.kind == "random" else entry.title


def _precision(chosen: Settings, device: Device, spec: ModelSpec | None) -> None:
    marks = {name: caution_of(device, name, spec) for name in NAMED_PRECISIONS}
    st.selectbox(
        "Precision",
        NAMED_PRECISIONS,
        key=bound("precision", chosen.precision),
        format_func=lambda name: f"{name} · {BITS[name]}" + (" · caution" if marks[name] else ""),
        on_change=taken_from,
        args=("precision", "precision"),
        help="\n\n".join(
            f"**{name}**: {shown.escaped(mark)}" for name, mark in marks.items() if mark
        )
        or "How many bits a weight takes.",
    )
    if mark := marks[chosen.precision]:
        st.caption(f":orange[:material/warning:] {shown.escaped(mark)}")


def caution_of(device: Device, precision: str, spec: ModelSpec | None) -> str | None:
    """Return what ``device`` does badly with a precision, or cannot do, as the sidebar names it."""
    try:
        placement, recipe = place(precision, device.id, 0, Recipe())
    except GptcoreError as error:
        return str(error)
    for one in recipe.passes:
        if spec is not None and (blocked := one.blocked_by(spec, placement)):
            return blocked
    return device.caution(placement.precision)


def _device(chosen: Settings, devices: dict[str, Device]) -> None:
    usable = [one.id for one in devices.values() if not one.absent]
    st.selectbox(
        "Device",
        usable if chosen.device in usable else [chosen.device, *usable],
        key=bound("device", chosen.device),
        format_func=lambda id: _device_label(devices.get(id), id),
        on_change=taken_from,
        args=("device", "device"),
        help="  \n".join(
            f"**{one.id}**: {shown.escaped(one.absent or one.name)}" for one in devices.values()
        ),
    )
    absent = [one for one in devices.values() if one.absent]
    if absent:
        st.caption(
            "  \n".join(
                f":material/block: {one.id}: {shown.escaped(one.absent or '')}" for one in absent
            )
        )


def _device_label(device: Device | None, id: str) -> str:
    if device is None or device.absent:
        return f"{id} · absent"
    return f"{id} · {device.name}"


def _memory(lab: Lab, chosen: Settings, entry: ModelEntry | None) -> None:
    if entry is not None and entry.problem:
        st.caption(f":orange[:material/warning:] {shown.escaped(entry.problem)}")
        return
    try:
        fit = lab.fit(chosen.variant(lab))
    except GptcoreError as error:
        st.caption(f":orange[:material/warning:] {shown.escaped(str(error))}")
        return
    if not fit.fits:
        st.error(shown.escaped(fit.sentence), icon=":material/memory:")
        return
    free = fit.free_bytes
    st.progress(
        min(1.0, fit.needed_bytes / free) if free else 0.0,
        text=f"{shown.size(fit.needed_bytes)} needed · {shown.size(free)} free",
    )


def _recipe(lab: Lab, chosen: Settings) -> None:
    """Draw the recipe slot: what turns the model's weights into what runs."""
    try:
        variant = chosen.variant(lab)
        recipe = variant.recipe
    except GptcoreError:
        # The same sentence stands under the memory already.
        return
    st.markdown(f"**Recipe** · {recipe}")
    for one in recipe.passes:
        st.caption(f"{passes()[one.name].title}: {shown.escaped(one.mechanism)}.")
    if recipe.passes and (covered := _coverage(lab, variant)):
        st.caption(covered)


def _coverage(lab: Lab, variant: Variant) -> str | None:
    for _, held in lab.loaded():
        if held.hash == variant.hash and held.coverage:
            return "  \n".join(map(_covered, held.coverage.items()))
    return None


def _covered(pass_: tuple[str, Mapping[str, Any]]) -> str:
    name, found = pass_
    if not found["converted_weights"]:
        return f":red[{name} converted nothing]"
    ratio = found["converted_weights"] / found["total_weights"]
    skipped = len(found["skipped"])
    left = f", {skipped} left as they were" if skipped else ""
    return f"{name} covers {shown.share(ratio)} of the matrix weights{left}"
