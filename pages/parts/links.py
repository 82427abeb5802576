"""Where the pages lie, for links from one to another."""

from __future__ import annotations

from pathlib import Path

_PAGES = Path(__file__).parents[1]
HOME = _PAGES / "start" / "home.py"
PLAYGROUND = _PAGES / "lab" / "playground.py"
COMPARE = _PAGES / "lab" / "compare.py"
OPTIMIZE = _PAGES / "lab" / "optimize.py"
TUNE = _PAGES / "lab" / "tune.py"
TRAIN = _PAGES / "lab" / "train.py"
MODELS = _PAGES / "lab" / "models.py"
EXPLAIN = _PAGES / "lab" / "explain.py"
IN_CONTEXT = _PAGES / "lab" / "in_context.py"
PLAN = _PAGES / "plan" / "plan.py"
LIVE = _PAGES / "operate" / "live.py"
HISTORY = _PAGES / "operate" / "history.py"
