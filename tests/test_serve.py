"""The routes for machines: what they answer, to whom, and with which headers."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gptcore import __version__, serve
from gptcore.monitor.prometheus import Metrics


class _Lab:
    def __init__(self) -> None:
        self.metrics = Metrics()
        self.ok = True

    def health(self) -> SimpleNamespace:
        return SimpleNamespace(
            ok=self.ok, database="SQLite: well.", hosts=(("cpu", "idle"), ("cuda:0", "busy"))
        )


@pytest.fixture
def lab() -> _Lab:
    return _Lab()


@pytest.fixture
def client(lab: _Lab, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.delenv("GPTLAB_ALLOWED_HOSTS", raising=False)
    return TestClient(Starlette(routes=serve.routes(lab)), base_url="http://127.0.0.1:8711")


def test_health_is_json_with_database_hosts_and_version(client: TestClient) -> None:
    answer = client.get("/healthz")
    assert answer.status_code == 200
    assert answer.json() == {
        "ok": True,
        "database": "SQLite: well.",
        "hosts": {"cpu": "idle", "cuda:0": "busy"},
        "version": __version__,
    }


def test_health_that_is_not_good_is_503_for_whoever_only_reads_the_status(
    client: TestClient, lab: _Lab
) -> None:
    lab.ok = False
    answer = client.get("/healthz")
    assert answer.status_code == 503
    assert answer.json()["ok"] is False


def test_metrics_are_what_the_labs_metrics_say_in_prometheus_format(
    client: TestClient, lab: _Lab
) -> None:
    lab.metrics.queue(2, 3)
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert answer.content == lab.metrics.exposition()
    assert "gptlab_num_requests_waiting 3.0" in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
def test_nothing_but_reading_is_allowed(client: TestClient, path: str, method: str) -> None:
    assert client.request(method, path).status_code == 405


@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
@pytest.mark.parametrize("host", ["127.0.0.1:8711", "localhost", "LOCALHOST:1", "[::1]:8711"])
def test_the_loopback_may_ask(client: TestClient, path: str, host: str) -> None:
    assert client.get(path, headers={"host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8711", "", "[::2]"]
)
def test_a_foreign_name_is_refused_and_told_nothing(
    client: TestClient, path: str, host: str
) -> None:
    answer = client.get(path, headers={"host": host})
    assert answer.status_code == 421
    assert "SQLite" not in answer.text
    assert "gptlab_" not in answer.text


def test_more_names_are_allowed_by_the_environment(
    lab: _Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTLAB_ALLOWED_HOSTS", "Lab.example, 10.0.0.7")
    client = TestClient(Starlette(routes=serve.routes(lab)))
    for host, status in {
        "lab.example:8501": 200,
        "10.0.0.7": 200,
        "localhost": 200,
        "other.example": 421,
    }.items():
        assert client.get("/healthz", headers={"host": host}).status_code == status
    monkeypatch.setenv("GPTLAB_ALLOWED_HOSTS", "*")
    client = TestClient(Starlette(routes=serve.routes(lab)))
    assert client.get("/healthz", headers={"host": "any.example"}).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "evil.example"])
def test_every_answer_carries_the_security_headers(client: TestClient, host: str) -> None:
    answer = client.get("/healthz", headers={"host": host})
    assert (
        serve.HEADERS.items() <= {name: answer.headers.get(name) for name in serve.HEADERS}.items()
    )


def test_the_routes_know_nothing_of_streamlit() -> None:
    tree = ast.parse(Path(serve.__file__).read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name and name.startswith("streamlit")]
