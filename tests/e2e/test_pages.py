"""Every page as the first thing that a browser asks of a cold server, and on a narrow screen."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.e2e.conftest import Server, Visit

pytestmark = pytest.mark.browser

PAGES = {
    "": re.compile("laboratory", re.I),
    "playground": re.compile("playground", re.I),
    "compare": re.compile("compare", re.I),
    "history": re.compile("history", re.I),
    "models": re.compile("models", re.I),
    "plan": re.compile("plan", re.I),
    "live": re.compile("live", re.I),
    "optimize": re.compile("optimize", re.I),
    "explain": re.compile("explain", re.I),
    "in_context": re.compile("in context", re.I),
    "tune": re.compile("tune", re.I),
    "train": re.compile("train", re.I),
}


@pytest.mark.parametrize("path", PAGES)
def test_a_deep_link_as_the_first_request_of_a_cold_server_shows_its_page(
    tmp_path: Path, own_server: Server, visit: Visit, path: str
) -> None:
    page = visit(own_server.link(path))
    expect(page.get_by_role("heading", level=1, name=PAGES[path])).to_be_visible()
    sidebar = page.get_by_test_id("stSidebar")
    expect(sidebar.get_by_role("link", name="Playground")).to_be_visible()
    expect(sidebar.get_by_text("Precision")).to_be_visible()


@pytest.mark.parametrize("path", PAGES)
def test_no_page_is_wider_than_a_narrow_screen(server: Server, visit: Visit, path: str) -> None:
    page = visit(server.link(path), width=800)
    expect(page.get_by_role("heading", level=1, name=PAGES[path])).to_be_visible()
    page.wait_for_timeout(1000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 800
