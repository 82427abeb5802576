"""Models: what is on disk, what this machine can hold, adding one and deleting one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from gptcore.errors import GptcoreError
from pages.parts import format as shown
from pages.parts.holding import PRECISIONS, matrix
from pages.parts.jobs import is_busy, job_progress, start_job
from pages.parts.links import PLAYGROUND
from pages.parts.services import lab as shared_lab
from pages.parts.uploads import stored

if TYPE_CHECKING:
    from gptcore.catalogue import ModelEntry

lab = shared_lab()
NOT_HELD = "color: #8b909c"
UPLOAD_MB = 2048
WEIGHTS = {"installed": "on disk", "variant": "made here", "random": "random"}


def on_disk(entries: list[ModelEntry]) -> ModelEntry | None:
    """Draw the table of installed models; return the selected one."""
    table = {
        "Model": [shown.one_line(one.title, 60) for one in entries],
        "Name": [one.name for one in entries],
        "Parameters": [
            shown.parameters(one.spec.parameters) if one.spec else shown.UNKNOWN for one in entries
        ],
        "On disk": [shown.size(one.stored_bytes) for one in entries],
        "Source precision": [one.source_precision or shown.UNKNOWN for one in entries],
        "Chat": [one.chat for one in entries],
        "Licence": [shown.one_line(one.licence or shown.UNKNOWN, 40) for one in entries],
        "Provenance": [shown.one_line(one.provenance or shown.UNKNOWN, 120) for one in entries],
        "Problem": [shown.one_line(one.problem or "", 300) for one in entries],
    }
    right = {"Parameters", "On disk"}
    chosen = st.dataframe(
        table,
        hide_index=True,
        key="installed",
        on_select="rerun",
        selection_mode="single-row",
        selection_default={"selection": {"rows": [0]}},
        column_config={name: st.column_config.TextColumn(name, alignment="right") for name in right}
        | {
            "Chat": st.column_config.CheckboxColumn(
                "Chat", help="Whether the model brings a chat template."
            ),
            "Source precision": st.column_config.TextColumn(
                "Source precision",
                help="What the weights were stored in. A pass that quantizes weights which are "
                "already that coarse proves little.",
            ),
            "Problem": st.column_config.TextColumn("Problem", width="medium")
            if any(one.problem for one in entries)
            else None,
        },
        alt="Installed models",
    )
    rows = chosen["selection"]["rows"]
    return entries[rows[0]] if rows and rows[0] < len(entries) else None


def actions(entry: ModelEntry) -> None:
    """Draw what can be done with the selected model."""
    with st.container(border=True, gap="small"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**{shown.escaped(entry.title)}**", width="stretch")
            if entry.spec and not entry.problem:
                st.page_link(
                    PLAYGROUND,
                    label="Write with it",
                    icon=":material/edit_note:",
                    query_params={"model": entry.name},
                )
            devices = [device for device, held in lab.loaded() if held.model == entry.name]
            if devices:
                st.button(
                    "Free its memory",
                    icon=":material/memory:",
                    on_click=free,
                    args=(tuple(devices),),
                )
            if not entry.ships and st.button("Delete", icon=":material/delete:", key="delete"):
                ask_to_delete(entry.name)
        if entry.problem:
            st.error(shown.escaped(entry.problem), icon=":material/error:")
        if entry.spec:
            spec = entry.spec
            st.caption(
                f"{spec.family} · {shown.whole(spec.parameters)} parameters · {spec.layers} layers "
                f"· width {shown.whole(spec.width)} · {spec.heads} heads, {spec.kv_heads} for keys "
                f"and values · context {shown.whole(spec.context)} tokens · vocabulary "
                f"{shown.whole(spec.vocabulary)}"
            )
        if entry.note:
            st.caption(f":material/info: {shown.escaped(entry.note)}")
        if entry.ships and (card := lab.model_card(entry.name)):
            with st.expander("How it was made, how good it is, and 20 texts that it wrote"):
                st.markdown(card)


def free(devices: tuple[str, ...]) -> None:
    """Give back the memory of what is loaded on these devices."""
    for device in devices:
        attempt(lab.unload, device)


@st.dialog("Delete this model?", icon=":material/delete:")
def ask_to_delete(name: str) -> None:
    """Ask before a model is removed from disk."""
    entry = next((one for one in lab.models() if one.name == name), None)
    size = shown.size(entry.stored_bytes) if entry else shown.UNKNOWN
    st.write(
        f"**{shown.escaped(name)}** is removed from disk ({size}) and from memory. Runs that it "
        "made stay in the database; to write with it again it has to be brought again."
    )
    with st.container(horizontal=True):
        if st.button("Delete", type="primary", on_click=attempt, args=(lab.delete_model, name)):
            st.rerun()
        if st.button("Keep it"):
            st.rerun()


def add_one() -> None:
    """Draw the ways to add a model: hub, folder or upload."""
    busy = is_busy(lab)
    with st.expander("Add a model", icon=":material/add:", expanded=not installed):
        hub, folder, upload = st.tabs(["From the hub", "From a folder or file", "Upload"])
        with hub:
            source("hub", "Hub name", "HuggingFaceTB/SmolLM2-360M-Instruct", busy)
            st.caption("Needs a network. Only config, tokenizer and safetensors are fetched.")
        with folder:
            source("path", "Folder or .gguf file on the server", "/models/my-model", busy)
            st.caption(
                "A folder with config.json, tokenizer.json and safetensors, or one .gguf file. "
                "It is copied. Pickles are never opened."
            )
        with upload:
            st.file_uploader(
                "Files of one model",
                type=["safetensors", "json", "jinja", "gguf"],
                accept_multiple_files=True,
                max_upload_size=UPLOAD_MB,
                key="files",
                help="One .gguf file, or config.json, tokenizer.json and the safetensors.",
            )
            name_field("upload")
            st.button(
                "Add it",
                key="add upload",
                icon=":material/add:",
                on_click=add_upload,
                disabled=busy or not st.session_state.get("files"),
            )


def source(kind: str, label: str, example: str, busy: bool) -> None:
    """Draw a field for where a model lies, one for its name, and the button."""
    st.text_input(label, key=f"source {kind}", placeholder=example, max_chars=1000)
    name_field(kind)
    st.button(
        "Add it",
        key=f"add {kind}",
        icon=":material/add:",
        on_click=add_source,
        args=(kind,),
        disabled=busy,
    )


def name_field(kind: str) -> None:
    """Draw the field for a name of one's own."""
    st.text_input(
        "Name in the catalogue",
        key=f"name {kind}",
        placeholder="taken from the source if left empty",
        max_chars=100,
    )


