"""Where things lie on disk; ``GPTLAB_DATA`` moves all that a user makes to another folder."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def data_dir() -> Path:
    """Return the folder for the database, models and caches, made if it is missing."""
    folder = Path(os.environ.get("GPTLAB_DATA") or ROOT / "data").expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def models_dir() -> Path:
    """Return the folder that holds one sub-folder a model of the catalogue."""
    return _made(data_dir() / "models")


def cache_dir() -> Path:
    """Return the folder for what can be computed again: converted weights, measured peaks."""
    return _made(data_dir() / "cache")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
