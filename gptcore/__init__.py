"""A laboratory for GPT models: build, generate, measure, record. Imports no Streamlit."""

__version__ = "0.1.0"
