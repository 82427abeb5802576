"""The live and models pages in a real browser."""

import json
import pickle
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from gptcore.records import Reading
from gptcore.store import open_store
from tests.e2e.conftest import TINY, Server, Visit, until

pytestmark = pytest.mark.browser

RANGES = """() => [...document.querySelectorAll('.js-plotly-plot')]
    .map(plot => plot._fullLayout?.xaxis?.range?.map(String))"""


def write(page: Page, server: Server, count: int = 20) -> None:
    """Let the tiny model write something."""
    page.goto(
        server.link(
            "playground",
            model=TINY,
            mode="completion",
            threads=1,
            max_new_tokens=count,
            ignore_eos=1,
            prompt="Once",
        )
    )
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("ended by length")).to_be_visible()


def test_a_request_is_on_the_live_page_at_once_and_a_missing_gpu_is_no_zero(
    server: Server, visit: Visit
):
    page = visit(server.link())
    write(page, server)
    page.goto(server.link("live"))
    output = page.locator(".gptlab-chart").filter(has_text="Time to first token")
    expect(output.get_by_text("n = ")).to_be_visible()
    gpu = page.get_by_test_id("stMetric").filter(has_text="GPU")
    expect(gpu.get_by_test_id("stMetricValue")).to_have_text("No GPU")


def test_a_zoom_survives_the_refreshes(server: Server, visit: Visit):
    page = visit(server.link())
    write(page, server)
    page.goto(server.link("live"))
    plot = page.locator(".js-plotly-plot .nsewdrag").first
    expect(plot).to_be_visible()
    box = plot.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] * 0.5, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + box["width"] * 0.3, y, steps=5)
    page.mouse.up()
    expect(page.get_by_role("button", name="Reset zoom").first).to_be_visible()
    zoomed = page.evaluate(RANGES)[0]
    updated = page.get_by_text("Updated").first.inner_text()
    expect(page.get_by_text(updated)).to_have_count(0)
    page.wait_for_timeout(2500)
    assert page.evaluate(RANGES)[0] == zoomed
    page.get_by_role("button", name="Reset zoom").first.click()
    page.wait_for_timeout(1500)
    assert page.evaluate(RANGES)[0] != zoomed


@pytest.fixture
def server_with_a_day(tmp_path: Path) -> Iterator[Server]:
    """A server whose database holds a day of readings, one a second."""
    one = Server(tmp_path / "server")
    now = time.time()
    with open_store(f"sqlite:///{one.data / 'lab.db'}") as store:
        for begin in range(60, 86_400, 3600):
            store.add_readings(
                [
                    Reading(name, (second % 60) / 60, now - second)
                    for name in ("cpu_utilization_ratio", "memory_utilization_ratio")
                    for second in range(begin, min(begin + 3600, 86_400))
                ]
            )
        store.roll_up(now)
    try:
        yield one.start()
    finally:
        one.stop()


def test_a_day_at_one_reading_a_second_is_drawn_at_once(server_with_a_day: Server, visit: Visit):
    page = visit(server_with_a_day.link("live"), height=2400)  # charts out of sight wait
    expect(page.locator(".js-plotly-plot").first).to_be_visible()
    began = time.monotonic()
    page.get_by_role("radio", name="1 d", exact=True).click()
    page.wait_for_function(
        """() => [...document.querySelectorAll('.js-plotly-plot')].some(
            plot => plot.data?.some(line => (line.x?.length ?? 0) > 300))"""
    )
    print(f"a day at one reading a second: {time.monotonic() - began:.2f} s from click to chart")


def test_a_folder_is_added_and_deleted_only_after_asking(
    own_server: Server, visit: Visit, tmp_path: Path
):
    source = tmp_path / "mine"
    shutil.copytree(own_server.data / "models" / TINY, source)
    page = visit(own_server.link("models"))
    page.get_by_text("Add a model").click()
    page.get_by_role("tab", name="From a folder or file").click()
    page.get_by_label("Folder or .gguf file on the server").fill(str(source))
    page.get_by_role("tabpanel").get_by_role("button", name="Add it").locator(
        "visible=true"
    ).click()
    added = own_server.data / "models" / "mine"
    until(added.is_dir)
    page.goto(own_server.link("models", model="mine"))
    expect(page.get_by_role("combobox", name="Model")).to_have_value("mine")
    page.get_by_role("button", name="Delete").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_text("is removed from disk")).to_be_visible()
    assert added.is_dir()
    dialog.get_by_role("button", name="Keep it").click()
    expect(dialog).to_have_count(0)
    assert added.is_dir()
    page.get_by_role("button", name="Delete").first.click()
    dialog.get_by_role("button", name="Delete").click()
    until(lambda: not added.exists())


def giant_header() -> bytes:
    return struct.pack("<Q", 2**62) + b"{}"


def harmful_pickle() -> bytes:
    return pickle.dumps({"weights": [1.0]})


CONFIG = {"model_type": "llama", "num_hidden_layers": 10**9}


@pytest.mark.parametrize(
    ("weights", "config", "sentence"),
    [
        (b"", {}, "empty"),
        (giant_header(), {}, "header"),
        (harmful_pickle(), {}, "pickle"),
        (None, CONFIG, "layers"),
    ],
    ids=["empty", "giant header", "pickle", "a thousand million layers"],
)
def test_a_bad_upload_is_one_sentence_and_nothing_is_added(
    server: Server,
    visit: Visit,
    tmp_path: Path,
    weights: bytes | None,
    config: dict[str, object],
    sentence: str,
):
    good = server.data / "models" / TINY
    content = (good / "model.safetensors").read_bytes() if weights is None else weights
    (tmp_path / "model.safetensors").write_bytes(content)
    described = json.loads((good / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(described))
    shutil.copy(good / "tokenizer.json", tmp_path)
    before = sorted(one.name for one in (server.data / "models").iterdir())
    page = visit(server.link("models"))
    page.get_by_text("Add a model").click()
    page.get_by_role("tab", name="Upload").click()
    page.locator("input[type=file]").set_input_files(sorted(tmp_path.iterdir()))
    button = page.get_by_role("button", name="Add it").locator("visible=true")
    expect(button).to_be_enabled()
    button.click()
    expect(page.get_by_test_id("stAlert").filter(has_text=sentence).first).to_be_visible()
    after = sorted(one.name for one in (server.data / "models").iterdir())
    assert after == before
