"""The one Lab of this process, as the pages see it.

``app.py`` opens it and hands it over before the first page is served; a test hands over its own.
"""

from __future__ import annotations

from gptcore.errors import GptcoreError
from gptcore.lab import Lab

_lab: Lab | None = None


def lab() -> Lab:
    """Return the lab that all sessions share.

    Raises:
        GptcoreError: none was handed over, because the script was started without ``app.py``.
    """
    if _lab is None:
        raise GptcoreError("There is no lab in this process: start with `streamlit run app.py`.")
    return _lab


def set_lab(lab: Lab | None) -> None:
    """Hand over the lab that the pages shall use; None takes it away."""
    global _lab
    _lab = lab
