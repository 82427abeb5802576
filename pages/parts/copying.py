"""Settings as a command, as Python and as a link, each of which writes the same text again."""

from __future__ import annotations

import json
import shlex

import streamlit as st
from pydantic import ValidationError

from gptcore.errors import GptcoreError
from gptcore.records import Request
from pages.parts import errors, permalink
from pages.parts.settings import REQUEST_FIELDS, Settings

DEFAULT = Request(prompt="-")
FLAGS = ("ignore_eos",)
REPEATED = ("stop",)
LISTED = ("forced_ids",)


def command(chosen: Settings) -> str:
    """Return the command line that writes what ``chosen`` writes.

    Raises:
        InvalidInput, ValidationError: nothing can be written with it.
    """
    request = chosen.request()
    parts = ["python", "-m", "gptcore", "generate", "--model", chosen.model]
    parts += ["--precision", chosen.precision, "--device", chosen.device]
    if chosen.threads:
        parts += ["--threads", str(chosen.threads)]
    if len(request.messages) == 1:
        parts += ["--chat", f"--prompt={request.messages[0].content}"]
    elif request.messages:
        turns = [one.model_dump() for one in request.messages]
        parts += [f"--messages={json.dumps(turns, ensure_ascii=False)}"]
    else:
        parts += [f"--prompt={request.prompt}"]
    for name in REQUEST_FIELDS:
        value = getattr(request, name)
        if value == getattr(DEFAULT, name) and name != "seed":
            continue
        flag = f"--{name.replace('_', '-')}"
        if name in FLAGS:
            parts.append(flag)
        elif name in REPEATED:
            parts += [f"{flag}={one}" for one in value]
        else:
            text = ",".join(map(str, value)) if name in LISTED else str(value)
            parts += [flag, text]
    return shlex.join(parts)


def python(chosen: Settings) -> str:
    """Return the Python that writes what ``chosen`` writes.

    Raises:
        InvalidInput, ValidationError: nothing can be written with it.
    """
    request = chosen.request()
    fields = {
        name: value
        for name, value in request.model_dump(mode="json").items()
        if name == "seed" or value != getattr(DEFAULT, name)
    }
    if request.messages:
        fields.pop("prompt", None)
    arguments = "".join(f"    {name}={value!r},\n" for name, value in fields.items())
    named = [chosen.model, chosen.precision, chosen.device, chosen.threads]
    return (
        "from gptcore.lab import Lab\n"
        "from gptcore.records import Request\n\n"
        f"request = Request(\n{arguments})\n"
        "with Lab.open(monitor=False) as lab:\n"
        f"    variant = lab.variant({', '.join(map(repr, named))})\n"
        "    print(lab.wait(lab.generate(variant, request)).run.text)\n"
    )


def copy_popover(chosen: Settings) -> None:
    """Draw the popover with all three."""
    with st.popover("Copy as", icon=":material/content_copy:"):
        try:
            shell, code = command(chosen), python(chosen)
        except (GptcoreError, ValidationError) as error:
            st.caption(errors.sentence(error))
            return
        st.caption("Each writes this text again, seed included, on the same build and threads.")
        base = (st.context.url or "").partition("?")[0]
        address = permalink.link(base, chosen.model_dump(mode="json"))
        st.markdown("**Link**")
        if address is None:
            st.caption("The text is too long for an address; the command below holds it.")
        else:
            st.code(address, language=None, wrap_lines=True, height=84)
        st.markdown("**Command line**")
        st.code(shell, language="bash", wrap_lines=True, height="content")
        st.markdown("**Python**")
        st.code(code, language="python", height="content")
