"""The script that every request runs: page settings, sidebar, navigation, then the page."""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from gptcore.errors import GptcoreError
from pages.parts import errors, links, services, settings, sidebar

ICON = ROOT / "pages" / "parts" / "assets" / "icon.svg"
"""Its own file: a page's material icon would be fetched from another host for the browser's tab."""

st.set_page_config(
    page_title="GPT lab", page_icon=str(ICON), layout="wide", initial_sidebar_state="auto"
)
dark = st.context.theme.type == "dark"
st.logo(str(ICON.with_name("logo_dark.svg" if dark else "logo_light.svg")), size="large")
page = st.navigation(
    {
        "": [
            st.Page(
                links.HOME,
                title="Home",
                icon=":material/home:",
                url_path="",
                default=True,
                help="What this is, what runs now, the last runs, and the machine.",
            ),
        ],
        "Lab": [
            st.Page(
                links.PLAYGROUND,
                title="Playground",
                icon=":material/edit_note:",
                url_path="playground",
                help="Write with a model, watch what each token costs, and see what else it "
                "could have said.",
            ),
            st.Page(
                links.COMPARE,
                title="Compare",
                icon=":material/compare_arrows:",
                url_path="compare",
                help="Two to four variants on the same prompt and the same work: who is faster, "
                "and how sure that is.",
            ),
            st.Page(
                links.OPTIMIZE,
                title="Optimize",
                icon=":material/bolt:",
                url_path="optimize",
                help="Make the model smaller or faster, and see proof of what that changed.",
            ),
            st.Page(
                links.TUNE,
                title="Tune",
                icon=":material/tune:",
                url_path="tune",
                help="Let a search choose the settings of a recipe, under limits.",
            ),
            st.Page(
                links.EXPLAIN,
                title="Explain",
                icon=":material/visibility:",
                url_path="explain",
                help="What happens inside a model: one draw, attention, layers, attribution, "
                "heads, differences, and the time of a step.",
            ),
            st.Page(
                links.IN_CONTEXT,
                title="In context",
                icon=":material/format_list_numbered:",
                url_path="in_context",
                help="What a prompt alone makes of a model: examples before a question, and texts "
                "that are held to a rule.",
            ),
            st.Page(
                links.TRAIN,
                title="Train",
                icon=":material/model_training:",
                url_path="train",
                help="Make a GPT of your own from a text, and watch it learn.",
            ),
            st.Page(
                links.MODELS,
                title="Models",
                icon=":material/database:",
                url_path="models",
                help="What is on disk, what this machine can hold; add and delete models.",
            ),
        ],
        "Plan": [
            st.Page(
                links.PLAN,
                title="Plan",
                icon=":material/calculate:",
                url_path="plan",
                help="What a size needs before anything runs: memory, training, speed, cost.",
            ),
        ],
        "Operate": [
            st.Page(
                links.LIVE,
                title="Live",
                icon=":material/monitoring:",
                url_path="live",
                help="Latency, throughput, errors and the machine, now and over 30 days.",
            ),
            st.Page(
                links.HISTORY,
                title="History",
                icon=":material/history:",
                url_path="history",
                help="Every run: find it, note something on it, hold it against others.",
            ),
        ],
    }
)
try:
    services.lab()
except GptcoreError as error:
    errors.show(error)
    st.stop()
for draw in (
    lambda: settings.restore(page.url_path),
    settings.keep_watching,
    lambda: sidebar.draw(services.lab()),
    page.run,
):
    errors.guarded(draw)()
