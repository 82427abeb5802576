"""What hands the data of a refresh to the scripts of the page, in a real browser."""

import pytest
from playwright.sync_api import Page

from pages.parts.scripts import stub
from tests.e2e.conftest import Server, Visit

pytestmark = pytest.mark.browser

PARENT = """
  const parent = document.createElement("div")
  parent.innerHTML = '<div data-gptlab></div>'
  document.body.append(parent)
  const text = "Once upon a time a fox".split(" ")
  const tokens = text.map((t, i) => ({ i, t, r: 0.5, s: 0.5, f: false }))
  const refresh = (turn, count) => draw({
    data: { turn, data: { run: "a", busy: count < 6, before: "", mark: null, apart: [],
      tokens: tokens.slice(0, count) } },
    parentElement: parent, setTriggerValue: () => {} })
  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms))
  // Until so many tokens are drawn, however busy the machine, and a moment for what comes late.
  const settled = async (count = 6) => {
    for (let i = 0; i < 200 && parent.querySelectorAll(".token").length !== count; i++)
      await pause(50)
    await pause(200)
  }
  const shown = () => [...parent.querySelectorAll(".token")].map((e) => e.textContent).join(" ")
"""


def with_stub(server: Server, visit: Visit, body: str) -> object:
    """Return what ``body`` finds where ``draw`` is the default export of the tokens' stub."""
    page: Page = visit(server.link("playground"))
    return page.evaluate(
        """async ([code, body]) => {
          const blob = new Blob([code], { type: "text/javascript" })
          const draw = (await import(URL.createObjectURL(blob))).default
          return await new (async () => {}).constructor("draw", body)(draw)
        }""",
        [stub("tokens.js"), PARENT + body],
    )


def test_a_refresh_that_comes_late_does_not_replace_a_newer_one(server: Server, visit: Visit):
    body = "refresh(20, 6); refresh(10, 2); await settled(); return shown()"
    assert with_stub(server, visit, body) == "Once upon a time a fox"


def test_refreshes_in_order_are_all_drawn(server: Server, visit: Visit):
    body = """
      refresh(10, 2); await settled(2); const first = shown()
      refresh(20, 6); await settled(); return [first, shown()]"""
    assert with_stub(server, visit, body) == ["Once upon", "Once upon a time a fox"]


def test_the_end_of_an_older_refresh_leaves_the_newer_one_alive(server: Server, visit: Visit):
    body = """
      const older = refresh(10, 2); refresh(20, 6); await older(); await settled()
      const kept = parent.querySelector(".token"); refresh(20, 6); await settled()
      return kept === parent.querySelector(".token")"""
    assert with_stub(server, visit, body) is True


def test_bytes_come_to_the_script_as_they_were_given(server: Server, visit: Visit):
    page = visit(server.link("playground"))
    found = page.evaluate(
        """async (code) => {
          const seen = []
          const script = Promise.resolve({ draw: ({ data }) => seen.push([...data]) })
          globalThis.gptlabScripts = { "/gptlab/other.js": { tries: 0, script } }
          const blob = new Blob([code], { type: "text/javascript" })
          const draw = (await import(URL.createObjectURL(blob))).default
          const parentElement = document.createElement("div")
          for (const [turn, value] of [[2, 7], [1, 8], [3, 9]]) {
            const data = new Uint8Array(10)
            new DataView(data.buffer).setFloat64(0, turn, true)
            data.set([value, value + 1], 8)
            draw({ data, parentElement })
          }
          await script
          return seen
        }""",
        stub("other.js"),
    )
    assert found == [[7, 8], [9, 10]]
