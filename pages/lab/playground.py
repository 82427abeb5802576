"""Playground: write with a model, watch it, and look at what else it could have said."""

import streamlit as st

from pages.parts import settings

st.title("Playground")
st.write(settings.current().model)
