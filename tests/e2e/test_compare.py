"""Compare in a real browser: a recipe that is typed, and texts laid over each other."""

import pytest
from playwright.sync_api import expect

from pages.parts.compare_state import Side, Wanted
from pages.parts.permalink import pack
from tests.e2e.conftest import TINY, Server, Visit, ready

pytestmark = pytest.mark.browser

WANTED = Wanted(
    sides=(Side(model=TINY), Side(model=TINY, temperature=2.0)),
    view="Texts",
    prompt="The fox",
    max_new_tokens=8,
)


def test_a_recipe_is_typed_and_texts_are_laid_over_each_other(server: Server, visit: Visit) -> None:
    link = pack(WANTED.model_dump(mode="json"))
    page = visit(server.link("compare", model=TINY, threads="1", c=link))
    recipe = page.get_by_test_id("stSelectbox").filter(has_text="Recipe").first.locator("input")
    recipe.click()
    page.keyboard.type("int8, int4")
    page.keyboard.press("Enter")
    expect(page.get_by_text("int8 and int4 both quantize; choose one")).to_be_visible()
    ready(page)  # the sentence is drawn before the field, which takes away what was refused
    expect(recipe).to_have_value("")
    recipe.click()
    before = page.url
    page.keyboard.type("prune(sparsity=0.25)")
    page.keyboard.press("Enter")
    expect(page.get_by_text("int8 and int4 both quantize; choose one")).to_have_count(0)
    expect(page).not_to_have_url(before)  # the choice stands in the address now
    page.reload()
    expect(recipe).to_have_value("prune(sparsity=0.25)")
    page.get_by_role("button", name="Write on all sides").click()
    expect(page.get_by_text("A · tiny fp32 prune(sparsity=0.25) cpu")).to_be_visible()
    page.get_by_text("Differences from A").click(timeout=60_000)
    expect(page.locator("ins").first).to_be_visible()
    expect(page.locator("del").first).to_be_visible()
