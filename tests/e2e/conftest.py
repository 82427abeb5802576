"""A real server with small real models, and a real browser that forgives nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import psutil
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, chromium
from tests.tiny import tiny_checkpoint

START_S = 60.0
TINY = "tiny"
"""Two layers: answers before one can look."""
STEADY = "steady"
"""The same, sixty layers deep: some 100 tokens a second, slow enough to be interrupted."""
STEADY_LAYERS = 60
BROWSER_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

PROBES = ("/_stcore/health", "/_stcore/host-config")

expect.set_options(timeout=30_000)


class Server:
    """``streamlit run app.py`` on a free port, with a data folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self._locks = folder / "locks"
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        install_models(self.data / "models")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Server:
        """Start, and wait until it says that it is well."""
        command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless", "true"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--server.port", str(self.port)],
                cwd=ROOT,
                env={
                    **os.environ,
                    # The native step writes a small model's text before one can look.
                    "GPTLAB_KERNELS": "off",
                    "GPTLAB_DATA": str(self.data),
                    "GPTLAB_LOCKS": str(self._locks),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self._is_well, START_S, self.log)
        return self

    def _is_well(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=5) as answer:
                return bool(json.load(answer)["ok"])
        except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError):
            return False

    def hosts(self) -> list[psutil.Process]:
        """Return the host processes."""
        children = psutil.Process(self.pid).children(recursive=True)
        return [one for one in children if "gptcore.host" in " ".join(one.cmdline())]

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """Send the server alone a signal and wait for its end."""
        assert self._process is not None
        self._process.send_signal(signal_number)
        self._process.wait(20)

    def stop(self) -> None:
        """End the server and all that it started."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):  # then it is killed below
                self._process.wait(15)
        with suppress(ProcessLookupError):  # where the whole group is gone already
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(15)

    def log(self) -> str:
        """Return what the server printed."""
        return self._log.read_text(errors="replace")[-4000:]

    def runs(self, command: list[str]) -> str:
        """Return what a command prints that works on this server's data."""
        environment = {
            **os.environ,
            "GPTLAB_KERNELS": "off",
            "GPTLAB_DATA": str(self.data),
            "GPTLAB_LOCKS": str(self._locks),
        }
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def run(self, run_id: str) -> dict[str, str]:
        """Return state and text of a run as they stand in the database."""
        with closing(sqlite3.connect(self.data / "lab.db")) as database:
            found = database.execute("SELECT state, text FROM runs WHERE id = ?", (run_id,))
            return dict(zip(("state", "text"), found.fetchone(), strict=True))

    def link(self, path: str = "", **query: object) -> str:
        """Return the address of a page with settings."""
        return f"{self.url}/{path}" + (f"?{urlencode(query, doseq=True)}" if query else "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(
    condition: Callable[[], object], seconds: float = 20.0, why: Callable[[], str] = lambda: ""
) -> None:
    """Wait until ``condition`` holds; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in {seconds} s. {why()}"
        time.sleep(0.05)


def ready(page: Page) -> None:
    """Wait until the script of the page has run."""
    expect(
        page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]')
    ).to_be_visible()


def install_models(folder: Path) -> None:
    """Put the two small models into the folder of a catalogue."""
    tiny = tiny_checkpoint(folder / TINY, context=4096)
    steady = tiny_checkpoint(folder / STEADY, context=4096)
    weights = load_file(steady / "model.safetensors")
    layer = {name: value for name, value in weights.items() if ".layers.0." in name}
    for number in range(STEADY_LAYERS):
        for name, value in layer.items():
            weights[name.replace(".layers.0.", f".layers.{number}.")] = value.clone()
    save_file(weights, steady / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((steady / "config.json").read_text())
    (steady / "config.json").write_text(json.dumps({**config, "num_hidden_layers": STEADY_LAYERS}))
    for model in (tiny, steady):
        (model / "card.json").write_text(json.dumps({"title": model.name.capitalize()}))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that all tests share; one that kills or needs a cold start takes its own."""
    one = Server(tmp_path_factory.mktemp("server"))
    try:
        yield one.start()
    finally:
        one.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A fresh server of this test alone, not yet looked at by anybody."""
    one = Server(tmp_path / "server")
    try:
        yield one.start()
    finally:
        one.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The machine's Chromium."""
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(
            executable_path=chromium(), args=list(BROWSER_OPTIONS), headless=True
        )
        yield one
        one.close()


Visit = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Open an address in a fresh browser session; complaints of any page fail the test."""
    complaints: list[str] = []
    with opened(browser, complaints) as visit:
        yield visit
    assert complaints == []


@contextmanager
def opened(browser: Browser, complaints: list[str]) -> Iterator[Visit]:
    """Give a function that opens pages; write down what they complain about."""
    contexts = []

    def note_foreign(url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob", "about") and parts.hostname != "127.0.0.1":
            complaints.append(f"request to another host: {url[:200]}")

    def note_error(said: ConsoleMessage) -> None:
        # Under /playground Streamlit first asks whether it lies in that folder, and is told no.
        asked = urlsplit(said.location["url"]).path
        if said.type == "error" and not asked.endswith(PROBES):
            complaints.append(f"console: {said.text[:500]}")

    def visit(url: str, *, width: int = 1440, height: int = 900) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(f"page error: {error}"))
        page.on("console", note_error)
        page.on("request", lambda request: note_foreign(request.url))
        page.on("websocket", lambda socket: note_foreign(socket.url))
        page.goto(url)
        return page

    try:
        yield visit
        for context in contexts:
            for page in context.pages:
                if page.locator('[data-testid="stException"]').count():
                    said = page.locator('[data-testid="stException"]').first.inner_text()
                    complaints.append(f"exception on the page: {said[:1000]}")
    finally:
        for context in contexts:
            context.close()
