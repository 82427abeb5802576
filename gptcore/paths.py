"""Where things lie on disk; ``GPTLAB_DATA`` moves all that a user makes to another folder."""

from __future__ import annotations

import os
from pathlib import Path

from gptcore.errors import StoreError

ROOT = Path(__file__).resolve().parent.parent


def data_dir() -> Path:
    """Return the folder for the database, models and caches, made if it is missing.

    Raises:
        StoreError: it cannot be made; as the other functions here.
    """
    return _made(Path(os.environ.get("GPTLAB_DATA") or ROOT / "data"))


def models_dir() -> Path:
    """Return the folder that holds one sub-folder a model of the catalogue."""
    return _made(data_dir() / "models")


def cache_dir() -> Path:
    """Return the folder for what can be computed again: converted weights, measured peaks."""
    return _made(data_dir() / "cache")


def _made(folder: Path) -> Path:
    try:
        folder = folder.expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home for ~
        reason = getattr(error, "strerror", None) or error
        raise StoreError(
            f"The data folder {folder} cannot be used: {reason}. Make it writable, or name another "
            "in GPTLAB_DATA."
        ) from None
    return folder
