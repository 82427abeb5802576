"""Pictures of every page after a real generation: ``python tools/screenshots.py FOLDER [--all]``.

Starts the app on a data folder of its own that holds the installed SmolLM2, writes a few texts
with it, and photographs the pages; with ``--all`` in both themes and two widths, for looking at.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.conftest import SMOLLM2, USERS_DATA, chromium, share
from tests.e2e.conftest import BROWSER_OPTIONS, free_port

TEXTS = ("A short tale", "Explain", "A list")
SLOW_MS = 600_000
PAGES = ("", "playground", "models", "live", "plan", "explain", "in_context")
OPENED = {
    "plan": "plan?view=Fit&p_model=gpt3-1.3b&p_card=rtx-3070&model=smollm2-135m",
    "explain": "explain?model=smollm2-135m",
    "in_context": "in_context?model=smollm2-135m&precision=int8",
}
"""Addresses of pages that are opened with settings of their own."""


@contextmanager
def app(data: Path) -> Iterator[str]:
    """Run the app on ``data`` and give its address."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)],
        cwd=ROOT,
        env={**os.environ, "GPTLAB_DATA": str(data), "GPTLAB_LOCKS": str(data / "locks")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{url}/healthz", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit("The app did not start.")
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def written(page: Page) -> None:
    """Wait until a text is finished."""
    page.get_by_role("button", name="Stop").and_(page.locator(":disabled")).wait_for(
        timeout=SLOW_MS
    )
    page.get_by_text("ended by").wait_for()


def prepare(browser: Browser, url: str) -> str:
    """Write a few texts; return the address of the last one, with its ranking looked at."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(f"{url}/playground?seed=1&max_new_tokens=120")
    for example in TEXTS:
        page.get_by_role("button", name=example, exact=True).click()
        page.get_by_role("button", name="Generate").click()
        page.locator(".token").nth(2).wait_for(state="attached", timeout=SLOW_MS)
        written(page)
        if example != TEXTS[-1]:
            page.get_by_role("button", name="New", exact=True).click()
    address = page.url
    page.close()
    return address


def begun(page: Page, button: str) -> None:
    """Press a page's own button, once the page has come to rest."""
    page.wait_for_timeout(1500)
    page.get_by_role("button", name=button, exact=True).click()


def photograph(
    browser: Browser, url: str, run: str, file: Path, *, path: str, theme: str, width: int
) -> None:
    """Save one picture of a page."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if theme == "dark" else "light",
    )
    page = context.new_page()
    page.goto(run if path == "playground" else f"{url}/{OPENED.get(path, path)}")
    page.get_by_role("heading", level=1).wait_for()
    if path == "explain":
        page.get_by_text("Lens", exact=True).click()
        begun(page, "Look")
        page.get_by_text("How it decides").wait_for(timeout=SLOW_MS)
    if path == "in_context":
        page.get_by_text("Constraint", exact=True).click()
        page.get_by_text("JSON schema", exact=True).first.wait_for()
        begun(page, "Run")
        page.get_by_text("Take it away as JSON").wait_for(timeout=SLOW_MS)
        page.set_viewport_size({"width": width, "height": 1150})
    if path == "plan":
        page.set_viewport_size({"width": width, "height": 1000})
    if path == "playground":
        page.locator(".token").nth(5).wait_for(state="attached")
        page.get_by_role("button", name="Look", exact=True).click()
        page.locator("button.row[data-token]").first.wait_for(timeout=60_000)
        page.locator(".token").filter(has_text=re.compile(r"\w{4}")).nth(6).hover()
    if path in {"plan", "explain"}:
        page.locator(".js-plotly-plot").first.wait_for(timeout=SLOW_MS)
    page.wait_for_timeout(3000)
    page.screenshot(path=file)
    context.close()


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="both themes, 1440 and 800 wide")
    parser.add_argument("--only", default="", help="some of the pages: plan,explain")
    options = parser.parse_args()
    chosen = [one for one in PAGES if not options.only or one in options.only.split(",")]
    options.folder.mkdir(parents=True, exist_ok=True)
    installed = USERS_DATA / "models" / SMOLLM2
    if not installed.exists():
        sys.exit("SmolLM2 is not installed: python -m gptcore models pull smollm2-135m")
    shots = [("light", 1440)]
    if options.all:
        shots = [(theme, width) for theme in ("light", "dark") for width in (1440, 800)]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        share(installed, Path(folder) / "models" / SMOLLM2)
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=list(BROWSER_OPTIONS), headless=True
        )
        with app(Path(folder)) as url:
            written_first = {"", "playground", "live"} & set(chosen)
            run = prepare(browser, url) if written_first else ""
            for theme, width in shots:
                for path in chosen:
                    name = path or "home"
                    file = f"{name}_{theme}_{width}.png" if options.all else f"{name}.png"
                    photograph(
                        browser,
                        url,
                        run,
                        options.folder / file,
                        path=path,
                        theme=theme,
                        width=width,
                    )
        browser.close()


if __name__ == "__main__":
    main()