def add_source(kind: str) -> None:
    """Start adding from a hub name or a path."""
    where = str(st.session_state.get(f"source {kind}") or "").strip()
    name = str(st.session_state.get(f"name {kind}") or "").strip()
    if not where:
        st.session_state["models_problem"] = "Nothing was entered: say where the model lies."
        return
    attempt(lambda: start_job(lab.add_model(where, name or None)))


def add_upload() -> None:
    """Start adding from uploaded files; their folder goes away with the job."""
    name = str(st.session_state.get("name upload") or "").strip()

    def do() -> None:
        folder, path = stored(st.session_state.get("files") or [], name)
        start_job(lab.add_model(path, name or None, folder.cleanup))

    attempt(do)


def attempt(act: Any, *arguments: Any) -> None:
    """Do it; what a user can cause is told in a sentence at the top of the page."""
    try:
        act(*arguments)
    except GptcoreError as error:
        st.session_state["models_problem"] = str(error)


def holding(entries: list[ModelEntry]) -> None:
    """Draw the matrix of models and precisions for one device."""
    st.subheader("What this machine can hold")
    devices = lab.devices()
    usable = [device.id for device in devices if not device.absent]
    with st.container(horizontal=True, vertical_alignment="center"):
        device = st.segmented_control(
            "Device",
            usable,
            default=usable[0],
            required=True,
            key="matrix_device",
            label_visibility="collapsed",
        )
        room = st.empty()
    known = [one for one in entries if one.spec]
    cells = matrix(lab, [one.name for one in known if not one.problem], device or usable[0])
    free = next((c.free_bytes for row in cells.values() for c in row if c.free_bytes), None)
    absent = [f"{one.id}: {one.absent}" for one in devices if one.absent]
    room.caption(shown.escaped(" · ".join([f"{shown.size(free)} free", *absent])))
    rows = [one for one in known if one.name in cells]
    table = pd.DataFrame(
        {
            "Model": [one.title for one in rows],
            "Weights": [WEIGHTS[one.kind] for one in rows],
            "Parameters": [shown.parameters(one.spec.parameters) for one in rows if one.spec],
        }
        | {
            precision: [cells[one.name][i].text for one in rows]
            for i, precision in enumerate(PRECISIONS)
        }
    )
    chosen = st.dataframe(
        table.style.map(lambda text: NOT_HELD if text[:1] in "✗—" else "", subset=list(PRECISIONS)),
        hide_index=True,
        key="matrix",
        on_select="rerun",
        selection_mode="single-cell",
        column_config={
            name: st.column_config.TextColumn(name, alignment="right")
            for name in ("Parameters", *PRECISIONS)
        },
        height="content",
        alt="Bytes of the weights of every model at every precision, and whether they fit",
    )
    said = sentence_of(chosen["selection"]["cells"], [cells[one.name] for one in rows])
    st.caption(said)
    st.caption(
        ":material/info: Random weights: speed is real, text is noise. They are made at the exact "
        "shape in the precision under the pass, and shrunk afterwards, so int8 and int4 of a "
        "random model need that room first."
    )


def sentence_of(selected: Any, rows: list[Any]) -> str:
    """Return what is said under the matrix: of the selected cell, or how to read it."""
    for row, column in selected:
        if column in PRECISIONS and row < len(rows):
            return shown.escaped(rows[row][PRECISIONS.index(column)].sentence)
    return (
        "Bytes of the weights (1 GB = 10⁹ bytes); ✓ fits into the memory that is free now, with a "
        "cache of 2,048 tokens and working space beside it. Click a cell for its sentence."
    )


entries = list(lab.models())
installed = [one for one in entries if one.path is not None]
with st.container(horizontal=True, vertical_alignment="center"):
    st.title("Models", width="stretch")
    if lab.lacks_smollm2():
        st.button(
            "Bring SmolLM2-135M (93 MB)",
            type="primary",
            icon=":material/download:",
            key="bring",
            disabled=is_busy(lab),
            on_click=lambda: attempt(lambda: start_job(lab.pull_smollm2())),
        )
if problem := st.session_state.pop("models_problem", None):
    st.error(shown.escaped(problem), icon=":material/error:")
job_progress(lab)
if installed:
    selected = on_disk(installed)
    if selected:
        actions(selected)
    else:
        st.caption("Select a row to write with a model, to see its shape, or to delete it.")
else:
    st.caption("No model is on disk yet: bring SmolLM2, or add one of your own below.")
add_one()
holding(entries)
