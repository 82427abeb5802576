"""Optimize in a real browser: two clicks to a proof that a reload keeps."""

import re

import pytest
from playwright.sync_api import expect

from pages.parts.optimize_state import Draft
from pages.parts.permalink import pack
from tests.e2e.conftest import TINY, Server, Visit

pytestmark = pytest.mark.browser


def test_a_press_makes_a_variant_and_its_card_survives_a_reload(
    server: Server, visit: Visit
) -> None:
    quick = pack(Draft(thoroughness="quick").model_dump(mode="json"))
    page = visit(server.link("optimize", model=TINY, threads="1", o=quick))
    page.get_by_role("button", name="Optimize", exact=True).click()
    expect(page.get_by_role("button", name="Close")).to_be_visible(timeout=120_000)
    expect(page.get_by_text("made in").first).to_be_visible()
    expect(page).to_have_url(re.compile("proof="))
    page.get_by_role("tab", name="Damage map").click()
    expect(page.get_by_text("Signal to noise of each layer's weights")).to_be_visible()
    page.reload()
    expect(page.get_by_role("button", name="Close")).to_be_visible()
    expect(page.get_by_text("Same top")).to_be_visible()
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_text("it runs in int8")).to_be_visible()
