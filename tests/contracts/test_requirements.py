"""What the program imports is what ``requirements.txt`` brings: nothing more may be needed."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions

import pytest

from tests.conftest import ROOT

STARTS = {
    "the server": "import gptcore.lab, gptcore.serve, pages.parts.settings, app",
    "the command line": "import gptcore.__main__",
    "the host": "import gptcore.host.process, torch, gptcore.engine, gptcore.weights",
}


def brought() -> set[str]:
    """Return the distributions that requirements.txt brings, in lower case, with all they need."""
    waiting = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    found: set[str] = set()
    while waiting:
        name = normalised(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:  # for another system or Python
            continue
        waiting += [
            match[0]
            for need in needs
            if "extra ==" not in need and (match := re.match(r"[\w.-]+", need))
        ]
    return found


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("code", STARTS.values(), ids=STARTS)
def test_a_start_needs_only_what_requirements_bring(code: str) -> None:
    show = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}\n{show}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    known, allowed = packages_distributions(), brought()
    foreign = {
        module: known[module]
        for module in done.stdout.split()
        if module in known and not {normalised(one) for one in known[module]} & allowed
    }
    assert foreign == {}
