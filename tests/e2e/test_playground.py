"""The playground as somebody uses it: a real server, a real model, a real browser."""

import json
import re
import shlex
import shutil
import sys
import time
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

from gptcore.catalogue import SHIPPED
from tests.e2e.conftest import STEADY, TINY, Server, Visit, until

pytestmark = pytest.mark.browser

LONG = 3000
"""Tokens that take so long that one can click about meanwhile."""


def link(server: Server, **settings: object) -> str:
    """Return the playground's address; where nothing else is said, for a text of full length."""
    usual = {"model": TINY, "mode": "completion", "threads": 1, "ignore_eos": 1}
    return server.link("playground", **usual | settings)


def open_playground(server: Server, visit: Visit, **settings: object) -> Page:
    """Open the playground in a fresh browser."""
    return visit(link(server, **settings))


def tokens(page: Page) -> Locator:
    return page.locator(".token")


def written(page: Page) -> str:
    """Return the text as it stands in the page."""
    return page.evaluate(
        """() => [...document.querySelectorAll('*')].map(e => e.shadowRoot).filter(Boolean)
        .flatMap(r => [...r.querySelectorAll('.token')]).map(e => e.textContent).join('')"""
    )


def begin(page: Page, prompt: str = "Once upon a time") -> None:
    """Type a prompt and press Generate."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate").click()
    expect(tokens(page).nth(3)).to_be_attached()


def ended(page: Page) -> None:
    """Wait for the end of the text."""
    expect(page.get_by_role("button", name="Stop")).to_be_disabled(timeout=180_000)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def run_of(page: Page) -> str:
    expect(page).to_have_url(re.compile("run="))
    return parse_qs(urlsplit(page.url).query)["run"][0]


def test_a_text_is_streamed_with_its_numbers_and_found_afterwards(server: Server, visit: Visit):
    page = open_playground(server, visit, model=STEADY, max_new_tokens=150)
    begin(page)
    first = tokens(page).count()
    until(lambda: tokens(page).count() > first)
    ended(page)
    expect(tokens(page)).to_have_count(150)
    for name in ("TTFT", "TPOT", "End to end", "Prefill, tokens/s", "Decode, tokens/s", "MBU"):
        metric = page.get_by_test_id("stMetric").filter(has_text=name)
        assert re.search(r"\d", metric.get_by_test_id("stMetricValue").inner_text()), name
    text, run = written(page), run_of(page)
    page.goto(server.link("live"))
    expect(page.get_by_role("heading", name="Live")).to_be_visible()
    page.goto(server.link("playground", run=run))
    expect(tokens(page).nth(149)).to_be_attached()
    assert written(page) == text


def test_the_model_that_ships_writes_a_tale(server: Server, visit: Visit):
    page = open_playground(
        server, visit, model=SHIPPED.name, temperature=0.7, seed=5, max_new_tokens=80
    )
    begin(page)
    ended(page)
    expect(tokens(page)).to_have_count(80)
    assert len(re.findall(r"\b(?:a|and|he|in|it|of|she|the|to|was)\b", written(page))) > 10


def test_stop_ends_a_text_within_a_second_and_keeps_it(server: Server, visit: Visit):
    page = open_playground(server, visit, model=STEADY, max_new_tokens=LONG)
    begin(page)
    pressed = time.monotonic()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped. What was written until then is kept.")).to_be_visible()
    assert time.monotonic() - pressed < 3.0  # a second on a quiet machine
    ended(page)
    kept = tokens(page).count()
    assert 4 <= kept < LONG
    page.wait_for_timeout(500)
    assert tokens(page).count() == kept


def test_clicks_sliders_pages_and_a_reload_cost_a_stream_no_token(server: Server, visit: Visit):
    page = open_playground(server, visit, model=STEADY, max_new_tokens=600)
    begin(page)
    run = run_of(page)
    slider = page.get_by_role("slider", name="Temperature")
    slider.focus()
    for _ in range(4):
        slider.press("ArrowRight")
    page.get_by_text("More samplers").click()
    page.get_by_role("link", name="Models").first.click()
    expect(page.get_by_role("heading", level=1, name="Models")).to_be_visible()
    page.get_by_role("link", name="Playground").first.click()
    expect(tokens(page).nth(5)).to_be_attached()
    page.reload()
    expect(tokens(page).nth(5)).to_be_attached()
    assert run_of(page) == run
    ended(page)
    expect(tokens(page)).to_have_count(600)
    kept = written(page)
    page.reload()
    expect(tokens(page).nth(599)).to_be_attached()
    assert written(page) == kept


def test_a_permalink_in_a_fresh_browser_restores_every_setting_and_writes_the_same_text(
    server: Server, visit: Visit
):
    page = open_playground(
        server,
        visit,
        model=TINY,
        temperature=1.3,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        max_new_tokens=60,
    )
    begin(page, "A dog & a <b>cat</b> met; “hello” 你好")
    ended(page)
    text = written(page)
    page.get_by_role("button", name="Copy as").click()
    link = page.get_by_test_id("stCode").first.inner_text().replace("\n", "")
    query = parse_qs(urlsplit(link).query)
    assert (query["temperature"], query["top_k"], query["min_p"]) == (["1.3"], ["40"], ["0.01"])
    other = visit(link)
    expect(tokens(other).nth(59)).to_be_attached()
    ended(other)
    assert written(other) == text
    expect(other.get_by_label("Prompt", exact=True)).to_have_value(
        "A dog & a <b>cat</b> met; “hello” 你好"
    )
    expect(other.get_by_role("slider", name="Temperature")).to_have_value("1.3")


def test_the_copied_command_and_python_write_the_text_of_the_page(server: Server, visit: Visit):
    page = open_playground(server, visit, model=TINY, mode="chat", max_new_tokens=25)
    begin(page, 'Say it\'s "fine" $HOME `pwd`\nand go on')
    ended(page)
    text = written(page)
    page.get_by_role("button", name="Copy as").click()
    copied = page.get_by_test_id("stCode")
    command, code = copied.nth(1).inner_text(), copied.nth(2).inner_text()
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "gptcore"]
    assert server.runs([sys.executable, *words[1:], "--no-save"]).rstrip("\n") == text
    assert server.runs([sys.executable, "-c", code]).rstrip("\n") == text


def test_a_click_on_an_alternative_keeps_the_first_tokens_and_takes_the_clicked_one(
    server: Server, visit: Visit
):
    page = open_playground(server, visit, model=TINY, max_new_tokens=40)
    begin(page)
    ended(page)
    before = tokens(page).all_inner_texts()
    run = run_of(page)
    at = next(i for i, text in enumerate(before) if i >= 8 and re.search(r"[a-z]", text))
    tokens(page).nth(at).hover()
    other = page.locator("button.row:not(.chosen)").first
    clicked = other.get_attribute("data-token")
    other.click()
    page.wait_for_url(lambda url: run not in url)
    ended(page)
    after = tokens(page).all_inner_texts()
    assert after[:at] == before[:at]
    expect(page.locator(".token.forced")).to_have_count(at + 1)
    expect(tokens(page).nth(at)).to_have_attribute("data-token", str(clicked))
    expect(page.get_by_text("branched from")).to_be_visible()


def test_a_released_slider_ranks_again_without_a_forward_pass(server: Server, visit: Visit):
    page = open_playground(server, visit, model=TINY, temperature=1)
    page.get_by_label("Prompt", exact=True).fill("Once upon a time")
    page.get_by_role("button", name="Look").click()
    rows = page.locator("button.row[data-token]")
    expect(rows).to_have_count(12)
    slider = page.get_by_role("slider", name="Temperature")
    slider.focus()
    title = page.locator(".titles span").nth(4)
    times = []
    for step in range(1, 9):
        began = time.monotonic()
        slider.press("ArrowRight")
        expect(title).to_have_text(f"T = {1 + 0.05 * step:g}")
        times.append(time.monotonic() - began)
    print(f"slider to ranking: median {np.median(times) * 1000:.0f} ms, {times}")
    raw, tempered = (
        np.array(
            [percent(one) for one in rows.locator(f".value:nth-of-type({n})").all_inner_texts()]
        )
        for n in (4, 5)
    )
    assert (np.diff(raw) <= 0).all()
    # p ∝ raw^(1/T), up to the rounding of what is shown and the rest of the vocabulary
    expected = raw ** (1 / 1.4)
    assert tempered / tempered.sum() == pytest.approx(expected / expected.sum(), abs=0.02)
    slider.press("Home")
    expect(title).to_have_text("T = 0")
    assert percent(rows.nth(0).locator(".value").nth(1).inner_text()) == 1.0


def percent(text: str) -> float:
    return float(text.replace("<", "").replace("%", "").strip()) / 100


def test_two_sessions_write_at_once_and_each_keeps_its_own(server: Server, visit: Visit):
    one, two = (
        open_playground(server, visit, model=model, max_new_tokens=count)
        for model, count in ((STEADY, 500), (TINY, 30))
    )
    begin(one, "The first")
    two.get_by_label("Prompt", exact=True).fill("The second")
    two.get_by_role("button", name="Generate").click()
    expect(two.get_by_text("place 1")).to_be_visible()
    ended(one)
    ended(two)
    expect(tokens(one)).to_have_count(500)
    expect(tokens(two)).to_have_count(30)
    assert run_of(one) != run_of(two)


def test_two_sessions_share_one_engine(server: Server, visit: Visit):
    pages = [
        open_playground(server, visit, model=STEADY, max_new_tokens=LONG, seed=seed)
        for seed in (1, 2)
    ]
    for page, prompt in zip(pages, ("The first", "The second"), strict=True):
        begin(page, prompt)
    for page in pages:
        expect(page.get_by_role("button", name="Stop")).to_be_enabled()
        page.get_by_role("button", name="Stop").click()
    for page in pages:
        ended(page)
        expect(page.get_by_text("side by side with one other text")).to_be_visible()


PAYLOADS = (
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "[a](javascript:window.hit=1) :red[x] $\\href{javascript:window.hit=1}{y}$ **bold** `c`",
    "</textarea><svg onload=window.hit=1>",
)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_typed_or_linked_becomes_markup(server: Server, visit: Visit, payload: str):
    page = open_playground(
        server,
        visit,
        model=TINY,
        mode="chat",
        prompt=payload,
        stop=payload[:100],
        max_new_tokens=5,
        temperature=payload,
        run=payload,
    )
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(payload)
    page.get_by_role("button", name="Generate").click()
    ended(page)
    expect(page.get_by_text(payload).first).to_be_visible()
    for path in ("", "live", "models"):
        page.goto(server.link(path, model=payload))
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        page.wait_for_timeout(700)
        assert page.evaluate("window.hit") is None
        assert page.locator("main img[src='x'], main svg[onload]").count() == 0


def test_what_a_model_says_of_itself_is_text(own_server: Server, visit: Visit):
    hostile = own_server.data / "models" / "hostile"
    shutil.copytree(own_server.data / "models" / TINY, hostile)
    said = {"title": PAYLOADS[1], "licence": PAYLOADS[0], "provenance": PAYLOADS[2]}
    (hostile / "card.json").write_text(json.dumps(said))
    for path in ("", "models", "playground"):
        page = visit(own_server.link(path, model="hostile"))
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        page.wait_for_timeout(700)
        assert page.evaluate("window.hit") is None
        assert page.locator("img[src='x']").count() == 0
    expect(page.get_by_role("combobox", name="Model")).to_have_value(PAYLOADS[1])


BAD_LINKS = {
    "temperature=-1": "Temperature is -1; the least is 0; 0.7 is used instead",
    "temperature=NaN": "Temperature is NaN; it must be a number",
    f"seed={2**70}": f"Seed is {2**70}",
    f"seed={2**53 + 5}": f"Seed is {2**53 + 5}",
    "&".join(f"stop=x{n}" for n in range(900)): "Stop strings",
    "max_new_tokens=1000000000": "New tokens is 1000000000; the most is 100,000",
    "top_p=0": "it must be above 0",
    "mode=script": "there are: chat, completion",
    "precision=fp1": "Precision is fp1; there are",
    "device=cuda:99": "cuda:99",
    "model=../../etc/passwd": "There is no model",
    "model=a%00b": "NUL",
    "prompt=a%00b": "",
    "messages=@@@": "damaged",
    "forced_ids=1,x": "whole number",
    "run=zzz": "not in the database",
}


@pytest.mark.parametrize(("query", "sentence"), BAD_LINKS.items())
def test_a_bad_link_is_one_sentence_and_the_page_works(
    server: Server, visit: Visit, query: str, sentence: str
):
    page = visit(f"{server.link('playground')}?model={TINY}&mode=completion&threads=1&{query}")
    if sentence:
        expect(page.get_by_text(sentence).first).to_be_visible()
    page.goto(link(server, max_new_tokens=5))
    begin(page)
    ended(page)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [("", "The prompt is empty"), ("   ", "The prompt is empty"), ("a\x00b", "NUL character")],
)
def test_a_bad_prompt_is_one_sentence_and_the_next_request_works(
    server: Server, visit: Visit, prompt: str, sentence: str
):
    page = open_playground(server, visit, model=TINY, max_new_tokens=5)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text(sentence)).to_be_visible()
    begin(page)
    ended(page)


def test_a_prompt_of_ten_megabytes_is_refused_and_still_there(server: Server, visit: Visit):
    page = open_playground(server, visit, model=TINY, max_new_tokens=5)
    page.get_by_label("Prompt", exact=True).fill("word " * 2_000_000)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("The prompt has 10,000,000 characters; the most is")).to_be_visible(
        timeout=60_000
    )
    assert len(page.get_by_label("Prompt", exact=True).input_value()) == 10_000_000
    begin(page)
    ended(page)


def test_a_model_that_does_not_fit_is_said_before_anything_is_allocated(
    server: Server, visit: Visit
):
    page = open_playground(server, visit, model="gpt3-175b")
    sidebar = page.get_by_test_id("stSidebar")
    expect(sidebar.get_by_text(re.compile(r"698 GB.*free.*What would fit", re.S))).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("Once")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_test_id("stMain").get_by_text("698 GB")).to_be_visible()
    assert "run=" not in page.url


def test_a_host_killed_in_mid_stream_is_said_and_the_next_request_works(
    own_server: Server, visit: Visit
):
    page = open_playground(own_server, visit, model=STEADY, max_new_tokens=LONG)
    begin(page)
    for host in own_server.hosts():
        host.kill()
    expect(page.get_by_text("Failed").first).to_be_visible()
    assert tokens(page).count() >= 4
    begin(page, "Again")
    page.get_by_role("button", name="Stop").click()
    ended(page)


def test_a_closed_tab_ends_its_text_and_a_reload_in_time_does_not(own_server: Server, visit: Visit):
    kept = open_playground(own_server, visit, model=STEADY, max_new_tokens=4000)
    begin(kept)
    run = run_of(kept)
    kept.reload()  # its browser session is gone, and another one looks at the run
    expect(tokens(kept).nth(5)).to_be_attached()
    kept.wait_for_timeout(20_000)
    assert own_server.run(run)["state"] in ("running", "done")
    kept.get_by_role("button", name="Stop").click()
    ended(kept)
    left = open_playground(own_server, visit, model=STEADY, max_new_tokens=4000)
    begin(left)
    run = run_of(left)
    left.close()
    until(lambda: own_server.run(run)["state"] == "cancelled", 40)
    assert own_server.run(run)["text"]


def test_ten_tabs_at_once_all_get_their_text(server: Server, visit: Visit):
    pages = [open_playground(server, visit, max_new_tokens=20) for _ in range(10)]
    for number, page in enumerate(pages):
        page.get_by_label("Prompt", exact=True).fill(f"Tab {number}")
        page.get_by_role("button", name="Generate").click()
    for page in pages:
        ended(page)
        expect(tokens(page)).to_have_count(20)
    assert len({run_of(page) for page in pages}) == 10


def test_a_killed_server_marks_its_run_interrupted_and_the_page_comes_back(
    own_server: Server, visit: Visit
):
    page = open_playground(own_server, visit, model=STEADY, max_new_tokens=LONG)
    begin(page)
    run, hosts = run_of(page), own_server.hosts()
    page.goto("about:blank")
    own_server.kill()
    until(lambda: not any(host.is_running() for host in hosts), 30)
    own_server.start()
    assert own_server.run(run)["state"] == "interrupted"
    page.goto(own_server.link("playground", run=run))
    expect(page.get_by_text("Interrupted").first).to_be_visible()
    begin(page, "Again")
    page.get_by_role("button", name="Stop").click()
    ended(page)
